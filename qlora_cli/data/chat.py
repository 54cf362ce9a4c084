"""From an example to text, and which of its characters are learned."""

from __future__ import annotations

import datetime
from typing import Any, Literal, NamedTuple

from qlora_cli.data.formats import Conversation, Example, Passage, Text
from qlora_cli.data.rendering import ChatTemplate, Place, Span, Turn
from qlora_cli.errors import DataError

Supervise = Literal["all_assistant", "last_assistant", "everything"]


class Rendered(NamedTuple):
    """One sequence: its text and the learned [start, end) characters of it, in order and apart.

    `bare` text knows no chat template: bos and eos go around it.
    """

    text: str
    spans: tuple[Span, ...]
    bare: bool


def has_template(tokenizer: Any) -> bool:
    """Whether there is a chat template to render conversations with."""
    return bool(getattr(tokenizer, "chat_template", None))


def conversation_of(example: Conversation | Passage) -> Conversation:
    """The conversation itself, or the one that a passage makes: a user turn and the answer to it."""
    if isinstance(example, Conversation):
        return example
    system = [] if example.system is None else [{"role": "system", "content": example.system}]
    user = {"role": "user", "content": example.prompt}
    return Conversation((*system, user, {"role": "assistant", "content": example.completion}))


class Renderer:
    """Renders examples with a tokenizer's chat template, or bare where it has none.

    `supervise` says which turns are learned; text is learned whole, and of a passage the completion, unless it is
    `everything`. A template that writes a date writes `today`.
    """

    def __init__(self, tokenizer: Any, supervise: Supervise = "all_assistant", *, today: datetime.date) -> None:
        self._tokenizer = tokenizer
        self._supervise = supervise
        self._today = today
        self._templates: dict[str, ChatTemplate] = {}

    def template(self, tools: Any = None) -> ChatTemplate:
        """The template of conversations with these tools: tokenizers may have one of their own for tools.

        Raises DataError if there are several templates and none is for this.
        """
        try:
            source = self._tokenizer.get_chat_template(tools=None if tools is None else list(tools))
        except ValueError:
            names = ", ".join(sorted(self._tokenizer.chat_template))
            raise DataError(
                f"the tokenizer has several chat templates ({names}) and no default. Set dataset.chat_template."
            ) from None
        if source not in self._templates:
            self._templates[source] = ChatTemplate(source, self._tokenizer, self._today)
        return self._templates[source]

    def leaves_out_tools(self, example: Example) -> bool:
        """Whether the example has tools and its template writes none: the model would not see what it may call."""
        if not isinstance(example, Conversation) or example.tools is None:
            return False
        return not self.template(example.tools).takes_tools

    def render(self, example: Example, where: str) -> list[Rendered]:
        """The sequences that an example makes: one, or one for every learned turn.

        Where a template writes a turn differently once others follow (it drops earlier reasoning, or moves the system
        prompt), each learned turn becomes a sequence of its own, with the conversation up to it, which is what the
        model sees when it answers. Raises DataError as `ChatTemplate.turn` does.
        """
        if isinstance(example, Text):
            return [_bare(example.text, 0)]
        if has_template(self._tokenizer):
            return self._conversation(conversation_of(example), where)
        if isinstance(example, Passage):
            text = example.bare_prompt + example.completion
            return [_bare(text, 0 if self._supervise == "everything" else len(example.bare_prompt))]
        raise DataError(
            f"{where}: a conversation needs a chat template, and the tokenizer has none. "
            f"Set dataset.chat_template, or use the format prompt_completion or text."
        )

    def _conversation(self, conversation: Conversation, where: str) -> list[Rendered]:
        messages, tools, unlearned = conversation.messages, conversation.tools, conversation.unlearned
        template = self.template(tools)
        said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        places = {i: Place(where, number, tools) for number, i in enumerate(said, 1)}
        if self._supervise == "everything":
            return [_everything(template, conversation, places, where)]
        learned = [i for i in said if i not in unlearned]
        if self._supervise == "last_assistant":
            learned = learned[-1:]
        turns = [template.turn(messages[: i + 1], places[i]) for i in learned]
        # What follows the last turn cannot be learned, but the template may let it change that turn.
        if self._supervise == "last_assistant":
            return [_alone(turns[0])]
        ends_here = learned[-1] + 1 == len(messages)
        text = turns[-1].text if ends_here else template.write(messages, where, tools)
        spans = _places(template, turns, text)
        return [_alone(turn) for turn in turns] if spans is None else [Rendered(text, spans, bare=False)]


def _bare(text: str, start: int) -> Rendered:
    return Rendered(text, _apart((start, len(text))), bare=True)


def _alone(turn: Turn) -> Rendered:
    return Rendered(turn.text, _apart((turn.start, turn.end)), bare=False)


def _apart(*spans: Span) -> tuple[Span, ...]:
    return tuple((start, end) for start, end in spans if start < end)


def _places(template: ChatTemplate, turns: list[Turn], text: str) -> tuple[Span, ...] | None:
    """The characters of these turns in the whole conversation; None if the template writes one differently there."""
    spans: list[Span] = []
    for turn in turns:
        end = template.end_within(turn, text)
        if end is None or (spans and turn.start < spans[-1][1]):
            return None
        spans.append((turn.start, end))
    return _apart(*spans)


def _everything(template: ChatTemplate, conversation: Conversation, places: dict[int, Place], where: str) -> Rendered:
    """All of the text, but for turns with weight 0."""
    messages, tools = conversation.messages, conversation.tools
    text, start, stop = template.whole(messages, where, tools)
    turns = [template.turn(messages[: i + 1], places[i]) for i in sorted(conversation.unlearned)]
    gaps = _places(template, turns, text)
    if gaps is None:
        raise DataError(
            f"{where}: a turn with weight 0 cannot be left out where dataset.supervise is everything: the chat "
            f"template writes it differently once others follow. Leave the weight out, or learn the answers alone."
        )
    starts, ends = [start, *(end for _, end in gaps)], [*(begin for begin, _ in gaps), stop]
    return Rendered(text, _apart(*zip(starts, ends, strict=True)), bare=False)
