"""The header of a safetensors file: which tensors, of which type and shape, and where their bytes lie.

Eight bytes give the length of a JSON object, the object follows, then the tensors without a gap. It is read as
strictly as the safetensors library reads it, and written in its bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

# safetensors' types that torch has, in the order in which the library lays tensors out, last first.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}

_LENGTH_BYTES = 8
_MAX_LENGTH = 100_000_000  # the library's own limit
_MAX_DIMENSIONS = 64  # torch calculates with no more
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """One tensor of a header; `start` counts from the first byte of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """How long it is."""
        return tensor_bytes(self.dtype, self.shape)


def tensor_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor's values."""
    return math.prod(shape) * dtype.itemsize


def layout_key(name: str, dtype: torch.dtype) -> tuple[int, str]:
    """By this the library sorts the tensors of a file: the widest types first, so that all are aligned; then names."""
    return -_RANKS[dtype], name


def is_storable(dtype: torch.dtype) -> bool:
    """Whether safetensors has a name for the type."""
    return dtype in _NAMES


def encode_header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The first bytes of a file that holds these tensors in this order, up to where the first one's bytes begin."""
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def decode_header(file: BinaryIO, size: int) -> list[Entry]:
    """The tensors of a file of `size` bytes, in the order in which they lie there.

    Raises:
        ValueError: if the file is cut short or damaged, or holds a type that torch has not.
    """
    if size < _LENGTH_BYTES:
        raise ValueError(f"it has {size} bytes, less than the length of a header")
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if length > _MAX_LENGTH or _LENGTH_BYTES + length > size:
        raise ValueError(f"its header should have {length:,} bytes, and the file has {size:,}")
    entries = [_entry(name, value, _LENGTH_BYTES + length) for name, value in _parse(file.read(length)).items()]
    entries.sort(key=lambda entry: (entry.start, entry.start + entry.nbytes))
    end = _LENGTH_BYTES + length
    for entry in entries:
        if entry.start != end:
            raise ValueError(f"{entry.name} should begin at byte {end:,}, and is said to at {entry.start:,}")
        end += entry.nbytes
    if end != size:
        raise ValueError(f"its tensors should end at byte {end:,}, and the file has {size:,}")
    return entries


def _parse(text: bytes) -> dict[str, Any]:
    """The header's JSON without its metadata."""
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop(_METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_METADATA} should map names to texts")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, no name given twice: readers disagree on which one counts."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        name.encode()  # half a surrogate pair is no text
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = value
    return found


def _entry(name: str, value: Any, origin: int) -> Entry:
    """One tensor, its length set against its shape."""
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise ValueError(f"{name} should have a dtype, a shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError(f"{name} is of type {kind}, expected one of {', '.join(_DTYPES)}")
    if not _are_counts(shape) or math.prod(max(size, 1) for size in shape) >= 2**60:
        raise ValueError(f"{name} has the shape {shape}")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape):,} dimensions")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has the data_offsets {offsets}")
    entry = Entry(name, _DTYPES[kind], tuple(shape), origin + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise ValueError(
            f"{name} should have {entry.nbytes:,} bytes by its shape {shape}, and has {offsets[1] - offsets[0]:,}"
        )
    return entry


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
