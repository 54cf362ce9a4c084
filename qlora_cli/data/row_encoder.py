"""Rows of one source to tokens: read, rendered, tokenised and marked, some hundred at a time.

Only what the model has to produce is learned: in a chat the assistant's turns with their end-of-turn markers, in a
passage the completion and the end, in text everything. The mask follows character positions, never token values, so a
padding token that equals the end-of-turn token loses nothing.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from qlora_cli.data.chat import Rendered, Renderer
from qlora_cli.data.encoded import LEARNED, Indices, Ints, Mask, Words, summarise
from qlora_cli.data.files import BadRow
from qlora_cli.data.formats import Example, Format, read_row
from qlora_cli.data.markers import leading_bos, special_tokens
from qlora_cli.data.rendering import Span
from qlora_cli.data.sources import Source, SourceRow
from qlora_cli.errors import DataError, ModelError
from qlora_cli.recipe.schema import DatasetSection


class _Ends(NamedTuple):
    """Tokens that go around text without a chat template: bos if the tokenizer adds one, and eos."""

    bos: int | None
    eos: int | None


@dataclass(frozen=True)
class EncodedChunk:
    """What became of some rows: their tokens end to end, a record of each, and what was wrong with the others.

    `rows` of them were good; `unwritten_tools` of these have tools that the chat template does not write.
    """

    words: Words
    records: npt.NDArray[np.void]
    problems: list[str]
    rows: int
    unwritten_tools: int


class RowEncoder:
    """Encodes rows of one source. It can be sent to another process, and does not change the rows it is given."""

    def __init__(
        self, source: Source, format: Format, section: DatasetSection, tokenizer: Any, *, today: datetime.date
    ) -> None:
        self.format = format
        self.enders = np.array(sorted(_enders(tokenizer)), dtype=np.int32)
        self._files, self._unit = source.files, source.unit
        self._columns = dict(source.section.columns or {})
        self._renderer = Renderer(tokenizer, section.supervise, today=today)
        self._tokenizer, self._today = tokenizer, today
        self._ends = _find_ends(tokenizer)
        # Such a token takes the whitespace beside it, which may be an answer's own.
        added = tokenizer.added_tokens_decoder.items()
        self._greedy = np.array([i for i, token in added if token.lstrip or token.rstrip], dtype=np.int32)

    def encode(self, rows: list[SourceRow]) -> EncodedChunk:
        """Tokens and records of these rows, without those that are malformed."""
        rendered: list[Rendered] = []
        owners: list[SourceRow] = []
        problems = []
        good = unwritten = 0
        for row in rows:
            try:
                example = self._read(row)
                pieces = self._renderer.render(example, self._where(row))
            except DataError as error:
                problems.append(str(error))
                continue
            good += 1
            unwritten += self._renderer.leaves_out_tools(example)
            rendered += pieces
            owners += [row] * len(pieces)
        words, records = self._tokenise(rendered)
        records["file"] = [row.file for row in owners]
        records["number"] = [row.number for row in owners]
        return EncodedChunk(words, records, problems, good, unwritten)

    def described(self) -> dict[str, Any]:
        """What else decides what a row becomes: its layout, and the date where the template writes it."""
        dated = "strftime_now" in str(self._tokenizer.chat_template)
        return {"format": self.format, "columns": self._columns, "today": str(self._today) if dated else None}

    def _where(self, row: SourceRow) -> str:
        return f"{self._files[row.file]}, {self._unit} {row.number}"

    def _read(self, row: SourceRow) -> Example:
        if isinstance(row.row, BadRow):
            raise DataError(row.row.problem)
        return read_row(row.row, self.format, self._columns, where=self._where(row))

    def _tokenise(self, rendered: list[Rendered]) -> tuple[Words, npt.NDArray[np.void]]:
        # Not through the tokenizer's own call, which takes half as long again.
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self._tokenizer.split_special_tokens
        texts = [row.text for row in rendered]
        rows = []
        for row, tokens in zip(rendered, backend.encode_batch(texts, add_special_tokens=False), strict=True):
            ids = np.array(tokens.ids, dtype=np.int32)
            mask = _covered(self._offsets(ids, tokens.offsets, row.text), row.spans)
            if row.bare:
                ids, mask = _with_ends(ids, mask, self._ends)
            mask[:1] = False
            rows.append(np.where(mask, ids.astype(np.uint32) | LEARNED, ids.astype(np.uint32)))
        words: Words = np.concatenate([np.empty(0, dtype=np.uint32), *rows])
        lengths: Indices = np.array([len(row) for row in rows], dtype=np.int64)
        return words, summarise(words, lengths, self.enders)

    def _offsets(self, ids: Ints, given: list[tuple[int, int]], text: str) -> Indices:
        """The characters of each token, [tokens, 2]; of an added token only its own, without whitespace beside it."""
        offsets = np.array(given, dtype=np.int64).reshape(-1, 2)
        for token in np.flatnonzero(np.isin(ids, self._greedy)) if len(self._greedy) else ():
            start, end = offsets[token]
            taken = text[start:end]
            if taken.strip():
                offsets[token] = (end - len(taken.lstrip()), start + len(taken.rstrip()))
        return offsets


def _covered(offsets: Indices, spans: tuple[Span, ...]) -> Mask:
    """Which tokens have a character in one of `spans`.

    A token across a boundary counts: it carries the first characters of an answer, or its end-of-turn marker,
    and leaving it out would leave those unlearned.
    """
    start, end = offsets.T
    mask = np.zeros(len(start), dtype=np.bool_)
    for first, last in spans:
        mask |= (end > first) & (start < last)
    return mask


def _find_ends(tokenizer: Any) -> _Ends:
    return _Ends(leading_bos(tokenizer), tokenizer.eos_token_id)


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


def _enders(tokenizer: Any) -> set[int]:
    """Tokens that are made to end something: the special ones."""
    # One that was added to the vocabulary without being special may be meant so, too.
    return {*special_tokens(tokenizer), *tokenizer.get_added_vocab().values()}
