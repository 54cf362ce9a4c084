"""A model's tensors written into safetensors files as they are made, none of them ever whole in memory.

All names, types and shapes are known before the first value is, so the header is written first and the values follow.
The files are byte for byte those of safetensors' own `save_file`, cut into shards as transformers cuts them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from qlora_cli.errors import MergeError
from qlora_cli.merging.tensors.files import StoredTensor, TensorReader
from qlora_cli.merging.tensors.header import encode_header, is_storable, layout_key, tensor_bytes
from qlora_cli.model.files import INDEX_FILE, WEIGHTS_FILE

# transformers' own choice.
DEFAULT_SHARD_BYTES = 5_000_000_000

# Of a copy: how often progress is told.
_COPY_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Output:
    """One tensor to be written.

    Attributes:
        source: a stored tensor, whose bytes are copied as they are; or what makes the values when their turn comes:
            blocks of type `dtype`, which joined are all values of the tensor in their order.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    source: StoredTensor | Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class _File:
    """One file to be written: everything of it but the values."""

    name: str
    header: bytes
    outputs: tuple[Output, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(output.nbytes for output in self.outputs)


def output_bytes(outputs: Sequence[Output], *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> int:
    """Bytes of the files that `write_model` writes, to the byte, headers and index included."""
    files = _plan(outputs, max_shard_bytes)
    return sum(file.nbytes for file in files) + len(_index(files))


def write_model(
    outputs: Sequence[Output], folder: Path, *, max_shard_bytes: int, report: Callable[[int], None]
) -> list[Path]:
    """Write `model.safetensors`, or shards of at most `max_shard_bytes` of values and their index; returns the files.

    A tensor that is larger than a shard gets one to itself. Within a file tensors lie as safetensors orders them,
    by type and name; the shards are cut in the order of `outputs`.

    Args:
        folder: is there, and has none of these files.
        report: told how many bytes were written since it was last told; together `output_bytes`.

    Raises:
        MergeError: if two outputs have one name, or if an output's source gives other than what the output says.
        ModelError: if a stored tensor cannot be read.
        OSError: if the files cannot be written.
    """
    _check(outputs)
    files = _plan(outputs, max_shard_bytes)
    with TensorReader() as reader:
        for file in files:
            with (folder / file.name).open("xb", buffering=0) as opened:
                _write_all(opened, file.header)
                report(len(file.header))
                for output in file.outputs:
                    for written in _write_output(opened, output, reader):
                        report(written)
    written_files = [folder / file.name for file in files]
    if index := _index(files):
        (folder / INDEX_FILE).write_bytes(index)
        report(len(index))
        written_files.append(folder / INDEX_FILE)
    return written_files


def _check(outputs: Sequence[Output]) -> None:
    """What can be wrong with outputs before any is made."""
    counts = Counter(output.name for output in outputs)
    problems = [f"  {name}: would be written {count} times" for name, count in counts.items() if count > 1]
    for output in outputs:
        if not is_storable(output.dtype):
            problems.append(f"  {output.name}: safetensors has no type for {output.dtype}")
        stored = output.source
        if isinstance(stored, StoredTensor) and (stored.dtype, stored.shape) != (output.dtype, output.shape):
            problems.append(
                f"  {output.name}: expected {output.dtype} {list(output.shape)}, "
                f"{stored.file.name} has {stored.dtype} {list(stored.shape)}"
            )
    if problems:
        raise MergeError("these tensors cannot be written:\n" + "\n".join(problems))


def _plan(outputs: Sequence[Output], max_shard_bytes: int) -> list[_File]:
    """Which tensor goes into which file, as transformers shares them out."""
    shards: list[list[Output]] = []
    current: list[Output] = []
    filled = 0
    for output in outputs:
        if output.nbytes > max_shard_bytes:
            shards.append([output])
            continue
        if filled + output.nbytes > max_shard_bytes:
            shards.append(current)
            current, filled = [], 0
        current.append(output)
        filled += output.nbytes
    if current or not shards:
        shards.append(current)
    return [_file(_shard_name(number, len(shards)), shard) for number, shard in enumerate(shards, start=1)]


def _shard_name(number: int, count: int) -> str:
    return WEIGHTS_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _file(name: str, outputs: Sequence[Output]) -> _File:
    ordered = tuple(sorted(outputs, key=lambda output: layout_key(output.name, output.dtype)))
    header = encode_header((output.name, output.dtype, output.shape) for output in ordered)
    return _File(name, header, ordered)


def _index(files: Sequence[_File]) -> bytes:
    """The index of shards; nothing for a single file."""
    if len(files) == 1:
        return b""
    index = {
        "metadata": {"total_size": sum(output.nbytes for file in files for output in file.outputs)},
        "weight_map": {output.name: file.name for file in files for output in file.outputs},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _write_output(file: BinaryIO, output: Output, reader: TensorReader) -> Iterator[int]:
    """Put one tensor's bytes at the end of the file; gives how many, block by block."""
    if isinstance(output.source, StoredTensor):
        yield from _copy(file, output.source, reader)
        return
    missing = output.nbytes
    for block in output.source():
        nbytes = block.numel() * block.element_size()
        if block.dtype != output.dtype:
            raise MergeError(f"{output.name}: expected {output.dtype}, its source gave {block.dtype}")
        if nbytes > missing:
            raise MergeError(
                f"{output.name}: expected {output.dtype} {list(output.shape)}, its source gave more than that"
            )
        _write_all(file, block.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        missing -= nbytes
        yield nbytes
    if missing:
        raise MergeError(
            f"{output.name}: expected {output.nbytes:,} bytes for {list(output.shape)}, its source ended {missing:,} "
            "short of that"
        )


def _copy(file: BinaryIO, stored: StoredTensor, reader: TensorReader) -> Iterator[int]:
    """Copy a stored tensor's bytes, by the kernel where it can."""
    done = 0
    while hasattr(os, "copy_file_range") and done < stored.nbytes:
        count = min(_COPY_BYTES, stored.nbytes - done)
        try:
            source = reader.open(stored.file).fileno()
            copied = os.copy_file_range(source, file.fileno(), count, stored.start + done)
        except OSError:
            break  # not between these file systems, or a failure that the plain way tells better
        if not copied:
            break
        done += copied
        yield copied
    buffer = memoryview(bytearray(min(_COPY_BYTES, stored.nbytes - done)))
    while done < stored.nbytes:
        block = buffer[: stored.nbytes - done]
        reader.read_into(stored.file, stored.start + done, block)
        _write_all(file, block)
        done += len(block)
        yield len(block)


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """A single write may take less than all of it."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[file.write(rest) :]
