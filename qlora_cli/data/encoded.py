"""Rows as token ids, and which of them are learned: what encoding makes, and batches are cut from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from qlora_cli.data.formats import Format

IGNORED = -100  # the label of a token without loss, as in torch and transformers
NAMED_ROWS = 5  # that are told by number, of those that have something in common

# A token as it is kept: its id, and in the highest bit whether it is learned.
LEARNED = np.uint32(1 << 31)

# What is kept in memory of a row. `last` is its last learned token, or the end of turn right before that, `stretches`
# how often learning begins, `turns` how often it ends in a token made for that, `highest` the largest id, `answer` a
# digest of what is learned.
ROW = np.dtype(
    [
        ("start", "<i8"),
        ("number", "<i8"),
        ("answer", "<u8"),
        ("file", "<u4"),
        ("length", "<i4"),
        ("learned", "<i4"),
        ("last", "<i4"),
        ("turns", "<i4"),
        ("stretches", "<i4"),
        ("highest", "<i4"),
    ]
)

Ints = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint32]
Indices = npt.NDArray[np.int64]


class Part(NamedTuple):
    """One source of rows: what messages call it, its files (one entry if it is none), what is counted in them, how
    its rows are laid out, and how often they are seen in an epoch."""

    source: str
    files: tuple[str, ...]
    unit: str
    format: Format
    weight: float = 1.0


class Tokens(Protocol):
    """Where the tokens of a source are kept."""

    def read(self, start: int, count: int) -> Words:
        """Tokens [start, start + count), uint32."""


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """The rows of one split: a few numbers of each in memory, and where their tokens are.

    `index` has a record (see ROW) per row and `part_of` (uint16) the number of the part it is from. A row's first
    token is never learned: nothing comes before it to predict it. `enders` are the ids of the tokens that can end a
    turn. `fingerprint` is of tokens and what is learned of them, before anything is cut. A row that became
    several sequences under the chat template is here as often. Of `unwritten_tools` rows that template leaves out the
    tools; `skipped` could not be read, and `problems` says why of the first of them.
    """

    index: npt.NDArray[np.void]
    part_of: npt.NDArray[np.uint16]
    parts: tuple[Part, ...]
    tokens_of: tuple[Tokens, ...]
    enders: Ints
    fingerprint: str
    dropped: int = 0
    truncated: int = 0
    skipped: int = 0
    unwritten_tools: int = 0
    problems: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def lengths(self) -> Indices:
        """Tokens per row, int64."""
        return self.index["length"].astype(np.int64)

    @property
    def learned(self) -> Indices:
        """Supervised tokens per row, int64."""
        return self.index["learned"].astype(np.int64)

    @property
    def row_numbers(self) -> Indices:
        """What each row is called in its file, int64: its line in .jsonl, else its row, from 1."""
        return self.index["number"].astype(np.int64)

    @property
    def tokens(self) -> int:
        """Tokens in all rows."""
        return int(self.lengths.sum())

    @property
    def supervised_tokens(self) -> int:
        """Tokens with a loss, in all rows."""
        return int(self.index["learned"].sum(dtype=np.int64))

    @property
    def rows(self) -> int:
        """How many rows of the files these are."""
        return int(self.ordinals[-1]) + 1 if len(self) else 0

    @property
    def split(self) -> int:
        """How many rows became several sequences."""
        return int((np.bincount(self.ordinals) > 1).sum())

    @property
    def source(self) -> str:
        """What messages call all of it."""
        return ", ".join(part.source for part in self.parts)

    @property
    def format(self) -> str:
        """How the rows are laid out; several ways where there are several sources."""
        return ", ".join(dict.fromkeys(part.format for part in self.parts))

    @property
    def is_text(self) -> Mask:
        """Which rows are text to learn from end to end, without prompt and answer."""
        mask: Mask = np.array([part.format == "text" for part in self.parts])[self.part_of]
        return mask

    def words(self, row: int, limit: int | None = None) -> Words:
        """The first `limit` tokens of a row as they are kept, uint32: ids, with the bit LEARNED set where learned."""
        record = self.index[row]
        length = int(record["length"])
        count = length if limit is None else min(limit, length)
        tokens: Tokens = self.tokens_of[self.part_of[row]]
        return tokens.read(int(record["start"]), count)

    def read(self, row: int) -> tuple[Indices, Mask]:
        """Token ids of a row, int64 [length], and which of them are learned."""
        words = self.words(row)
        return ids_of(words).astype(np.int64), (words & LEARNED) != 0

    def input_ids(self, row: int) -> Indices:
        """Token ids of a row, int64 [length]."""
        return self.read(row)[0]

    def labels(self, row: int) -> Indices:
        """Token ids of a row where they are supervised, else -100; int64 [length], unshifted."""
        ids, learned = self.read(row)
        return np.where(learned, ids, IGNORED)

    def where(self, row: int) -> str:
        """What a message calls a row: its file and number."""
        part, record = self.parts[self.part_of[row]], self.index[row]
        return f"{part.files[record['file']]}, {part.unit} {record['number']}"

    def named(self, rows: Indices, limit: int = NAMED_ROWS) -> str:
        """The numbers of the first few of these rows, with their files if there are several: `line 3, 5, …`."""
        rows = self.distinct(rows)
        single = len(self.parts) == 1 and len(self.parts[0].files) == 1
        groups: dict[str, list[str]] = {}
        for row in rows[:limit].tolist():
            part, record = self.parts[self.part_of[row]], self.index[row]
            label = part.unit if single else f"{part.files[record['file']]} {part.unit}"
            groups.setdefault(label, []).append(str(record["number"]))
        more = ", …" if len(rows) > limit else ""
        return "; ".join(f"{label} {', '.join(numbers)}" for label, numbers in groups.items()) + more

    def counted(self, rows: Indices) -> str:
        """How many rows, and the numbers of the first of them."""
        number = self.count(rows)
        return f"{number:,} row{'s' * (number != 1)} ({self.named(rows)})"

    def count(self, rows: Indices) -> int:
        """How many rows of the files these are: one that became several sequences counts once."""
        return len(self.distinct(rows))

    def distinct(self, rows: Indices) -> Indices:
        """These rows without the further sequences of one that became several."""
        found: Indices = rows[np.unique(self.ordinals[rows], return_index=True)[1]]
        return found

    @cached_property
    def ordinals(self) -> Indices:
        """Numbers from 0 that are equal where sequences come from the same row, int64."""
        same = self.part_of[1:] == self.part_of[:-1]
        for name in ("file", "number"):
            same &= self.index[name][1:] == self.index[name][:-1]
        return np.concatenate([[0], np.cumsum(~same)]).astype(np.int64) if len(self) else np.empty(0, np.int64)

    def select(self, rows: npt.NDArray[np.int64] | Mask) -> EncodedRows:
        """These rows alone."""
        return replace(self, index=self.index[rows], part_of=self.part_of[rows])


def concatenate(splits: Sequence[EncodedRows]) -> EncodedRows:
    """The rows of several sources, one after another."""
    if len(splits) == 1:
        return splits[0]
    offsets = np.cumsum([0, *(len(rows.parts) for rows in splits)])
    pairs = zip(splits, offsets, strict=False)
    return EncodedRows(
        index=np.concatenate([rows.index for rows in splits]),
        part_of=np.concatenate([(rows.part_of + offset).astype(np.uint16) for rows, offset in pairs]),
        parts=tuple(part for rows in splits for part in rows.parts),
        tokens_of=tuple(tokens for rows in splits for tokens in rows.tokens_of),
        enders=splits[0].enders,
        fingerprint=digest(rows.fingerprint for rows in splits),
        skipped=sum(rows.skipped for rows in splits),
        unwritten_tools=sum(rows.unwritten_tools for rows in splits),
        problems=tuple(problem for rows in splits for problem in rows.problems),
    )


def digest(texts: Iterable[str]) -> str:
    """One fingerprint of several."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def ids_of(words: Words) -> Words:
    """Token ids, without the bit of what is learned."""
    ids: Words = words & ~LEARNED
    return ids


