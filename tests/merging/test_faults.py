"""A merge that goes wrong says why, and leaves what was there before and nothing else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.disk import staging_folder
from qlora_cli.errors import MergeError, ModelError, OutputError, QloraError, RunError
from qlora_cli.merging import merge as merging
from qlora_cli.merging.events import Event, Written
from qlora_cli.merging.merge import merge
from qlora_cli.merging.output_folder import writing
from qlora_cli.merging.request import MergeRequest
from qlora_cli.merging.tensors import writer as tensor_writer
from tests.support.merge_runs import merge_run
from tests.support.peft_adapters import edit_tensors

ADAPTER = "run/adapter/adapter_model.safetensors"
BASE = "llama/model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its base; nobody writes into it."""
    folder = tmp_path_factory.mktemp("faults")
    merge_run(folder)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a run and its base to be spoilt; afterwards nothing else is in it, whole or half."""
    folder = tmp_path / "here"
    shutil.copytree(made, folder)
    recipe = folder / "run/recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(made), str(folder)))
    monkeypatch.chdir(folder)
    names = set(folder.iterdir())
    yield folder
    assert set(folder.iterdir()) == names
    assert [path for path in tree(folder) if path.name.startswith(".")] == []


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def fails(kind: type[BaseException], listener: Callable[[Event], None] | None = None, **options: Any) -> str:
    """The message of a merge that ends with this error."""
    request = MergeRequest(
        **{"adapter": Path("run"), "output": Path("out"), "verify": False, "device": "cpu"} | options
    )
    with pytest.raises(kind) as told:
        merge(request, listeners=[listener] if listener else [])
    assert not isinstance(told.value, QloraError) or type(told.value) is kind
    return str(told.value)


def fail_on_writing(event: Event) -> None:
    if isinstance(event, Written):
        raise ZeroDivisionError


def cut(file: str, size: int) -> None:
    data = Path(file).read_bytes()
    Path(file).write_bytes(data[:size])


# ------------------------------------------------------------------------------------------- The disk


@pytest.mark.parametrize(
    ("options", "needed", "hint"),
    [
        ({"verify": True}, "68.1 MB", "; one --base in place of auto needs about half"),
        ({"verify": True, "base": "original"}, "67.6 MB", ""),
        ({"quantize": "nf4"}, "68.1 MB", ""),
    ],
    ids=["both", "one", "in 4 bits"],
)
def test_too_little_room(
    here: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], needed: str, hint: str
) -> None:
    """It is known beforehand what will stand on the disk at once: both models, or one and what it becomes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_234_567))
    assert fails(OutputError, **options) == (
        f"--output: {needed} are needed to write {here}/out, and 1.2 MB are free there. Free some, or name a folder on "
        f"another disk{hint}"
    )


@pytest.mark.parametrize("allowed", [0, 1, 30, 200, 489, 495])
def test_the_disk_is_full(here: Path, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    """After so many kB: the reason, exit code 1."""
    real, left = tensor_writer._write_all, [allowed * 1000]

    def full(file: Any, data: Any) -> None:
        left[0] -= len(memoryview(data).cast("B"))
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data)

    monkeypatch.setattr(tensor_writer, "_write_all", full)
    monkeypatch.delattr(os, "copy_file_range", raising=False)  # all that is written goes through there
    told = fails(RunError, quantize="nf4")
    assert told == f"{here}/out: could not be written: No space left on device"
    assert RunError.exit_code == 1


