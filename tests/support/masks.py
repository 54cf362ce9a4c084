"""What is learned of a text, written and shown with ⟦ and ⟧ around it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from qlora_cli.data.chat import Rendered, Renderer
from qlora_cli.data.formats import Conversation
from tests.support.encoded import DAY, encode

__all__ = ["DAY", "encode"]


def marked(rendered: Rendered) -> str:
    """The text of a sequence with its learned spans in ⟦ ⟧."""
    pieces, last = [], 0
    for start, end in rendered.spans:
        pieces += [rendered.text[last:start], "⟦", rendered.text[start:end], "⟧"]
        last = end
    return "".join((*pieces, rendered.text[last:]))


def pieces_of(text: str) -> list[tuple[str, bool]]:
    """A text with ⟦ ⟧ in pieces, each learned or not."""
    pieces = []
    for part in text.split("⟦"):
        learned, closed, after = part.partition("⟧")
        pieces += [(learned, True), (after, False)] if closed else [(part, False)]
    return [(piece, learned) for piece, learned in pieces if piece]


def ids_and_labels(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a text with ⟦ ⟧, tokenised piece by piece. The first token is never learned."""
    ids: list[int] = []
    labels: list[int] = []
    for piece, learned in pieces_of(text):
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if learned else [-100] * len(tokens)
    return ids, [-100, *labels[1:]]


def conversation(*messages: dict[str, Any], **fields: Any) -> Conversation:
    """An example of these messages."""
    return Conversation(messages, **fields)


def render_marked(
    tokenizer: PreTrainedTokenizerFast, *messages: dict[str, Any], supervise: Any = "all_assistant", **fields: Any
) -> list[str]:
    """The sequences of a conversation, with ⟦ ⟧."""
    renderer = Renderer(tokenizer, supervise, today=DAY)
    return [marked(rendered) for rendered in renderer.render(conversation(*messages, **fields), "rows.jsonl, line 1")]


def user(content: str, **more: Any) -> dict[str, Any]:
    """A turn of the user."""
    return {"role": "user", "content": content, **more}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    """A turn of the assistant."""
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    """A system prompt."""
    return {"role": "system", "content": content}
