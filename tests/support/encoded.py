"""Rows given as they are, through the whole of encoding."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_cli.data.encode import encode_source, find_format
from qlora_cli.data.encoded import LEARNED, EncodedRows, Part, Words, summarise
from qlora_cli.data.files import BadRow
from qlora_cli.data.fitting import Fitted, cut_rows, refusals
from qlora_cli.data.sources import Source, SourceRow
from qlora_cli.errors import DataError
from qlora_cli.recipe.schema import DatasetSection
from qlora_cli.training.preparation import encode_all, lay_out

DAY = datetime.date(2026, 1, 2)


def source_of(*rows: Mapping[str, Any] | BadRow, name: str = "rows.jsonl", unit: str = "line", **fields: Any) -> Source:
    """A source of these rows, which is kept nowhere; the rows are numbered from 1."""
    section = DatasetSection(train=name, **fields).train_sources[0]

    def read(advanced: Callable[[int], None]) -> Generator[SourceRow, None, None]:
        for number, row in enumerate(rows, 1):
            yield SourceRow(0, number, row if isinstance(row, BadRow) else dict(row))

    return Source(section, name, (name,), unit, None, read, lambda: None)


def encode_whole(tokenizer: Any, *rows: Mapping[str, Any] | BadRow, unit: str = "line", **fields: Any) -> EncodedRows:
    """The rows as long as they are; `fields` are those of the recipe's dataset."""
    section = DatasetSection(train="rows.jsonl", **fields)
    source = source_of(*rows, unit=unit, **fields)
    return encode_source(source, find_format(source, section), section, tokenizer, today=DAY)


def fit(tokenizer: Any, *rows: Mapping[str, Any] | BadRow, unit: str = "line", **fields: Any) -> Fitted:
    """The rows before and after `max_length` is applied."""
    return cut_rows(encode_whole(tokenizer, *rows, unit=unit, **fields), DatasetSection(train="rows.jsonl", **fields))


def encode(
    tokenizer: Any, *rows: Mapping[str, Any] | BadRow, vocab_size: int | None = None, unit: str = "line", **fields: Any
) -> EncodedRows:
    """The rows as training sees them. Raises the DataError for which it would refuse them."""
    fitted = fit(tokenizer, *rows, unit=unit, **fields)
    for refusal in refusals(fitted, DatasetSection(train="rows.jsonl", **fields), vocab_size=vocab_size):
        raise DataError(refusal)
    return fitted.kept


def encode_training_rows(section: DatasetSection, tokenizer: Any) -> EncodedRows:
    """The training rows of a recipe as training sees them."""
    return cut_rows(
        encode_all(lay_out("dataset.train", section.train_sources, section), section, tokenizer, today=DAY), section
    ).kept


def rows_of_tokens(*rows: tuple[list[int], list[bool]], number: int = 1) -> EncodedRows:
    """Rows of these ids, and which of them are learned, numbered from `number`."""
    words = np.array([i | int(LEARNED) * m for ids, mask in rows for i, m in zip(ids, mask, strict=True)], np.uint32)
    index = summarise(words, np.array([len(ids) for ids, _ in rows]), np.array([], dtype=np.int32))
    index["number"] = range(number, number + len(rows))
    part_of = np.zeros(len(rows), dtype=np.uint16)
    part = Part("rows.jsonl", ("rows.jsonl",), "line", "text")
    return EncodedRows(index, part_of, (part,), (_Held(words),), np.array([], dtype=np.int32), "f" * 64)


@dataclass(frozen=True)
class _Held:
    words: Words

    def read(self, start: int, count: int) -> Words:
        return self.words[start : start + count]
