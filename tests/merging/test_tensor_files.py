"""Reading a model's tensors from its files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from qlora_cli.errors import ModelError
from qlora_cli.merging.tensors.files import (
    _OPEN_FILES,
    TensorReader,
    read_model_tensors,
    read_tensor_file,
    row_blocks,
)
from tests.support.models import save_tiny_model, tiny_model

TENSORS = {
    "a": torch.arange(12, dtype=torch.bfloat16).reshape(4, 3),
    "b": torch.tensor(2.5),
    "c": torch.empty(0, 7),
    "d": torch.tensor([[True], [False]]),
    "é": torch.arange(5, dtype=torch.int64),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_tensors_are_read_as_they_were_saved(file: Path) -> None:
    """Type, shape and values of every tensor, whole and by rows; in the order in which they lie in the file."""
    stored = read_tensor_file(file)
    assert stored.keys() == TENSORS.keys()
    assert [t.start for t in stored.values()] == sorted(t.start for t in stored.values())
    with TensorReader() as reader:
        for name, expected in TENSORS.items():
            for found in (
                reader.whole(stored[name]),
                *([reader.rows(stored[name], 0, 1)] if not expected.dim() else []),
            ):
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                assert torch.equal(found, expected)
        assert torch.equal(reader.rows(stored["a"], 1, 3), TENSORS["a"][1:3])
        assert torch.equal(reader.rows(stored["é"], 4, 5), TENSORS["é"][4:5])


def test_what_is_read_is_fresh_memory(file: Path) -> None:
    """Rows may be worked on in place: the next reading gives the file's values again."""
    stored = read_tensor_file(file)["a"]
    with TensorReader() as reader:
        reader.rows(stored, 0, 4).zero_()
        assert torch.equal(reader.whole(stored), TENSORS["a"])


def test_a_model_in_one_file_and_in_shards_is_the_same_model(tmp_path: Path) -> None:
    """What transformers saves, sharded or not, is read to the same names and values as its state."""
    save_tiny_model(tmp_path / "one")
    model = tiny_model("llama", vocab_size=json.loads((tmp_path / "one/config.json").read_text())["vocab_size"])
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = read_model_tensors(tmp_path / "one"), read_model_tensors(tmp_path / "many")
    assert one.keys() == many.keys() == load_file(tmp_path / "one/model.safetensors").keys()
    with TensorReader() as reader:
        for name, value in model.state_dict().items():
            if name in one:
                assert torch.equal(reader.whole(one[name]), value)
                assert torch.equal(reader.whole(many[name]), value)


def test_only_a_few_files_are_open_at_once(tmp_path: Path) -> None:
    """A model of hundreds of shards does not run into the limit of open files, read in whatever order."""
    count = _OPEN_FILES + 5
    for number in range(count):
        save_file({"t": torch.tensor([number])}, tmp_path / f"{number}")
    stored = [read_tensor_file(tmp_path / f"{number}")["t"] for number in range(count)]
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
    with TensorReader() as reader:
        for _ in range(2):
            assert [reader.whole(tensor).item() for tensor in stored] == list(range(count))
        if before:
            assert len(list(Path("/proc/self/fd").iterdir())) <= before + _OPEN_FILES
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) == before


@given(st.lists(st.integers(0, 50), max_size=4), st.integers(1, 8), st.integers(1, 4000))
def test_blocks_of_rows_cover_a_tensor_once_and_keep_to_the_limit(shape: list[int], itemsize: int, limit: int) -> None:
    """Blocks follow one another from the first row to the last; more than one row only below the limit."""
    rows = shape[0] if shape else 1
    row_bytes = itemsize
    for size in shape[1:]:
        row_bytes *= size
    at = 0
    for start, stop in row_blocks(shape, itemsize, limit):
        assert start == at < stop
        assert stop == start + 1 or (stop - start) * row_bytes <= limit
        at = stop
    assert at == rows


