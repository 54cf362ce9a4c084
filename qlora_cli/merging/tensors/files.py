"""A model's tensors as they lie in its safetensors files, read by rows.

Read with plain reads into fresh memory, not mapped: mapped pages count as resident memory, and a file that is cut
short while it is mapped kills the process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qlora_cli.errors import ModelError
from qlora_cli.merging.tensors.header import decode_header
from qlora_cli.model.files import INDEX_FILE, WEIGHTS_FILE

# Of rows to calculate with: what is made of a block is still in the processor's cache when it is used, which is
# twice as fast as with 16 MB.
ROW_BLOCK_BYTES = 2 * 2**20

# A sharded model is read shard by shard; tied or fused tensors may lie in others.
_OPEN_FILES = 16


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        start: its first byte, counted from the beginning of the file.
        nbytes: its length.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def read_tensor_file(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name, in the order in which they lie there; only its header is read.

    Raises:
        ModelError: if it cannot be read, is cut short or damaged, or holds a type that torch has not.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            entries = decode_header(opened, size)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise ModelError(f"{file}: not a whole safetensors file: {error}") from None
    return {
        entry.name: StoredTensor(entry.name, entry.dtype, entry.shape, file, entry.start, entry.nbytes)
        for entry in entries
    }


def read_model_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model folder by name: of model.safetensors, or of all shards that its index names.

    In the order of the files, and in these in the order in which they lie there. As transformers does, every tensor of
    a shard is taken, whichever shard the index puts it in.

    Raises:
        ModelError: if there are no safetensors; else listing every shard that is missing or damaged, every name that
            is in no shard and every one that is in two.
    """
    if (folder / WEIGHTS_FILE).exists():
        return read_tensor_file(folder / WEIGHTS_FILE)
    if not (folder / INDEX_FILE).exists():
        raise ModelError(_no_weights(folder))
    weight_map = _read_index(folder / INDEX_FILE)
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    damaged: set[str] = set()
    for shard in sorted(set(weight_map.values())):
        try:
            found = read_tensor_file(_shard(folder, shard))
        except ModelError as error:
            damaged.add(shard)
            problems.append(f"  {error}")
            continue
        problems += [
            f"  {name}: in {tensors[name].file.name} and again in {shard}" for name in found if name in tensors
        ]
        tensors.update(found)
    problems += [
        f"  {name}: not in {shard}, where {INDEX_FILE} puts it"
        for name, shard in weight_map.items()
        if name not in tensors and shard not in damaged
    ]
    if problems:
        raise ModelError(f"{folder}: the weights are not whole; fetch or copy them again:\n" + "\n".join(problems))
    return tensors


def row_blocks(shape: Sequence[int], itemsize: int = 4, limit: int = ROW_BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Cut a tensor along its first dimension: (first row, row after the last) of blocks of at most `limit` bytes.

    A block has one row at least, however long that is. A tensor without dimensions is one block, (0, 1).

    Args:
        itemsize: bytes of a value; 4 where it is turned to float32.
    """
    rows = shape[0] if shape else 1
    step = max(1, limit // max(1, math.prod(shape[1:]) * itemsize))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class TensorReader:
    """Reads stored tensors into memory of their own; a context manager that keeps files open between reads.

    Not for several threads at once.
    """

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def whole(self, tensor: StoredTensor) -> Tensor:
        """All of it, in its own type and shape, on the CPU.

        Raises:
            ModelError: if the file cannot be read, or has become shorter since its header was.
        """
        return self._read(tensor, tensor.start, tensor.shape)

    def rows(self, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (not included): [stop - start, ...] in its own type, on the CPU.

        Of a tensor without dimensions row 0 is the whole of it, and has no dimensions either.

        Raises:
            ModelError: as for `whole`.
        """
        if not tensor.shape:
            return self.whole(tensor)
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        return self._read(tensor, tensor.start + start * row_bytes, (stop - start, *tensor.shape[1:]))

    def _read(self, tensor: StoredTensor, offset: int, shape: tuple[int, ...]) -> Tensor:
        values = torch.empty(math.prod(shape) * tensor.dtype.itemsize, dtype=torch.uint8)
        self.read_into(tensor.file, offset, values.numpy().data)
        return values.view(tensor.dtype).reshape(shape)

    def read_into(self, path: Path, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `offset` on.

        Raises:
            ModelError: as for `whole`.
        """
        try:
            file = self.open(path)
            file.seek(offset)
            while len(buffer):
                done = file.readinto(buffer)  # type: ignore[attr-defined]  # an unbuffered file has it
                if not done:
                    raise ModelError(f"{path}: has become shorter while it was read")
                buffer = buffer[done:]
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None

    def open(self, path: Path) -> BinaryIO:
        """The file, unbuffered; it is the reader's to close."""
        if path not in self._files:
            if len(self._files) == _OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[path] = path.open("rb", buffering=0)
        return self._files[path]


def _shard(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise ModelError(f"{folder / INDEX_FILE}: names {name!r} as a shard; expected a file of the same folder")
    return folder / name


def _read_index(file: Path) -> dict[str, str]:
    """The index's map of names to shards."""
    try:
        index: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise ModelError(f"{file}: expected weight_map, from the names of tensors to the names of files")
    return weight_map


def _no_weights(folder: Path) -> str:
    expected = f"expected {WEIGHTS_FILE} or {INDEX_FILE}"
    if pickled := sorted(file.name for ending in ("bin", "pt", "pth") for file in folder.glob(f"*.{ending}")):
        return (
            f"{folder}: has its weights only as pickle ({pickled[0]}), which can run code when read; {expected}. "
            "Convert it first, on a machine where that may happen: load it with transformers' from_pretrained, then "
            "save_pretrained into a new folder writes safetensors"
        )
    others = sorted(file.name for ending in ("safetensors", "gguf") for file in folder.glob(f"*.{ending}"))
    return f"{folder}: {expected}, found " + (", ".join(others) if others else "no weights")
