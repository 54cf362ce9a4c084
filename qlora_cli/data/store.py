"""Encoded rows on disk: written from beginning to end, read a row at a time.

A folder holds `tokens.bin` (uint32, little-endian, rows end to end), `rows.bin` (records, see `encoded.ROW`) and
`facts.json`. Tokens are read with plain reads and not mapped, so that memory does not grow with what was read.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qlora_cli.data.encoded import ROW, Words

_TOKENS, _ROWS, _FACTS = "tokens.bin", "rows.bin", "facts.json"
_WORD = np.dtype("<u4")


@dataclass
class StoredFacts:
    """What is known of stored rows as a whole.

    `format` is how they are laid out, `enders` the ids of tokens that can end a turn, `fingerprint` of tokens and
    mask; of `unwritten_tools` rows the chat template leaves out the tools; `skipped` could not be read, the first of
    them for `problems`; `files` is what their files were called then.
    """

    format: str
    enders: list[int]
    fingerprint: str = ""
    unwritten_tools: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


class StoreWriter:
    """Writes one store; without a call of `finish` there is none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokens: BinaryIO = (folder / _TOKENS).open("wb")
        self._rows: BinaryIO = (folder / _ROWS).open("wb")
        self._written = 0
        self._count = 0
        self._digests = hashlib.sha256(), hashlib.sha256()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._tokens.close()
        self._rows.close()

    def append(self, words: Words, records: npt.NDArray[np.void]) -> None:
        """Add rows that lie end to end in `words`, their `start` counted from there."""
        records = records.copy()
        records["start"] += self._written
        self._written += len(words)
        data = words.astype(_WORD, copy=False).tobytes()
        self._count += len(records)
        # Lengths too: where one row ends and the next begins is part of what is learned. By themselves, or it would
        # matter how the rows came in groups.
        lengths, tokens = self._digests
        lengths.update(records["length"].tobytes())
        tokens.update(data)
        self._tokens.write(data)
        self._rows.write(records.tobytes())

    def finish(self, facts: StoredFacts) -> None:
        """Complete the store, on disk before it is said to be there."""
        for file in (self._tokens, self._rows):
            file.flush()
            os.fsync(file.fileno())
        facts.fingerprint = hashlib.sha256(b"".join(digest.digest() for digest in self._digests)).hexdigest()
        document = {**asdict(facts), "tokens": self._written, "rows": self._count}
        with (self._folder / _FACTS).open("w", encoding="utf-8") as text:
            json.dump(document, text)
            text.flush()
            os.fsync(text.fileno())


class StoredTokens:
    """The tokens of a store, open for as long as they are wanted: they can be read even if the folder is deleted."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def read(self, start: int, count: int) -> Words:
        """Tokens [start, start + count), uint32. Raises OSError if they are not there any more."""
        wanted, data = count * _WORD.itemsize, b""
        self._file.seek(start * _WORD.itemsize)
        while len(data) < wanted:
            piece = self._file.read(wanted - len(data))
            if not piece:
                raise OSError(f"{self._file.name}: expected {wanted} bytes, got {len(data)}")
            data += piece
        return np.frombuffer(data, dtype=_WORD).astype(np.uint32, copy=False)


def read_store(folder: Path) -> tuple[StoredFacts, StoredTokens, npt.NDArray[np.void]] | None:
    """What `folder` holds, or None if that is no whole store."""
    try:
        document: dict[str, Any] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        sizes = {_TOKENS: document.pop("tokens") * _WORD.itemsize, _ROWS: document.pop("rows") * ROW.itemsize}
        if any((folder / name).stat().st_size != size for name, size in sizes.items()):
            return None
        return StoredFacts(**document), StoredTokens(folder / _TOKENS), np.fromfile(folder / _ROWS, dtype=ROW)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