def test_every_fault_of_a_sharded_model_is_told_at_once(tmp_path: Path) -> None:
    """A shard that is missing, one cut short, one elsewhere, a name in two shards, a name in none: one message."""
    shards = {number: f"model-0000{number}-of-00005.safetensors" for number in range(1, 5)}
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / shards[1])
    save_file({"b": torch.zeros(2)}, tmp_path / shards[2])
    save_file({"c": torch.zeros(2)}, tmp_path / shards[3])
    size = (tmp_path / shards[3]).stat().st_size
    with (tmp_path / shards[3]).open("r+b") as cut:
        cut.truncate(size - 3)
    names = {"a": shards[1], "b": shards[2], "c": shards[3], "d": shards[4], "e": shards[1], "f": "../x"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError) as told:
        read_model_tensors(tmp_path)
    assert str(told.value) == "\n".join(
        [
            f"{tmp_path}: the weights are not whole; fetch or copy them again:",
            f"  {tmp_path}/model.safetensors.index.json: names '../x' as a shard; expected a file of the same folder",
            f"  b: in {shards[1]} and again in {shards[2]}",
            f"  {tmp_path}/{shards[3]}: not a whole safetensors file: its tensors should end at byte {size}, and the "
            f"file has {size - 3}",
            f"  {tmp_path}/{shards[4]}: cannot be read: No such file or directory",
            f"  e: not in {shards[1]}, where model.safetensors.index.json puts it",
        ]
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], "has its weights only as pickle (pytorch_model.bin), which can run code when read"),
        ([], "expected model.safetensors or model.safetensors.index.json, found no weights"),
        (["adapter_model.safetensors"], "or model.safetensors.index.json, found adapter_model.safetensors"),
    ],
)
def test_a_folder_without_safetensors_is_refused_with_what_it_has(
    tmp_path: Path, files: list[str], message: str
) -> None:
    """Pickle is not read, and the way out is told."""
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=re.escape(message)):
        read_model_tensors(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    """By name, whatever it is instead."""
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: (not valid JSON|expected weight_map)"):
        read_model_tensors(tmp_path)


def test_a_file_that_becomes_shorter_while_it_is_read_is_told(file: Path) -> None:
    """No zeros in the place of weights, and no killed process."""
    stored = read_tensor_file(file)
    with file.open("r+b") as cut:
        cut.truncate(stored["a"].start + 5)
    with TensorReader() as reader, pytest.raises(ModelError, match="has become shorter while it was read"):
        reader.whole(stored["a"])
    file.unlink()
    with TensorReader() as reader, pytest.raises(ModelError, match="cannot be read: No such file"):
        reader.whole(stored["a"])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"t": {"dtype": "F4", "shape": [2], "data_offsets": [0, 4]}}, "t is of type F4, expected one of BOOL, U8"),
        (
            {"t": {"dtype": "I8", "shape": [4], "data_offsets": [1, 5]}},
            "t should begin at byte 72, and is said to at 73",
        ),
        (
            {"t": {"dtype": "I8", "shape": [3], "data_offsets": [0, 4]}},
            "t should have 3 bytes by its shape [3], and has 4",
        ),
        ({"t": {"dtype": "I8", "shape": [-4], "data_offsets": [0, 4]}}, "t has the shape [-4]"),
        ({"t": {"dtype": "I8", "shape": [4]}}, "t should have a dtype, a shape and data_offsets"),
        ('{"t": {}, "t": {}}', "its header is not valid JSON: t is given twice"),
        ("[1]", "its header is no JSON object"),
    ],
)
def test_a_damaged_header_is_told_by_what_is_wrong_with_it(
    tmp_path: Path, header: dict[str, object] | str, message: str
) -> None:
    """The file, and the tensor."""
    text = (header if isinstance(header, str) else json.dumps(header)).ljust(64).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"1234")
    with pytest.raises(ModelError, match=re.escape(f"{file}: not a whole safetensors file: {message}")):
        read_tensor_file(file)


_PIECES = [b"", b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"1", b"-1", b"9" * 25, b"1.0", b"null", b'"F32"', b" "]
_PIECES += [b'"BF16"', b'"I8"', b'"__metadata__":{"a":1},', b'"\\ud800"', b"\xff", b"\x00", b"shape", b"x", b"NaN"]


@given(st.integers(0, 400), st.integers(0, 12), st.sampled_from(_PIECES), st.integers(-3, 3))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_is_refused_where_safetensors_refuses_it(
    tmp_path: Path, at: int, taken: int, put: bytes, longer: int
) -> None:
    """Whatever is cut out of a file's beginning or put in: what is read here, the library reads to the same tensors."""
    file, changed = tmp_path / "whole.safetensors", tmp_path / "changed.safetensors"
    if not file.exists():
        save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int8)}, file, metadata={"format": "pt"})
    data = file.read_bytes()
    text = data[8 : 8 + int.from_bytes(data[:8], "little")]
    edited = text[: at % len(text)] + put + text[at % len(text) + taken :]
    tail = data[8 + len(text) :]
    tail = tail[:longer] if longer < 0 else tail + b"x" * longer
    changed.write_bytes(len(edited).to_bytes(8, "little") + edited + tail)
    try:
        with safe_open(changed, framework="pt") as opened:
            theirs = {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError:
        with pytest.raises(ModelError):
            read_tensor_file(changed)
        return
    ours = read_tensor_file(changed)
    with TensorReader() as reader:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(reader.whole(ours[name]), theirs[name]) for name in ours)


def test_more_dimensions_than_torch_calculates_with(tmp_path: Path) -> None:
    """safetensors takes any number; the first sum would end in a traceback."""
    save_file({"a": torch.zeros([1] * 65)}, tmp_path / "many.safetensors")
    with pytest.raises(ModelError, match=r"not a whole safetensors file: a has 65 dimensions$"):
        read_tensor_file(tmp_path / "many.safetensors")
