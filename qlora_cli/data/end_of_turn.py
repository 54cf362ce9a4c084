"""Whether the rows teach the model to stop: which token ends what the assistant says, and where it is learned."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_cli.data.chat import Renderer, has_template
from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.formats import Conversation
from qlora_cli.errors import DataError

# What a template is looked at with where no row shows how it ends a turn.
_PROBE = Conversation(({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "World"}))


@dataclass(frozen=True)
class EndOfTurn:
    """How an answer ends.

    `token` is the id of the token that ends it and `text` what that token reads; `rows` counts the rows, as training
    sees them, whose last supervised token it is, and `turns` all answers in them that end in it. Without such
    a token, `token` is None and `text` is what the chat template writes after an answer in plain words: empty if it
    writes nothing, None if it cannot be told.
    """

    token: int | None
    text: str | None
    rows: int = 0
    turns: int = 0


def find_end_of_turn(whole: EncodedRows, kept: EncodedRows, tokenizer: Any) -> EndOfTurn:
    """The end of the answers in these rows, before (`whole`) and after (`kept`) `max_length` is applied.

    It is read off the supervised tokens themselves, one turn's last after the other's, not off the template's text:
    what counts is what is learned.
    """
    ends = whole.ids[_turn_ends(whole)]
    token = _most_common(ends[np.isin(ends, _special(tokenizer))])
    if token is None:
        # A token that was added to the vocabulary without being special is one too, if nothing else ends a turn.
        token = _most_common(ends)
        if token not in tokenizer.get_added_vocab().values() or np.mean(ends == token) <= 0.5:
            return EndOfTurn(None, _words_after_an_answer(tokenizer))
    rows, turns = _last_learned(kept) == token, kept.ids[_turn_ends(kept)] == token
    return EndOfTurn(token, tokenizer.convert_ids_to_tokens(token), int(rows.sum()), int(turns.sum()))


def missing_end(end: EndOfTurn, kept: EncodedRows, max_length: int) -> Iterable[str]:
    """What is wrong with rows of which none teaches the model to stop."""
    if end.token is None and end.text == "" and kept.supervised.any():
        yield (
            f"{kept.source}: the chat template puts nothing after an answer, so that no row teaches the model to stop. "
            f"Use a base model whose chat template ends a turn with a token, or add {{{{ eos_token }}}} after the "
            f"assistant's content in the template."
        )
    # Text may go on for ever; an answer has to end.
    if end.token is not None and not end.turns and len(kept) and kept.format != "text":
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
    if end.token is not None and end.turns and end.rows < len(kept) and not kept.truncated:
        yield (
            f"the end of turn ({end.text}) is learned at the end of {end.rows:,} of {len(kept):,} rows: after the "
            f"others the model does not learn to stop"
        )
    if end.token is not None and not end.turns and len(kept) and kept.format == "text":
        yield (
            f"every row is cut before its end ({end.text}) at dataset.max_length ({max_length}): no row teaches the "
            f"model to stop"
        )


def _special(tokenizer: Any) -> list[int]:
    """Special tokens, without the one that stands for what is not in the vocabulary."""
    return [t for t in tokenizer.all_special_ids if t == tokenizer.eos_token_id or t != tokenizer.unk_token_id]


def _turn_ends(rows: EncodedRows) -> npt.NDArray[np.bool_]:
    """The last token of every unbroken stretch of supervised tokens; a stretch does not reach into the next row."""
    goes_on = np.append(rows.supervised[1:], False)
    goes_on[rows.offsets[1:][rows.lengths > 0] - 1] = False
    ends: npt.NDArray[np.bool_] = rows.supervised & ~goes_on
    return ends


def _last_learned(rows: EncodedRows) -> npt.NDArray[np.int32]:
    """The last supervised token of every row that has one."""
    before = np.cumsum(rows.learned)
    learned: npt.NDArray[np.int32] = rows.ids[rows.supervised]
    return learned[before[rows.learned > 0] - 1]


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
