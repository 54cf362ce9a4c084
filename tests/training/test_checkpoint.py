"""A checkpoint is whole or it is not one, and gives back exactly what was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from qlora_cli.disk import replacing_folder
from qlora_cli.errors import CheckpointError, RunError
from qlora_cli.recipe.schema import OptimizerName, TrainingSection
from qlora_cli.training.checkpoint import (
    Progress,
    find_fault,
    list_checkpoints,
    newest_valid,
    restore_optimizer,
    rotate,
    save_checkpoint,
    set_aside,
)
from qlora_cli.training.optim import build_optimizer

CPU = torch.device("cpu")


def _optimizer(name: str, seed: int = 0) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    torch.manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(64, 128)), nn.Parameter(torch.randn(3, 5))]
    section = TrainingSection.model_validate({"optimizer": name, "learning_rate": 1e-2, "weight_decay": 0.1})
    return build_optimizer(section, parameters, CPU), parameters


def _steps(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], first: int, count: int) -> None:
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def _write_adapter(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"weights")


def _saved(folder: Path, step: int = 3) -> Path:
    optimizer, parameters = _optimizer("adamw_torch")
    _steps(optimizer, parameters, 0, 1)
    return save_checkpoint(folder, Progress(step=step), optimizer, _write_adapter)


@pytest.mark.parametrize("name", OptimizerName.__args__)
def test_restored_optimizers_go_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Three steps, save, three more = three steps, save, restore into a new optimizer, three more."""
    optimizer, parameters = _optimizer(name)
    _steps(optimizer, parameters, 0, 3)
    progress = Progress(step=3, tokens=70, seconds=1.5, window_loss=0.1, window_supervised=7)
    checkpoint = save_checkpoint(tmp_path, progress, optimizer, _write_adapter)
    middle = [parameter.detach().clone() for parameter in parameters]
    _steps(optimizer, parameters, 3, 3)

    again, copies = _optimizer(name, seed=1)
    with torch.no_grad():
        for copy, value in zip(copies, middle, strict=True):
            copy.copy_(value)
    assert restore_optimizer(checkpoint, again) == progress
    _steps(again, copies, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies, strict=True))


def test_nothing_in_a_checkpoint_needs_unpickling(tmp_path: Path) -> None:
    """safetensors and JSON only, and the manifest names every other file with its size."""
    checkpoint = _saved(tmp_path)
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} == {".safetensors", ".json"}
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert manifest["files"]["adapter/adapter_model.safetensors"]["bytes"] == len(b"weights")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_and_any_cut_is_seen(data: st.DataObject, tmp_path: Path) -> None:
    """Wherever a file but the manifest is damaged, the checkpoint is not valid any more; mended, it is again."""
    checkpoint = tmp_path / "step-000003"
    if not checkpoint.exists():
        _saved(tmp_path)
    assert find_fault(checkpoint) is None
    names = sorted(p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if p.is_file())
    # A flipped bit in the manifest's own whitespace changes nothing it says; its content is covered by the files'.
    file = checkpoint / data.draw(st.sampled_from([name for name in names if name != "manifest.json"]))
    original = file.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    if data.draw(st.booleans()):
        damaged = original[:position]
    else:
        flipped = original[position] ^ (1 << data.draw(st.integers(0, 7)))
        damaged = original[:position] + bytes([flipped]) + original[position + 1 :]
    file.write_bytes(damaged)
    assert find_fault(checkpoint) == f"{file.relative_to(checkpoint).as_posix()} is not what was written"
    file.write_bytes(original)


