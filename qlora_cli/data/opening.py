"""A data file as a stream of bytes, unpacked where it is compressed, with what has been read of it counted."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.errors import DataError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BUFFER = 2**18  # bytes; also how exact the count of what has been read is
_HEAD = 64  # bytes that tell what a file holds, whatever its name says

# How files begin that are no text, and what to do with one that has the name of a text.
_NO_TEXT = {
    b"\x1f\x8b": "gzip data. Name it {name}.gz.",
    b"\x28\xb5\x2f\xfd": "Zstandard data. Name it {name}.zst.",
    b"PK\x03\x04": "a zip archive. Unpack it.",
    b"PAR1": "Parquet. Name it .parquet.",
    b"version https://git-lfs": "a Git LFS pointer in place of the file. Fetch the file with git lfs pull.",
}


def uncounted(_: int) -> None:
    """For whom what has been read does not matter."""


@contextlib.contextmanager
def open_bytes(path: Path, shown: str, consumed: Callable[[int], None]) -> Iterator[io.BufferedReader]:
    """The bytes of a file, of what is inside it for .gz and .zst, without a byte-order mark.

    Whatever its compressed size, no more than some buffers are in memory. `consumed` gets the number of further bytes
    read of the file itself, whose sum is its size once all has been read.

    Raises:
        DataError: if it cannot be read, is damaged or cut short, holds no text, or is not in UTF-8.
    """
    try:
        with _unpacked(path, uncounted) as stream:
            head = stream.read(_HEAD)
        _refuse_other_contents(head, path, shown)
        with _unpacked(path, consumed) as stream:
            if head.startswith(codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        # Those of decompression have no number of the operating system's.
        packing = {".gz": "gzip", ".zst": "Zstandard"}.get(path.suffix.lower())
        if packing and not getattr(error, "errno", None):
            reason = str(error).strip().rstrip(".")
            raise DataError(f"{shown}: not readable as {packing} ({reason}). Fetch or make the file again.") from error
        raise DataError(f"{shown}: cannot be read: {getattr(error, 'strerror', None) or error}.") from error


@contextlib.contextmanager
def _unpacked(path: Path, consumed: Callable[[int], None]) -> Iterator[io.BufferedReader]:
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(io.BufferedReader(_Counted(path, consumed), _BUFFER))
        match path.suffix.lower():
            case ".gz":
                # Read through a buffer, since GzipFile's own `readline` is slow.
                file = stack.enter_context(gzip.GzipFile(fileobj=file, mode="rb"))
                file = stack.enter_context(io.BufferedReader(file, _BUFFER))
            case ".zst":
                file = stack.enter_context(io.BufferedReader(_Zstandard(file), _BUFFER))
        yield file


class _Counted(io.RawIOBase):
    """A file that tells how many bytes are read of it."""

    def __init__(self, path: Path, consumed: Callable[[int], None]) -> None:
        self._file = path.open("rb", buffering=0)
        self._consumed = consumed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        count = self._file.readinto(buffer)
        if count:
            self._consumed(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Zstandard(io.RawIOBase):
    """What is in the frames of a Zstandard file, one after the other."""

    def __init__(self, file: io.BufferedReader) -> None:
        import pyarrow

        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)
        data = self._stream.read(len(view))
        view[: len(data)] = data
        return len(data)


def _refuse_other_contents(head: bytes, path: Path, shown: str) -> None:
    if encoding := _wide_encoding(head):
        raise DataError(f"{shown}, line 1: expected UTF-8, got {encoding}. Save the file as UTF-8.")
    for beginning, got in _NO_TEXT.items():
        if head.startswith(beginning):
            raise DataError(f"{shown}: expected text, got {got.format(name=path.name)}")


def _wide_encoding(head: bytes) -> str | None:
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    # Without a mark: all rows and headers begin with a character of ASCII, or with one that is nowhere near zero.
    match [byte != 0 for byte in head[:4]]:
        case [True, False, True, False] | [False, True, False, True]:
            return "UTF-16"
        case [True, False, False, False] | [False, False, False, True]:
            return "UTF-32"
    return None
