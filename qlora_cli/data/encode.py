"""Rows to token ids, and which of them are learned.

Only what the model has to produce is learned: in a chat every assistant turn with its end-of-turn marker, in
a passage the completion and the end, in text everything. The mask follows character positions, never token
values, so a padding token that equals the end-of-turn token loses nothing.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from qlora_cli.data.chat import Rendered, Renderer
from qlora_cli.data.encoded import EncodedRows, Ints, Mask
from qlora_cli.data.fitting import cut_rows, refusals
from qlora_cli.data.formats import (
    Example,
    Format,
    columns_used,
    read_row,
    resolve_format,
)
from qlora_cli.data.rendering import Span
from qlora_cli.data.sources import Rows
from qlora_cli.errors import DataError, ModelError
from qlora_cli.recipe.schema import DatasetSection

_BATCH_ROWS = 512


class _Ends(NamedTuple):
    """Tokens that go around text without a chat template: bos if the tokenizer adds one, and eos."""

    bos: int | None
    eos: int | None


def encode_rows(rows: Rows, section: DatasetSection, tokenizer: Any, *, vocab_size: int | None = None) -> EncodedRows:
    """Tokenise all rows, mark what is learned, and bring them to `max_length`.

    `vocab_size` is the number of embeddings the model has. Raises what `encode_whole` raises, and DataError for rows
    that are too long (see `overlong`), not in the model's vocabulary or without anything to learn.
    """
    whole = encode_whole(rows, section, tokenizer)
    kept = cut_rows(whole, section)
    for refusal in refusals(whole, kept, rows, section, vocab_size=vocab_size):
        raise DataError(refusal)
    return kept


def encode_whole(rows: Rows, section: DatasetSection, tokenizer: Any) -> EncodedRows:
    """Tokenise all rows as long as they are, and mark what is learned.

    With a chat template, special tokens are the template's business alone, as in transformers. Raises DataError for a
    row that is malformed, and for nothing else about rows; ModelError if the tokenizer cannot do this.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} does not say which characters a token covers, which is how the answers "
            f"are found. Use a base model with a fast tokenizer (a tokenizer.json)."
        )
    format = resolve_format(section, rows.column_names, rows.source)
    ends = _find_ends(tokenizer)
    renderer = Renderer(tokenizer, section.supervise, today=datetime.date.today())
    encoded: list[tuple[Ints, Mask]] = []
    sequences: list[int] = []  # that each row makes
    for examples in _read_examples(rows, format, section):
        rendered = [renderer.render(example, where) for where, example in examples]
        sequences += map(len, rendered)
        encoded += _tokenise(list(itertools.chain.from_iterable(rendered)), tokenizer, ends)
    return EncodedRows(
        ids=np.concatenate([ids for ids, _ in encoded]),
        supervised=np.concatenate([mask for _, mask in encoded]),
        offsets=np.cumsum([0, *(len(ids) for ids, _ in encoded)], dtype=np.int64),
        row_numbers=np.repeat(rows.numbers, sequences),
        format=format,
        source=rows.source,
        fingerprint=rows.fingerprint,
        unit=rows.unit,
    )


def check_shape(rows: Rows, section: DatasetSection) -> None:
    """Raise the DataError that a malformed row would, where there is no tokenizer to encode with."""
    for _ in _read_examples(rows, resolve_format(section, rows.column_names, rows.source), section):
        pass


def _read_examples(rows: Rows, format: Format, section: DatasetSection) -> Iterator[list[tuple[str, Example]]]:
    """What each row means, after what messages call the row, in batches."""
    columns = columns_used(format, section.columns, rows.column_names)
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = []
        for i, row in enumerate(rows.read(start, start + _BATCH_ROWS, columns), start):
            where = rows.where(i)
            batch.append((where, read_row(row, format, section.columns, where=where)))
        yield batch


def _tokenise(rendered: list[Rendered], tokenizer: Any, ends: _Ends) -> Iterator[tuple[Ints, Mask]]:
    tokens = tokenizer(
        [row.text for row in rendered],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # or it warns of every row longer than the model, which `overlong` decides
    )
    for row, input_ids, offsets in zip(rendered, tokens["input_ids"], tokens["offset_mapping"], strict=True):
        ids, mask = np.array(input_ids, dtype=np.int32), _covered(offsets, row.spans)
        if row.bare:
            ids, mask = _with_ends(ids, mask, ends)
        mask[:1] = False
        yield ids, mask


def _covered(offsets: list[tuple[int, int]], spans: Sequence[Span]) -> Mask:
    """Which tokens have a character in one of `spans`.

    A token across a boundary counts: it carries the first characters of an answer, or its end-of-turn marker,
    and leaving it out would leave those unlearned.
    """
    start, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(start), dtype=np.bool_)
    for first, last in spans:
        mask |= (end > first) & (start < last)
    return mask


def _find_ends(tokenizer: Any) -> _Ends:
    opened = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos = tokenizer.bos_token_id
    return _Ends(bos if bos is not None and opened[:1] == [bos] else None, tokenizer.eos_token_id)


def _with_ends(ids: Ints, mask: Mask, ends: _Ends) -> tuple[Ints, Mask]:
    """Put bos before and a supervised eos after, except where the text itself brings them."""
    if ends.eos is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token, so a model trained on plain text could not learn to stop."
        )
    if ends.bos is not None and (len(ids) == 0 or ids[0] != ends.bos):
        ids, mask = np.insert(ids, 0, ends.bos), np.insert(mask, 0, False)
    if len(ids) == 0 or ids[-1] != ends.eos:
        ids, mask = np.append(ids, np.int32(ends.eos)), np.append(mask, True)
    return ids, mask