def test_faults_are_told(tmp_path: Path) -> None:
    """No manifest, a broken one, another version, a file too few or too many."""
    checkpoint = _saved(tmp_path)
    manifest = checkpoint / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format_version": 1', '"format_version": 9'))
    assert find_fault(checkpoint) == "has format version 9, this is 1"
    for broken in (text[:40], "[]", '{"format_version": 1, "files": 7}', '{"format_version": 1}'):
        manifest.write_text(broken)
        assert find_fault(checkpoint) == "manifest.json is damaged"
    manifest.write_text('{"format_version": 1, "files": []}')
    assert find_fault(checkpoint) == "adapter/adapter_model.safetensors does not belong there"
    manifest.unlink()
    assert find_fault(checkpoint) == "has no manifest.json"
    manifest.write_text(text)
    (checkpoint / "extra.bin").write_bytes(b"")
    assert find_fault(checkpoint) == "extra.bin does not belong there"
    (checkpoint / "extra.bin").unlink()
    (checkpoint / "state.json").unlink()
    assert find_fault(checkpoint) == "state.json is missing"


def test_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    """Newer damaged ones are passed over, each with its reason; 10 is newer than 9."""
    for step in (3, 9, 10):
        _saved(tmp_path, step)
    (tmp_path / "step-000010" / "state.json").write_text("{}")
    damaged = tmp_path / "step-000010"
    assert newest_valid(tmp_path) == (tmp_path / "step-000009", {damaged: "state.json is not what was written"})
    assert newest_valid(tmp_path / "nowhere") == (None, {})


def test_a_damaged_one_set_aside_costs_no_whole_one(tmp_path: Path) -> None:
    """Rotation counts what can be gone on from: a newer damaged checkpoint does not push the new one out."""
    for step in (5, 10):
        _saved(tmp_path, step)
    (tmp_path / "step-000010" / "state.json").write_text("{}")
    assert set_aside(tmp_path / "step-000010") == tmp_path / "damaged-step-000010"
    _saved(tmp_path, 6)
    rotate(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000006", "damaged-step-000010"}


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    """save_total_limit 2 keeps two; null keeps all."""
    for step in (1, 2, 3, 4):
        _saved(tmp_path, step)
    rotate(tmp_path, None)
    assert len(list_checkpoints(tmp_path)) == 4
    rotate(tmp_path, 2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004", "step-000003"]


def test_a_failed_save_leaves_nothing_and_harms_nothing(tmp_path: Path) -> None:
    """A disk that fills up in the middle: a message, the old checkpoint whole, no new one, no leftovers."""
    old = _saved(tmp_path, 3)
    optimizer, _ = _optimizer("adamw_torch")

    def full_disk(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError) as caught:
        save_checkpoint(tmp_path, Progress(step=4), optimizer, full_disk)
    assert str(caught.value) == f"{tmp_path / 'step-000004'}: could not be written: No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
    assert find_fault(old) is None


def test_a_replaced_folder_is_the_old_or_the_new(tmp_path: Path) -> None:
    """An error while writing keeps the old content; success swaps it whole, leftovers of a killed run included."""
    target = tmp_path / "adapter"
    (tmp_path / ".adapter.writing").mkdir()
    for content in ("old", "new"):
        with replacing_folder(target) as staging:
            (staging / "file").write_text(content)
    with pytest.raises(RunError, match="could not be written: File exists"), replacing_folder(target) as staging:
        staging.mkdir()
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old folder has its name again: at once if the process lives on, else at the next call."""
    target = tmp_path / "adapter"
    with replacing_folder(target) as staging:
        (staging / "file").write_text("old")
    rename, calls = Path.rename, []

    def die_at_the_second(self: Path, new: Path) -> Path:
        calls.append(new)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", die_at_the_second)
    with pytest.raises(KeyboardInterrupt), replacing_folder(target) as staging:
        (staging / "file").write_text("new")
    monkeypatch.undo()
    assert (target / "file").read_text() == "old"
    target.rename(tmp_path / ".adapter.old")  # what a kill leaves
    with pytest.raises(RunError), replacing_folder(target) as staging:
        staging.mkdir()
    assert (target / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    """State for more parameters than the run trains is told, not squeezed in."""
    checkpoint = _saved(tmp_path)
    section = TrainingSection()
    smaller = build_optimizer(section, [nn.Parameter(torch.zeros(2))], CPU)
    with pytest.raises(CheckpointError, match=r"does not fit this run's optimizer: it has state for 2 parameters"):
        restore_optimizer(checkpoint, smaller)