def test_a_copy_that_the_kernel_refuses_is_made_another_way(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between file systems, say: the plain way gives the same file, or tells what is wrong."""
    request = MergeRequest(adapter=Path("run"), output=Path("out"), verify=False, device="cpu")
    merge(request)
    expected = Path("out/model.safetensors").read_bytes()
    shutil.rmtree("out")

    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    merge(request)
    assert Path("out/model.safetensors").read_bytes() == expected
    shutil.rmtree("out")


def test_what_stands_beside_the_weights_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last file as the first: none of the others stays."""

    def refuse(path: Path, text: str) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(merging, "write_text", refuse)
    assert fails(RunError) == f"{here}/out: could not be written: {os.strerror(errno.EDQUOT)}"


# ------------------------------------------------------------------------------------------- The output


@pytest.mark.parametrize("output", ["run/adapter", "llama", "run", "."])
def test_nothing_is_written_over(here: Path, output: str) -> None:
    """Least of all what is merged, or the base."""
    before = {path: path.read_bytes() for path in tree(here) if path.is_file()}
    assert "is not empty. Name another folder, or delete it" in fails(OutputError, output=Path(output))
    assert {path: path.read_bytes() for path in tree(here) if path.is_file()} == before


@pytest.mark.parametrize("output", ["run/merged", "run/adapter/merged", "llama/merged", "a/b/merged"])
def test_a_new_folder_inside_another_is_as_good(here: Path, output: str) -> None:
    """Also in the run's, the adapter's or the base's own; nothing of what is around it is carried over."""
    plain = merge(MergeRequest(adapter=Path("run"), output=Path("out"), verify=False, device="cpu"))
    names = sorted(path.name for path in plain.output.iterdir())
    merged = merge(MergeRequest(adapter=Path("run"), output=Path(output), verify=False, device="cpu"))
    assert sorted(path.name for path in merged.output.iterdir()) == names
    weights = [folder / "model.safetensors" for folder in (plain.output, merged.output)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for path in (Path("out"), Path("a"), Path(output)):
        shutil.rmtree(path, ignore_errors=True)


def test_two_merges_into_one_folder(here: Path) -> None:
    """The second is refused while the first writes, which goes on undisturbed."""
    with writing(here / "out") as folder:
        (folder / "first").touch()
        assert fails(OutputError) == f"--output: another merge is writing {here}/out at this moment"
        assert (folder / "first").is_file()
    shutil.rmtree("out")


def test_what_a_killed_merge_left(here: Path) -> None:
    """Is taken away by the next one."""
    left = staging_folder(here / "out") / ".original/model-00001-of-00002.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    merge(MergeRequest(adapter=Path("run"), output=Path("out"), verify=False, device="cpu"))
    assert not left.parent.parent.exists()
    assert not list(Path("out").rglob("*-of-*"))
    shutil.rmtree("out")


def test_what_a_killed_merge_left_goes_also_if_the_next_one_fails(here: Path) -> None:
    """Once that begins to write."""
    left = staging_folder(here / "out") / "half"
    left.parent.mkdir()
    left.touch()
    fails(ZeroDivisionError, fail_on_writing)
    assert not left.parent.exists()


# ------------------------------------------------------------------------------------------- Adapter and base


def test_an_adapter_of_another_base(here: Path) -> None:
    """Every weight that does not fit, with what was expected and what is there."""
    tensors = load_file(BASE)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        tensors[name] = torch.zeros(32, 16)
    save_file(tensors, BASE, metadata={"format": "pt"})
    told = fails(ModelError)
    assert told.startswith(f"the adapter in {here}/run/adapter and the base model {here}/llama do not fit:\n")
    assert "model.layers.0.self_attn.q_proj.weight: " in told
    assert "model.layers.1.mlp.down_proj.weight: " in told
    assert "[32, 16]" in told


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        (["model.layers.1.mlp.down_proj.lora_B.weight"], "model.layers.1.mlp.down_proj"),
        (["model.layers.0.self_attn.q_proj.lora_A.weight"], "model.layers.0.self_attn.q_proj"),
        (
            ["model.layers.1.mlp.down_proj.lora_A.weight", "model.layers.1.mlp.down_proj.lora_B.weight"],
            "model.layers.1.mlp.down_proj",
        ),
    ],
    ids=["B", "A", "both"],
)
def test_an_adapter_that_lacks_a_tensor(here: Path, missing: list[str], told: str) -> None:
    """The layer is named, and nothing is merged in silence without it."""
    edit_tensors(Path("run/adapter"), **dict.fromkeys(missing))
    message = fails(ModelError)
    assert message.startswith(f"{here}/run/adapter: the adapter cannot be applied:\n")
    assert told in message
    assert message.count("\n") == 1


def test_a_base_that_lacks_a_tensor(here: Path) -> None:
    """All that are missing."""
    tensors = load_file(BASE)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    del tensors["model.norm.weight"]
    save_file(tensors, BASE, metadata={"format": "pt"})
    told = fails(ModelError)
    assert "model.layers.0.self_attn.q_proj.weight" in told
    assert "model.norm.weight" in told


@pytest.mark.parametrize("file", [ADAPTER, BASE])
@pytest.mark.parametrize("size", [0, 4, 500, 9000])
def test_a_file_that_was_cut_short(here: Path, file: str, size: int) -> None:
    """Within its length, its header or its tensors: it is named."""
    cut(file, size)
    assert fails(ModelError).startswith(f"{here}/{file}: not a whole safetensors file: ")


