"""Encoded rows to look at: their numbers, and their text in stretches that are learned or not."""

from __future__ import annotations

import itertools

import numpy as np
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.encoded import IGNORED, EncodedRows
from qlora_cli.training.facts import Example, Piece


def first_examples(rows: EncodedRows, tokenizer: PreTrainedTokenizerBase, number: int) -> tuple[Example, ...]:
    """The first `number` rows, or all if there are fewer."""
    found = []
    for index in range(min(number, len(rows))):
        ids, learned = rows.read(index)
        labels = np.where(learned, ids, IGNORED)
        pieces = _pieces(ids.tolist(), learned.tolist(), tokenizer)
        row, where = int(rows.index["number"][index]), rows.where(index)
        found.append(Example(row, where, tuple(ids.tolist()), tuple(labels.tolist()), pieces))
    return tuple(found)


def _pieces(ids: list[int], supervised: list[bool], tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
    """The decoded row in stretches that are learned or not.

    Each stretch is what the row's text gains by it: decoded by itself it might lose a leading space, and half of a
    character would be shown as garbage. A character that two stretches share goes to the second.
    """
    whole = _decoded(ids, tokenizer)
    changes = (np.flatnonzero(np.diff(supervised)) + 1).tolist()
    pieces, shown = [], 0
    for end in (*changes, len(ids)):
        until = _shared(whole, _decoded(ids[:end], tokenizer))
        if until > shown:
            pieces.append(Piece(whole[shown:until], supervised[end - 1]))
            shown = until
    return tuple(pieces)


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def _shared(first: str, second: str) -> int:
    """How many characters two texts have in common before they differ."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in pairs)
