"""Whether the rows teach the model to stop: which token ends what the assistant says, and where it is learned."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_cli.data.chat import Renderer, has_template
from qlora_cli.data.encoded import LEARNED, EncodedRows, Mask
from qlora_cli.data.fitting import Fitted
from qlora_cli.data.formats import Conversation
from qlora_cli.data.markers import Markers, special_tokens
from qlora_cli.errors import DataError

# What a template is looked at with where no row shows how it ends a turn.
_PROBE = Conversation(({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "World"}))


@dataclass(frozen=True)
class EndOfTurn:
    """How an answer ends.

    `token` is the id of the token that ends it and `text` what that token reads; `rows` counts the rows, as training
    sees them, whose last supervised token it is, `turns` all answers in them that end in a token made for that, and
    `unended` the rows of which an answer ends in none. Text beside answers counts for `rows` alone: its end is another.
    Without such a token, `token` is None and `text` is what the chat template writes after an answer in plain words:
    empty if it writes nothing, None if it cannot be told.
    """

    token: int | None
    text: str | None
    rows: int = 0
    turns: int = 0
    unended: int = 0


def find_end_of_turn(rows: Fitted, tokenizer: Any) -> EndOfTurn:
    """The end of the answers in these rows, before and after `max_length` is applied.

    It is read off the supervised tokens themselves, the last of every row, not off the template's text: what counts
    is what is learned.
    """
    whole, kept = rows.whole, rows.kept
    lasts = whole.index["last"][_answering(whole) & (whole.learned > 0)]
    special = special_tokens(tokenizer)
    token = _most_common(lasts[np.isin(lasts, special)])
    if token is None:
        # A token that was added to the vocabulary without being special is one too, if nothing else ends a turn.
        token = _most_common(lasts)
        added = tokenizer.get_added_vocab().values()
        if token is None or token not in added or np.mean(lasts == token) <= 0.5:
            return EndOfTurn(None, _words_after_an_answer(tokenizer))
    lasts, learned, answering = kept.index["last"], kept.learned > 0, _answering(kept)
    return EndOfTurn(
        token,
        tokenizer.convert_ids_to_tokens(token),
        rows=kept.count(np.flatnonzero(learned & (lasts == token))),
        turns=int(kept.index["turns"][answering].sum()),
        unended=kept.count(np.flatnonzero(learned & answering & ~np.isin(lasts, [*special, token]))),
    )


def template_end(tokenizer: Any) -> int | None:
    """The token that the chat template puts right after an answer, special or added; None if it puts none there."""
    words = _words_after_an_answer(tokenizer)
    stop = Markers(tokenizer).end(words, 0) if words else 0
    return int(tokenizer.convert_tokens_to_ids(words[:stop])) if words and stop else None


def missing_end(end: EndOfTurn, kept: EncodedRows, max_length: int) -> Iterable[str]:
    """What is wrong with rows of which none teaches the model to stop."""
    if end.token is None and end.text == "" and kept.supervised_tokens:
        yield (
            f"{kept.source}: the chat template puts nothing after an answer, so that no row teaches the model to stop. "
            f"Use a base model whose chat template ends a turn with a token, or set dataset.chat_template to one that "
            f"has {{{{ eos_token }}}} after the assistant's content."
        )
    # Text may go on for ever; an answer has to end.
    if end.token is not None and not (end.turns or kept.is_text.all() or _is_learned(end.token, kept)):
        yield (
            f"{kept.source}: every row is cut before its first end of turn ({end.text}) at dataset.max_length "
            f"({max_length} tokens), so that no row teaches the model to stop. Raise dataset.max_length."
        )


def doubts_about_the_end(end: EndOfTurn, kept: EncodedRows, max_length: int) -> Iterable[str]:
    """What may be meant so, but is more often a mistake."""
    if end.token is None and end.text:
        yield (
            f"the chat template ends an answer with the words {end.text!r}, which are no token of their own: the "
            f"model learns them, but whatever generates with it has to be told to stop there"
        )
    if end.token is not None and end.turns and end.unended and not kept.truncated:
        rows = kept.count(np.flatnonzero(_answering(kept)))
        yield (
            f"the end of turn ({end.text}) is learned at the end of {rows - end.unended:,} of {rows:,} rows: "
            f"after the others the model does not learn to stop"
        )
    if end.token is not None and not end.turns and len(kept) and kept.is_text.all():
        yield (
            f"every row is cut before its end ({end.text}) at dataset.max_length ({max_length}): no row teaches the "
            f"model to stop"
        )


def _answering(rows: EncodedRows) -> Mask:
    """Which rows answer something; all, if all are text."""
    texts = rows.is_text
    return np.ones_like(texts) if texts.all() else ~texts


def _is_learned(token: int, rows: EncodedRows) -> bool:
    """Whether any row teaches the end of a turn: where everything is learned, in the middle of what is."""
    wanted = np.uint32(token) | LEARNED
    return any((rows.words(row) == wanted).any() for row in np.flatnonzero(_answering(rows)).tolist())


def _most_common(tokens: npt.NDArray[np.int32]) -> int | None:
    if not len(tokens):
        return None
    values, counts = np.unique(tokens, return_counts=True)
    return int(values[counts.argmax()])


def _words_after_an_answer(tokenizer: Any) -> str | None:
    """What the template writes between an answer and the end of its turn."""
    if not has_template(tokenizer):
        return None
    try:
        text, spans, _ = Renderer(tokenizer, today=datetime.date.today()).render(_PROBE, "a probe")[0]
    except DataError:  # it wants another kind of conversation
        return None
    answer = text[slice(*spans[-1])] if spans else ""
    said = _PROBE.messages[-1]["content"]
    return answer.partition(said)[2].strip() if said in answer else None
