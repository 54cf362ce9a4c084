"""The rows of a source to token ids, and which of them are learned.

All rows are encoded once, in as many processes as there are cores, and kept on disk for the next time.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qlora_cli.data.cache import cached
from qlora_cli.data.encoded import EncodedRows, Part
from qlora_cli.data.files import BadRow
from qlora_cli.data.formats import Format, read_row, resolve_format
from qlora_cli.data.row_encoder import RowEncoder
from qlora_cli.data.sources import Source, SourceRow
from qlora_cli.data.store import StoredFacts, StoreWriter, read_store
from qlora_cli.data.workers import cores, map_in_order
from qlora_cli.errors import DataError, ModelError
from qlora_cli.recipe.schema import DatasetSection

# Raised by one whenever the same rows would be encoded otherwise than before.
_ENCODING = 2

_CHUNK_ROWS = 512
_CHUNK_CHARACTERS = 1_000_000
_LOOKED_AT = 1000  # rows whose columns tell the format
_NAMED_PROBLEMS = 5


class Progress(NamedTuple):
    """How far encoding has come: rows so far, and the share of the source from 0 to 1, None if that is not known."""

    source: str
    rows: int
    share: float | None


Report = Callable[[Progress], None]


def find_format(source: Source, section: DatasetSection) -> Format:
    """How the rows of a source are laid out: as its recipe says, or as the columns of its first rows do.

    Raises DataError if they fit no format or several, or if there are no rows.
    """
    columns: dict[str, None] = {}
    problem, good = None, 0
    with closing(source.read()) as rows:
        for number, (_, _, row) in enumerate(rows, start=1):
            if isinstance(row, BadRow):
                problem = problem or row.problem
            else:
                good += 1
                columns.update(dict.fromkeys(row))
            # Where a bad row ends it all, a good one is looked for only to know whether there is any.
            if (number if section.on_bad_row == "error" else good) == _LOOKED_AT:
                break
    if not good:
        raise DataError(problem or f"{source.name}: there are no rows.")
    fields = source.section
    return resolve_format(fields.format or "auto", fields.columns or {}, list(columns), source.name)


def encode_source(
    source: Source,
    format: Format,
    section: DatasetSection,
    tokenizer: Any,
    *,
    today: datetime.date,
    report: Report = lambda _: None,
) -> EncodedRows:
    """Tokenise the rows of a source as long as they are, and mark what is learned; or find it done already.

    With a chat template, special tokens are the template's business alone, as in transformers. `today` is the date for
    templates that write it.

    Raises:
        DataError: for a row that is malformed, unless the recipe has such rows skipped, and for nothing else about
            rows.
        ModelError: if the tokenizer cannot do this.
        OutputError: if there is no room to keep what is made.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} does not say which characters a token covers, which is how the answers "
            f"are found. Use a base model with a fast tokenizer (a tokenizer.json)."
        )
    encoder = RowEncoder(source, format, section, tokenizer, today=today)

    def build(folder: Path) -> None:
        with StoreWriter(folder) as writer:
            writer.finish(_write(source, encoder, section, writer, report))

    key = None if source.fingerprint is None else _key(source.fingerprint, encoder, section, tokenizer)
    facts, tokens, index = cached(key, build, read_store)
    return EncodedRows(
        index=index,
        part_of=np.zeros(len(index), dtype=np.uint16),
        parts=(Part(source.name, source.files, source.unit, format, source.section.weight),),
        tokens_of=(tokens,),
        enders=np.array(facts.enders, dtype=np.int32),
        fingerprint=facts.fingerprint,
        skipped=facts.skipped,
        unwritten_tools=facts.unwritten_tools,
        problems=tuple(_renamed(problem, facts.files, source.files) for problem in facts.problems),
    )


def _renamed(problem: str, before: Iterable[str], now: Iterable[str]) -> str:
    """The problem with its file called what it is called now; what was kept may be older than a folder's name."""
    for old, new in zip(before, now, strict=True):
        if problem.startswith(f"{old},"):
            return new + problem.removeprefix(old)
    return problem


def check_shape(source: Source, section: DatasetSection) -> None:
    """Raise the DataError that a malformed row would, where there is no tokenizer to encode with."""
    format = find_format(source, section)
    for row in source.read():
        problem = _problem_of(source, row, format)
        if problem and section.on_bad_row == "error":
            raise DataError(problem)


def _problem_of(source: Source, row: SourceRow, format: Format) -> str | None:
    if isinstance(row.row, BadRow):
        return row.row.problem
    try:
        read_row(row.row, format, source.section.columns or {}, where=source.where(row))
    except DataError as error:
        return str(error)
    return None


def _write(
    source: Source, encoder: RowEncoder, section: DatasetSection, writer: StoreWriter, report: Report
) -> StoredFacts:
    """Encode every row into the store; what is known of them as a whole."""
    read = 0

    def advanced(by: int) -> None:
        nonlocal read
        read += by

    facts = StoredFacts(encoder.format, encoder.enders.tolist(), files=list(source.files))
    rows = 0
    # Of processes that train together one makes what is kept, and the others wait for it.
    processes = cores(shared=source.fingerprint is None)
    chunks = map_in_order(encoder.encode, _chunks(source.read(advanced)), processes=processes)
    with closing(chunks):
        for chunk in chunks:
            writer.append(chunk.words, chunk.records)
            rows += chunk.rows
            facts.unwritten_tools += chunk.unwritten_tools
            facts.skipped += len(chunk.problems)
            facts.problems += chunk.problems[: _NAMED_PROBLEMS - len(facts.problems)]
            if facts.skipped and section.on_bad_row == "error":
                raise DataError(_refusal(facts, rows, at_least="at least "))
            report(Progress(source.name, rows, read / source.size if source.size else None))
    if not rows:
        raise DataError(_refusal(facts, rows) if facts.problems else f"{source.name}: there are no rows.")
    return facts


def _refusal(facts: StoredFacts, good: int, *, at_least: str = "") -> str:
    """What is wrong with the first bad rows; and, if others were good, how to go on without them.

    `at_least` goes before the number of the others where the rows after them were not read.
    """
    text = "\n".join(facts.problems)
    if facts.skipped > len(facts.problems):
        text += f"\n… and {at_least}{facts.skipped - len(facts.problems):,} more."
    if good:
        text += "\nMend the data, or set dataset.on_bad_row: skip to leave such rows out."
    return text


def _chunks(rows: Iterable[SourceRow]) -> Iterator[list[SourceRow]]:
    """Rows in groups of some hundred, fewer if they are long: a group is what one process holds at a time."""
    chunk: list[SourceRow] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += 0 if isinstance(row.row, BadRow) else _characters(row.row)
        if len(chunk) == _CHUNK_ROWS or characters > _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _characters(value: Any) -> int:
    """Of all text in a row, roughly."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 1


def _key(fingerprint: str, encoder: RowEncoder, section: DatasetSection, tokenizer: Any) -> str:
    """Of everything that what is made depends on."""
    template = str(tokenizer.chat_template or "")
    facts = {
        "encoding": _ENCODING,
        "versions": [version(package) for package in ("qlora-cli", "tokenizers", "transformers", "jinja2")],
        "source": fingerprint,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": [tokenizer.special_tokens_map, tokenizer.split_special_tokens, encoder.enders.tolist()],
        "template": template,
        "rows": encoder.described(),
        "supervise": section.supervise,
        "on_bad_row": section.on_bad_row,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
