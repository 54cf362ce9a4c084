"""Writing a model's tensors as they are made."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_cli.errors import MergeError
from qlora_cli.merging.tensors.files import read_model_tensors, read_tensor_file
from qlora_cli.merging.tensors.header import _DTYPES
from qlora_cli.merging.tensors.writer import Output, _write_all, output_bytes, write_model


def of_blocks(tensor: Tensor, size: int = 3) -> Callable[[], Iterator[Tensor]]:
    """A source that gives a tensor in blocks of `size` values."""
    return lambda: iter(tensor.reshape(-1).split(size)) if tensor.numel() else iter(())


def outputs_of(tensors: dict[str, Tensor]) -> list[Output]:
    """Each tensor made in blocks."""
    return [Output(name, tensor.dtype, tuple(tensor.shape), of_blocks(tensor)) for name, tensor in tensors.items()]


def every_type() -> dict[str, Tensor]:
    """A tensor of each type that safetensors has for torch, and odd shapes and names."""
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"of {dtype}": torch.randint(0, 2, (5, 2 * dtype.itemsize), dtype=torch.uint8, generator=draw).view(dtype)
        for dtype in _DTYPES.values()
    }
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 4)
    tensors['é"\\\n\t\x01\x7f 𝄞/'] = torch.arange(7)
    tensors["turned"] = torch.arange(12.0).reshape(3, 4).t()
    return tensors


def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path: Path) -> None:
    """Made in blocks or copied: header, order, padding and values as `save_file` has them, for every type."""
    tensors = every_type()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x", {"format": "pt"})
    expected = (tmp_path / "x").read_bytes()
    (tmp_path / "made").mkdir()
    (tmp_path / "copied").mkdir()
    stored = [Output(t.name, t.dtype, t.shape, t) for t in read_tensor_file(tmp_path / "x").values()]
    for outputs, folder in ((outputs_of(tensors), "made"), (stored[::-1], "copied")):
        files = write_model(outputs, tmp_path / folder, max_shard_bytes=10**9, report=lambda _: None)
        assert files == [tmp_path / folder / "model.safetensors"]
        assert files[0].read_bytes() == expected


@pytest.mark.parametrize("limit", [1, 40, 200, 400, 10**9])
def test_shards_are_cut_as_transformers_cuts_them(tmp_path: Path, limit: int) -> None:
    """The same tensors in the same files by the same names; the index says so; no shard larger than it has to be."""
    tensors = {
        f"layer.{number}": torch.full((size,), float(number)) for number, size in enumerate([9, 1, 30, 4, 5, 60])
    }
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    files = write_model(outputs_of(tensors), tmp_path, max_shard_bytes=limit, report=lambda _: None)
    assert {file.name for file in files if file.suffix == ".safetensors"} == set(split.filename_to_tensors)
    for name, held in split.filename_to_tensors.items():
        save_file({key: tensors[key] for key in held}, tmp_path / "expected", {"format": "pt"})
        assert (tmp_path / name).read_bytes() == (tmp_path / "expected").read_bytes()
    if split.is_sharded:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index == {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        assert files[-1] == tmp_path / "model.safetensors.index.json"
    assert read_model_tensors(tmp_path).keys() == tensors.keys()


@given(st.lists(st.tuples(st.lists(st.integers(0, 6), max_size=3), st.booleans()), max_size=8), st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_the_bytes_to_be_written_are_known_before(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[list[int], bool]], limit: int
) -> None:
    """To the byte; progress adds up to the same; what is written is read back equal."""
    folder = tmp_path_factory.mktemp("model")
    tensors = {
        f"t{number}": torch.randn(shape).to(torch.bfloat16 if half else torch.float32)
        for number, (shape, half) in enumerate(drawn)
    }
    told: list[int] = []
    outputs = outputs_of(tensors)
    files = write_model(outputs, folder, max_shard_bytes=limit, report=told.append)
    assert sum(told) == output_bytes(outputs, max_shard_bytes=limit) == sum(file.stat().st_size for file in files)
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("dtype", "blocks", "message"),
    [
        (torch.float32, [torch.zeros(4)], "t: expected 24 bytes for [2, 3], its source ended 8 short of that"),
        (torch.float32, [torch.zeros(4), torch.zeros(3)], "t: expected torch.float32 [2, 3], its source gave more"),
        (torch.bfloat16, [torch.zeros(6)], "t: expected torch.bfloat16, its source gave torch.float32"),
    ],
)
def test_a_source_that_gives_something_else_is_found_out(
    tmp_path: Path, dtype: torch.dtype, blocks: list[Tensor], message: str
) -> None:
    """Too little, too much, or of another type: no file is passed off as whole."""
    with pytest.raises(MergeError, match=re.escape(message)):
        write_model(
            [Output("t", dtype, (2, 3), lambda: iter(blocks))], tmp_path, max_shard_bytes=100, report=lambda _: None
        )


def test_what_cannot_be_written_is_told_before_anything_is(tmp_path: Path) -> None:
    """Names that come twice, types that the format has not, a stored tensor of another shape: all at once."""
    save_file({"s": torch.zeros(2, 3)}, tmp_path / "x")
    stored = read_tensor_file(tmp_path / "x")["s"]
    outputs = [
        Output("a", torch.float32, (1,), of_blocks(torch.zeros(1))),
        Output("a", torch.float32, (1,), of_blocks(torch.zeros(1))),
        Output("b", torch.complex128, (1,), of_blocks(torch.zeros(1, dtype=torch.complex128))),
        Output("s", torch.float32, (3, 2), stored),
    ]
    with pytest.raises(MergeError) as told:
        write_model(outputs, tmp_path, max_shard_bytes=100, report=lambda _: None)
    assert str(told.value).splitlines() == [
        "these tensors cannot be written:",
        "  a: would be written 2 times",
        "  b: safetensors has no type for torch.complex128",
        "  s: expected torch.float32 [3, 2], x has torch.float32 [2, 3]",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """Not even by a caller's mistake."""
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_model(outputs_of({"t": torch.zeros(1)}), tmp_path, max_shard_bytes=100, report=lambda _: None)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("kernel", ["absent", "unwilling", "half", "nothing"])
def test_bytes_are_copied_whole_whatever_the_kernel_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """No copying between files in the kernel, a refusal, one after some bytes, or nothing copied: the same file."""
    save_file({"a": torch.randn(1000), "b": torch.randn(7)}, tmp_path / "x", {"format": "pt"})
    calls = 0

    def copying(source: int, target: int, count: int, offset: int) -> int:
        nonlocal calls
        calls += 1
        if kernel == "nothing":
            return 0
        if kernel == "unwilling" or calls > 1:
            raise OSError(18, "Invalid cross-device link")
        return os.write(target, os.pread(source, 1001, offset))

    if kernel == "absent":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    else:
        monkeypatch.setattr(os, "copy_file_range", copying, raising=False)
    (tmp_path / "out").mkdir()
    outputs = [Output(t.name, t.dtype, t.shape, t) for t in read_tensor_file(tmp_path / "x").values()]
    told: list[int] = []
    write_model(outputs, tmp_path / "out", max_shard_bytes=10**6, report=told.append)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "x").read_bytes()
    assert sum(told) == (tmp_path / "x").stat().st_size


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_an_os_error() -> None:
    """It passes through, for the command to tell."""
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OSError, match="No space left on device"):
        _write_all(full, b"x" * 10)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """100 MB of tensors pass through, made from blocks and copied, and peak memory rises by less than 30 MB."""
    code = f"""
import resource
from pathlib import Path
import torch
from qlora_cli.merging.tensors.files import TensorReader, read_model_tensors, row_blocks
from qlora_cli.merging.tensors.writer import Output, write_model

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def write(folder, outputs):
    Path(folder).mkdir()
    write_model(outputs, Path(folder), max_shard_bytes=60_000_000, report=lambda _: None)

block = torch.ones(64, 8192, dtype=torch.bfloat16)
shape = (1024, 8192)
source = lambda: (block for _ in range(16))
write({str(tmp_path / "a")!r}, [Output(f"t{{i}}", torch.bfloat16, shape, source) for i in range(6)])
before = peak()
with TensorReader() as reader:
    def doubled(tensor):
        def blocks():
            for start, stop in row_blocks(tensor.shape):
                yield reader.rows(tensor, start, stop).float().mul_(2).to(tensor.dtype)
        return blocks
    tensors = read_model_tensors(Path({str(tmp_path / "a")!r})).values()
    write({str(tmp_path / "b")!r}, [Output(t.name, t.dtype, t.shape, doubled(t)) for t in tensors])
    write({str(tmp_path / "c")!r}, [Output(t.name, t.dtype, t.shape, t) for t in tensors])
    assert reader.rows(read_model_tensors(Path({str(tmp_path / "b")!r}))["t5"], 1023, 1024).eq(2).all()
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30e6
