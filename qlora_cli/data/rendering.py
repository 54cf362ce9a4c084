"""What a chat template writes, and where in it a turn of the assistant stands.

Places are found by position, never by looking for text or tokens: the conversation before a turn, rendered with the
generation prompt, ends where the turn begins. A template that has {% generation %} says so itself.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from qlora_cli.data.cells import check_unicode
from qlora_cli.data.files import shorten
from qlora_cli.data.markers import Markers
from qlora_cli.errors import DataError

Span = tuple[int, int]
Messages = Sequence[Mapping[str, Any]]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_DATE_PARTS = re.compile(r"%[-#]?[aAwdbBmyYHIpMSfzZjUWcxXGuV%]")

# What a template is tried with.
_ASKED = {"role": "user", "content": "Hello"}
_ANSWER = "World"
_ANSWERED = {"role": "assistant", "content": _ANSWER}


class Place(NamedTuple):
    """Which turn is meant, for messages: the row, the number of the assistant turn in it, and its tools."""

    where: str
    number: int
    tools: Sequence[Mapping[str, Any]] | None = None

    def __str__(self) -> str:
        return f"{self.where}: assistant turn {self.number}"


class Turn(NamedTuple):
    """A conversation up to a turn of the assistant, as the template writes it, and the characters of the turn.

    The turn reaches from the end of the generation prompt to the end of its end-of-turn marker; whitespace that the
    template puts after the marker is left out, as nothing is generated after the marker.
    """

    text: str
    start: int
    end: int


class ChatTemplate:
    """One chat template, with the special tokens of the tokenizer it is written for.

    `dated` tells whether it writes today's date (which is then `today`), `takes_tools` whether it writes tools.
    """

    def __init__(self, source: str, tokenizer: Any, today: datetime.date) -> None:
        self.dated = "strftime_now" in source
        self.takes_tools = "tools" in source
        self._calls_tools = "tool_calls" in source
        self._tagged = _GENERATION.search(source) is not None
        self._source = _with_date(source, today) if self.dated else source
        # Only what it mentions: each costs time in every rendering.
        self._tokens = {name: token for name, token in tokenizer.special_tokens_map.items() if name in source}
        self._markers = Markers(tokenizer)
        self._prompt, self._tail = self._try_out()

    def write(self, messages: Messages, where: str, tools: Any = None, *, prompt: bool = False) -> str:
        """The conversation as text, with the generation prompt if asked for.

        Raises DataError if the template refuses it, or if it holds what is no text.
        """
        return self._render(messages, where, tools, add_generation_prompt=prompt)[0]

    def whole(self, messages: Messages, where: str, tools: Any = None) -> Turn:
        """The conversation as text, and all of it but what leads over to a turn that is not there.

        As of a turn, whitespace after the last marker is left out, so that the marker is what is learned last.
        """
        text = self.write(messages, where, tools)
        stop = len(text.removesuffix(self._tail))
        end = len(text[:stop].rstrip())
        return Turn(text, 0, end if self._markers.begin(text, end) < end else stop)

    def turn(self, messages: Messages, place: Place) -> Turn:
        """The last of `messages`, which is the assistant's.

        Raises DataError if the template refuses them, does not begin the turn as it does when it generates, does not
        write what the turn holds, or has {% generation %} tags that do not fit the turns.
        """
        message = messages[-1]
        if message.get("tool_calls") and not self._calls_tools:
            raise DataError(
                f"{place} has tool_calls, which the chat template does not write, so that they would not be learned. "
                f"Set dataset.chat_template to a template that writes them."
            )
        if self._tagged:
            turn = self._tagged_turn(messages, place)
        else:
            text = self.write(messages, place.where, place.tools)
            start = self._start(messages[:-1], text, place)
            stop = max(len(text.removesuffix(self._tail)), start)
            turn = Turn(text, start, self._end(text, start, stop, str(message["content"])))
        self._check_said(message, turn, place)
        return turn

    def end_within(self, turn: Turn, whole: str) -> int | None:
        """Where `turn` ends in the conversation that goes on after it; None if it is written differently.

        Markers that the template writes only at the very end of a conversation are no difference.
        """
        text, start, end = turn
        if whole.startswith(text[:end]):
            return end
        shared = _shared(text, whole)
        while end > start:
            begin = self._markers.begin(text, end)
            if begin == end or begin < start:
                return None
            if end <= shared:
                return end
            end = start + len(text[start:begin].rstrip())
        return None

    def _render(self, messages: Messages, where: str, tools: Any, **options: Any) -> tuple[str, list[list[Span]]]:
        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                tools=None if tools is None else list(tools),
                chat_template=self._source,
                **options,
                **self._tokens,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            shape = ", ".join(message["role"] for message in messages) or "no message before the assistant's"
            raise DataError(f"{where}: the chat template refuses this conversation ({shape}): {error}") from error
        check_unicode(texts[0], f"{where}: the conversation")
        return texts[0], spans

    def _tagged_turn(self, messages: Messages, place: Place) -> Turn:
        text, (tagged,) = self._render(messages, place.where, place.tools, return_assistant_tokens_mask=True)
        spans = _joined(tagged)
        turns = sum(message["role"] == "assistant" for message in messages)
        if len(spans) != turns:
            raise DataError(
                f"{place.where}: the chat template marks {len(spans)} stretches with {{% generation %}} where there "
                f"are {turns} assistant turns, so that it is not known which is which. Correct its tags, or leave "
                f"them out, in a template of your own: dataset.chat_template."
            )
        start, end = spans[-1]
        # Left out by the tags, but written right after the last turn of a conversation: the end of the turn.
        closing = self._markers.end(text, end)
        if closing > end and not self._prompt.startswith(text[end:closing]):
            return Turn(text, start, closing)
        marked = start + len(text[start:end].rstrip())
        return Turn(text, start, marked if self._markers.begin(text, marked) in range(start, marked) else end)

    def _check_said(self, message: Mapping[str, Any], turn: Turn, place: Place) -> None:
        """Refuse a turn without the answer in it, or at least the end of the answer: reasoning may be left out."""
        said = str(message["content"]).strip()
        written = turn.text[turn.start : turn.end]
        if said in written or message.get("tool_calls") or said.split()[-1] in written:
            return
        if self._tagged and said in turn.text:
            raise DataError(
                f"{place}: the {{% generation %}} tags of the chat template do not stand around what is said, but "
                f"around {shorten(written)}. Inside a macro or a set block they are not followed: set "
                f"dataset.chat_template to a template that has them at the top."
            )
        raise DataError(
            f"{place}: the chat template writes {shorten(written)} for what is said, {shorten(said)}. "
            f"Set dataset.chat_template to a template that writes content that is text."
        )

    def _start(self, before: Messages, text: str, place: Place) -> int:
        """Where the turn after `before` begins in `text`: behind the generation prompt."""
        try:
            prompt = self.write(before, place.where, place.tools, prompt=True)
        except DataError:
            if before:
                raise
            prompt = None  # most templates look at the first message
        if prompt is not None and text.startswith(prompt):
            # Some write the generation prompt only after certain roles.
            unwritten = bool(self._prompt) and not prompt.endswith(self._prompt)
            follows = unwritten and text.startswith(self._prompt, len(prompt))
            return len(prompt) + (len(self._prompt) if follows else 0)
        if not before and self._prompt and self._prompt in text:
            # Nothing but a system prompt of the template's own can stand before it.
            return text.index(self._prompt) + len(self._prompt)
        raise DataError(self._misfit(before, prompt or "", text, place))

    def _misfit(self, before: Messages, prompt: str, text: str, place: Place) -> str:
        """Why it is not known where a turn begins."""
        asked = self.write(before, place.where, place.tools) if before else ""
        at = self._markers.uncut(prompt, _shared(prompt, asked))
        generated = prompt[at:]
        written = text[at : self._markers.uncut(text, at + len(generated))]
        if generated and text.startswith(prompt[:at]):
            return (
                f"{place}: the chat template writes {generated!r} when the model is to answer, and "
                f"{written!r} in the conversation, so that an answer would be learned where the model never gives "
                f"one. Set dataset.chat_template to a template that writes both alike, or has {{% generation %}}."
            )
        return (
            f"{place}: the chat template changes what comes before this turn once the turn follows, so its place in "
            f"the conversation is not known. Set dataset.chat_template to a template that writes each turn once."
        )

    def _end(self, text: str, start: int, stop: int, content: str) -> int:
        """Where the turn that fills `text[start:stop]` ends, without the whitespace after its end-of-turn marker."""
        end = start + len(text[start:stop].rstrip())
        if end == stop or self._markers.begin(text, end) in range(start, end):
            return end
        # Without a marker, whitespace may be the answer's own.
        said = text.find(content, start, stop)
        if said < 0:  # the template trims or rewrites content
            content = content.strip()
            said = text.find(content, start, stop)
        return max(end, said + len(content) if said >= 0 else start)

    def _try_out(self) -> tuple[str, str]:
        """The generation prompt, and what is written after every conversation and is not part of it."""
        try:
            asked, prompted = (self.write([_ASKED], "", prompt=prompt) for prompt in (False, True))
            answered = self.write([_ASKED, _ANSWERED], "")
            prompt = prompted[self._markers.uncut(prompted, _shared(prompted, asked)) :]
            goes_on = self.write([_ASKED, _ANSWERED, _ASKED], "")
        except DataError:  # it wants another kind of conversation
            return "", ""
        if prompt or goes_on.startswith(answered) or not answered.startswith(prompted + _ANSWER):
            return prompt, ""
        # The first template of Llama 3, and many after it, write the generation prompt whether asked for or not.
        tail = answered[self._markers.end(answered, len(prompted + _ANSWER)) :]
        return (tail, tail) if prompted.endswith(tail) else ("", "")


def _joined(spans: list[Span]) -> list[Span]:
    """Stretches that touch as one: a template may put an answer and its end in tags of their own."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def _shared(one: str, other: str) -> int:
    """The number of characters that both texts begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one.startswith(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _with_date(source: str, today: datetime.date) -> str:
    """The template with `strftime_now` telling of `today`.

    As a macro before it, because transformers lets no function in as an argument. Its newline is trimmed, so that the
    template begins on a line of its own and writes what it would.
    """
    midnight = datetime.datetime.combine(today, datetime.time())
    parts = {part: midnight.strftime(part) for part in _DATE_PARTS.findall(source)}
    steps = "".join(f" | replace({json.dumps(part)}, {json.dumps(value)})" for part, value in parts.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n{source}"