def test_a_base_that_is_cut_short_while_it_is_read(here: Path) -> None:
    """No crash, no zeros: it is named."""
    told = fails(ModelError, lambda event: cut(BASE, 100_000) if isinstance(event, Written) else None)
    assert told == f"{here}/{BASE}: has become shorter while it was read"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_none(here: Path, value: float) -> None:
    """In a weight of the base that is changed, or in the adapter."""
    tensors = load_file(BASE)
    weight = tensors["model.layers.0.mlp.down_proj.weight"]
    weight[0, 0] = value
    save_file(tensors, BASE, metadata={"format": "pt"})
    assert fails(MergeError, base="original") == (
        "model.layers.0.mlp.down_proj.weight: the merged weight has values that are NaN or infinite. Look at the "
        "base's weights"
    )
    edit_tensors(Path("run/adapter"), **{"model.layers.0.mlp.down_proj.lora_B.weight": torch.full((64, 4), value)})
    assert "model.layers.0.mlp.down_proj.lora_B.weight" in fails(ModelError)


def test_an_adapter_that_was_never_trained(here: Path) -> None:
    """Its B is zero: the weights that would stay as they are are named, before anything is written."""
    zero = torch.zeros(64, 4)
    edit_tensors(Path("run/adapter"), **{"model.layers.0.mlp.down_proj.lora_B.weight": zero})
    told = fails(MergeError)
    assert "These weights would not change by a bit, 1 in all:\n  model.layers.0.mlp.down_proj.weight\n" in told
    assert "--allow-unchanged" in told
    for layer in (0, 1):
        for name in ("mlp.down_proj", "self_attn.q_proj"):
            edit_tensors(Path("run/adapter"), **{f"model.layers.{layer}.{name}.lora_B.weight": zero})
    request = MergeRequest(Path("run"), Path("out"), device="cpu", base="original", allow_unchanged=True, verify_rows=2)
    merge(request)
    shutil.rmtree("out")


def test_an_effect_that_is_lost(here: Path) -> None:
    """An adapter so weak that the sum, rounded, is the base: which weights, after they were made."""
    tiny = {
        f"model.layers.{layer}.{name}.lora_B.weight": torch.full((64, 4), 1e-20)
        for layer in (0, 1)
        for name in ("mlp.down_proj", "self_attn.q_proj")
    }
    edit_tensors(Path("run/adapter"), **tiny)
    told = fails(MergeError, dtype="bfloat16", base="original")
    assert told.startswith("what the adapter adds is lost in rounding in bfloat16. These weights would not change")
    assert "4 in all" in told


def test_a_base_given_as_pickle(here: Path) -> None:
    """It is not read; the way out is told."""
    Path(BASE).rename("llama/pytorch_model.bin")
    told = fails(ModelError)
    assert "only as pickle" in told
    assert "can run code when read" in told
    assert "safetensors" in told


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000], ids=["broken", "a list", "deep"])
def test_a_file_of_the_base_that_cannot_be_read(here: Path, file: str, text: str) -> None:
    """Told as what it is; what was half written by then is gone."""
    (Path("llama") / file).write_text(text)
    told = fails(ModelError)
    assert str(here / "llama") in told
    assert "Traceback" not in told


# ------------------------------------------------------------------------------------------- Stopped from outside


@pytest.mark.parametrize("moment", [1, 20])
def test_an_interrupt(here: Path, moment: int) -> None:
    """Ctrl-C while weights are written: what is half written goes, and the interrupt goes on to the caller."""
    seen = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def listen(event: Event) -> None:
        seen.append(isinstance(event, Written))
        if sum(seen) == moment:
            assert staging_folder(here / "out").is_dir()
            signal.raise_signal(signal.SIGINT)

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        fails(KeyboardInterrupt, listen)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert sum(seen) == moment


def test_a_fault_of_our_own(here: Path) -> None:
    """Whatever it is: nothing stays."""
    fails(ZeroDivisionError, fail_on_writing)


def test_the_report_is_plain_json(here: Path) -> None:
    """Every number is one that other readers take; no folder of this machine is named in it, nor in the README."""
    merged = merge(MergeRequest(Path("run"), Path("out"), device="cpu", verify_rows=2))
    text = (merged.output / "merge_report.json").read_text()
    report = json.loads(text, parse_constant=pytest.fail)
    card = (merged.output / "README.md").read_text()
    assert str(here) not in text + card
    assert "None" not in text + card
    assert report["adapter"] == {
        "name": "run",
        "sha256": report["adapter"]["sha256"],
        "step": None,
        "task_type": "CAUSAL_LM",
    }
    assert report["base"] == {"name": "llama", "revision": None}
    assert report["changes"] == "LoRA on 4 weights"
    assert report["verification"]["rows"] == "2 of 8 validation rows of the run"
    assert report["verification"]["merges"].keys() == {"original", "dequantized"}
    assert report["merged_onto"] == report["verification"]["chosen"]
    assert f"merged onto both bases: {report['verification']['reason'].split(';')[0]}" in card
    shutil.rmtree("out")