def summarise(words: Words, lengths: Indices, enders: Ints) -> npt.NDArray[np.void]:
    """The records of rows that lie end to end in `words`; where they come from is left open."""
    rows = np.zeros(len(lengths), dtype=ROW)
    ends = np.cumsum(lengths)
    rows["start"], rows["length"] = ends - lengths, lengths
    filled = lengths > 0  # an empty stretch would be given the token after it
    if not filled.any():
        return rows
    ids, mask = ids_of(words), (words & LEARNED) != 0
    first = rows["start"][filled]
    rows["highest"][filled] = np.maximum.reduceat(ids, first)
    rows["learned"][filled] = np.add.reduceat(mask, first, dtype=np.int32)
    goes_on = np.append(mask[1:], False)
    goes_on[ends[filled] - 1] = False
    rows["stretches"][filled] = np.add.reduceat(mask & ~goes_on, first, dtype=np.int32)
    # Or in the token before it: of a conversation that is learned whole, the last is often a newline.
    ender = np.isin(ids, enders) & mask
    before = np.append(False, ender[:-1]) & mask
    rows["turns"][filled] = np.add.reduceat((ender | before) & ~goes_on, first, dtype=np.int32)
    said, upto = ids[mask], np.cumsum(rows["learned"])
    some = rows["learned"] > 0
    last = upto[some] - 1
    rows["last"][some] = said[last - (before & ~ender)[mask][last]]
    for row, (end, count) in enumerate(zip(upto, rows["learned"], strict=True)):
        rows["answer"][row] = int.from_bytes(hashlib.blake2b(said[end - count : end].tobytes(), digest_size=8).digest())
    return rows
