"""Rows to token ids, and which of them are learned.

Only what the model has to produce is learned: in a chat every assistant turn with its end-of-turn marker, in
a passage the completion and the end, in text everything. The mask follows character positions, never token
values, so a padding token that equals the end-of-turn token loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qlora_cli.data.chat import Span, conversation_of, has_template, render
from qlora_cli.data.formats import (
    Example,
    Format,
    Passage,
    Text,
    columns_used,
    read_row,
    resolve_format,
)
from qlora_cli.data.sources import Rows
from qlora_cli.errors import DataError, ModelError
from qlora_cli.recipe.schema import DatasetSection

IGNORED = -100  # the label of a token without loss, as in torch and transformers

_BATCH_ROWS = 512
_NAMED_ROWS = 5

Ints = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """Token ids of all rows, end to end, and the mask of those that are learned.

    `ids` (int32) and `supervised` (bool) hold row i at [offsets[i], offsets[i + 1]); `offsets` and `row_numbers` are
    int64. `unit` is what a row number counts: lines of a single .jsonl file, else rows. A row's first token is never
    supervised: nothing comes before it to predict it.
    """

    ids: Ints
    supervised: Mask
    offsets: npt.NDArray[np.int64]
    row_numbers: npt.NDArray[np.int64]
    format: Format
    source: str
    fingerprint: str
    unit: str = "row"
    dropped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.row_numbers)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per row, int64."""
        return np.diff(self.offsets)

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return int(self.offsets[-1])

    @property
    def supervised_tokens(self) -> int:
        """Tokens with a loss, in all rows."""
        return int(self.supervised.sum())

    @property
    def silent_rows(self) -> npt.NDArray[np.int64]:
        """Original numbers of the rows with one token to learn: the end of an empty answer."""
        learned = np.add.reduceat(self.supervised.astype(np.int64), self.offsets[:-1])
        silent: npt.NDArray[np.int64] = self.row_numbers[learned == 1]
        return silent

    def input_ids(self, index: int) -> npt.NDArray[np.int64]:
        """Token ids of a row, int64 [length]."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)

    def labels(self, index: int) -> npt.NDArray[np.int64]:
        """Token ids of a row where they are supervised, else -100; int64 [length], unshifted."""
        mask = self.supervised[self.offsets[index] : self.offsets[index + 1]]
        return np.where(mask, self.input_ids(index), IGNORED)


class _Rendered(NamedTuple):
    """The text of a row, the characters to learn, and whether bos and eos go around it."""

    text: str
    spans: list[Span]
    bare: bool


class _Ends(NamedTuple):
    """Tokens that go around text without a chat template: bos if the tokenizer adds one, and eos."""

    bos: int | None
    eos: int | None


class _Encoded(NamedTuple):
    ids: Ints
    supervised: Mask
    number: int


def encode_rows(rows: Rows, section: DatasetSection, tokenizer: Any, *, vocab_size: int | None = None) -> EncodedRows:
    """Tokenise all rows, and mark what is learned.

    With a chat template, special tokens are the template's business alone, as in transformers. `vocab_size` is
    the number of embeddings the model has. Raises DataError for rows that are malformed, too long (see
    `overlong`), not in the model's vocabulary or without anything to learn; ModelError if the tokenizer cannot
    do this.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} does not say which characters a token covers, which is how the answers "
            f"are found. Use a base model with a fast tokenizer (a tokenizer.json)."
        )
    format = resolve_format(section, rows.column_names, rows.source)
    encoded = list(_encode(rows, format, section, tokenizer))
    if vocab_size is not None:
        _check_vocabulary(encoded, vocab_size, rows)
    total = len(encoded)
    encoded, truncated = _fit(encoded, section, rows)
    _check_supervised(encoded, rows)
    return EncodedRows(
        ids=np.concatenate([row.ids for row in encoded]),
        supervised=np.concatenate([row.supervised for row in encoded]),
        offsets=np.cumsum([0, *(len(row.ids) for row in encoded)], dtype=np.int64),
        row_numbers=np.array([row.number for row in encoded], dtype=np.int64),
        format=format,
        source=rows.source,
        fingerprint=rows.fingerprint,
        unit=rows.unit,
        dropped=total - len(encoded),
        truncated=truncated,
    )


