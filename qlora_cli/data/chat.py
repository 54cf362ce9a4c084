"""Chat templates: the text of a conversation, and which stretches of it the assistant wrote.

What the assistant wrote is found by position, never by looking for tokens: rendering the conversation up to
a turn, with the generation prompt, gives where the turn begins; rendering it with the turn, where it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qlora_cli.data.formats import Conversation, Passage
from qlora_cli.errors import DataError

Span = tuple[int, int]


def conversation_of(example: Conversation | Passage) -> Conversation:
    """The conversation itself, or the one that a passage makes: a user turn and the answer to it."""
    if isinstance(example, Conversation):
        return example
    user = {"role": "user", "content": example.prompt}
    return Conversation((user, {"role": "assistant", "content": example.completion}))


def has_template(tokenizer: Any) -> bool:
    """Whether there is a chat template to render conversations with."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(conversation: Conversation, tokenizer: Any, where: str) -> tuple[str, list[Span]]:
    """The whole conversation as text, and the [start, end) characters of every assistant turn in it.

    A turn reaches from the end of the generation prompt to the end of its end-of-turn marker; whitespace that
    the template puts after the marker is left out, as nothing is generated after the marker. Raises DataError
    if the template refuses the conversation or renders earlier turns differently once later ones follow.
    """
    messages = conversation.messages
    whole = _apply(tokenizer, messages, where)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _apply(tokenizer, messages[:i], where, add_generation_prompt=True)
        through = whole if i + 1 == len(messages) else _apply(tokenizer, messages[: i + 1], where)
        if not (whole.startswith(through) and through.startswith(before)):
            raise DataError(
                f"{where}: message {i + 1}: the chat template changes this assistant turn, or what comes "
                f"before it, depending on what follows, so its place in the whole conversation is not known. "
                f"Give one row per assistant turn, or use a chat template that renders each turn once."
            )
        spans.append((len(before), _end_of_turn(through, len(before), message["content"])))
    return whole, spans


def _end_of_turn(text: str, start: int, content: str) -> int:
    """Where the turn that fills `text[start:]` ends, without the whitespace after its end-of-turn marker."""
    said = text.find(content, start)
    if said < 0:  # the template trims or rewrites content
        content = content.strip()
        said = text.find(content, start)
    after = said + len(content) if said >= 0 else start
    marker_end = len(text.rstrip())
    # Without a marker, whitespace may be the answer's own.
    return max(marker_end, after)


def _apply(
    tokenizer: Any, messages: Sequence[dict[str, Any]], where: str, *, add_generation_prompt: bool = False
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program, and may fail in any way
        shape = ", ".join(message["role"] for message in messages) or "no message before the assistant's"
        raise DataError(f"{where}: the chat template refuses this conversation ({shape}): {error}") from error
    return text