def _encode(rows: Rows, format: Format, section: DatasetSection, tokenizer: Any) -> Iterator[_Encoded]:
    columns = columns_used(format, section.columns, rows.column_names)
    ends = _find_ends(tokenizer)
    for start in range(0, len(rows), _BATCH_ROWS):
        rendered = []
        for i, row in enumerate(rows.read(start, start + _BATCH_ROWS, columns), start):
            where = rows.where(i)
            rendered.append(_render(read_row(row, format, section.columns, where=where), tokenizer, where))
        for i, (ids, mask) in enumerate(_tokenise(rendered, tokenizer, ends), start):
            yield _Encoded(ids, mask, int(rows.numbers[i]))


def _tokenise(rendered: list[_Rendered], tokenizer: Any, ends: _Ends) -> Iterator[tuple[Ints, Mask]]:
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


def _render(example: Example, tokenizer: Any, where: str) -> _Rendered:
    if isinstance(example, Text):
        return _Rendered(example.text, [(0, len(example.text))], bare=True)
    if has_template(tokenizer):
        text, spans = render(conversation_of(example), tokenizer, where)
        return _Rendered(text, spans, bare=False)
    if isinstance(example, Passage):
        text = example.bare_prompt + example.completion
        return _Rendered(text, [(len(example.bare_prompt), len(text))], bare=True)
    raise DataError(
        f"{where}: the format messages needs a chat template, and the tokenizer has none. "
        f"Use an instruction-tuned base model, or the format prompt_completion or text."
    )


def _covered(offsets: list[tuple[int, int]], spans: list[Span]) -> Mask:
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


def _fit(encoded: list[_Encoded], section: DatasetSection, rows: Rows) -> tuple[list[_Encoded], int]:
    """The rows that go on under the recipe's `overlong`, and how many of them were cut."""
    limit = section.max_length
    overlong = [row for row in encoded if len(row.ids) > limit]
    if not overlong:
        return encoded, 0
    if section.overlong == "error":
        longest = max(overlong, key=lambda row: len(row.ids))
        raise DataError(
            f"{rows.source}: {len(overlong)} of {len(encoded)} rows are longer than dataset.max_length ({limit} "
            f"tokens). The longest has {len(longest.ids)} tokens: {rows.locate(longest.number)}. "
            f"Raise dataset.max_length, or set dataset.overlong to drop or truncate."
        )
    if section.overlong == "drop":
        kept = [row for row in encoded if len(row.ids) <= limit]
        if not kept:
            raise DataError(
                f"{rows.source}: all {len(encoded)} rows are longer than dataset.max_length ({limit} tokens), "
                f"so dataset.overlong: drop leaves none. Raise dataset.max_length."
            )
        return kept, 0
    emptied = [r for r in overlong if r.supervised.any() and not r.supervised[:limit].any()]
    if emptied:
        raise DataError(
            f"{rows.source}: cut at dataset.max_length ({limit} tokens), {_counted(emptied, rows)} would keep "
            f"nothing to learn. Raise dataset.max_length, or set dataset.overlong to drop."
        )
    return [_Encoded(r.ids[:limit], r.supervised[:limit], r.number) for r in encoded], len(overlong)


def _check_supervised(encoded: list[_Encoded], rows: Rows) -> None:
    empty = [row for row in encoded if not row.supervised.any()]
    if empty:
        verb = "has" if len(empty) == 1 else "have"
        raise DataError(f"{rows.source}: {_counted(empty, rows)} {verb} nothing to learn: no token has a loss.")


def _check_vocabulary(encoded: list[_Encoded], vocab_size: int, rows: Rows) -> None:
    for row in encoded:
        if len(row.ids) and row.ids.max() >= vocab_size:
            raise DataError(
                f"{rows.locate(row.number)}: the tokenizer gives the token {row.ids.max()}, but the model has only "
                f"{vocab_size} embeddings. The tokenizer does not belong to this model."
            )


def _counted(some: list[_Encoded], rows: Rows) -> str:
    """How many rows, and the numbers of the first of them."""
    numbers = ", ".join(str(row.number) for row in some[:_NAMED_ROWS]) + (", …" if len(some) > _NAMED_ROWS else "")
    return f"{len(some)} row{'s' * (len(some) > 1)} ({rows.unit} {numbers})"
