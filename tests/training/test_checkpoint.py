"""A checkpoint is whole or it is not one, and gives back exactly what was saved."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qlora_cli.disk import replacing_folder
from qlora_cli.errors import CheckpointError, RunError
from qlora_cli.recipe.schema import OptimizerName, TrainingSection
from qlora_cli.training.checkpoint import (
    Progress,
    checkpoint_step,
    list_checkpoints,
    newest_valid,
    read_state,
    restore_optimizer,
    restore_random,
    rotate,
    set_aside,
    write_checkpoint,
)
from qlora_cli.training.manifest import Fault, FaultKind, find_fault
from qlora_cli.training.optim import build_optimizer
from tests.support.checkpoints import some_snapshot, write_some

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


_ADAPTER = {"adapter_model.safetensors": b"weights"}


def _saved(folder: Path, step: int = 3) -> Path:
    optimizer, parameters = _optimizer("adamw_torch")
    _steps(optimizer, parameters, 0, 1)
    return write_some(folder, step, optimizer, _ADAPTER)


@pytest.mark.parametrize("name", OptimizerName.__args__)
def test_restored_optimizers_go_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Three steps, save, three more = three steps, save, restore into a new optimizer, three more."""
    optimizer, parameters = _optimizer(name)
    _steps(optimizer, parameters, 0, 3)
    progress = Progress(step=3, tokens=70, seconds=1.5, window_loss=0.1, window_supervised=7)
    checkpoint = write_some(tmp_path, progress, optimizer)
    middle = [parameter.detach().clone() for parameter in parameters]
    _steps(optimizer, parameters, 3, 3)

    again, copies = _optimizer(name, seed=1)
    with torch.no_grad():
        for copy, value in zip(copies, middle, strict=True):
            copy.copy_(value)
    state = read_state(checkpoint)
    restore_optimizer(checkpoint, state, again)
    assert (state.progress, state.position, state.run) == (progress, {"epoch": 0}, {"seed": 1})
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


def test_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    """Newer damaged ones are passed over, each with its reason; 10 is newer than 9."""
    for step in (3, 9, 10):
        _saved(tmp_path, step)
    (tmp_path / "step-000010" / "state.json").write_text("{}")
    damaged = tmp_path / "step-000010"
    path, faults = newest_valid(tmp_path)
    assert path == tmp_path / "step-000009"
    assert list(faults) == [damaged]
    assert str(faults[damaged]).startswith("state.json has 2 bytes, ")
    assert newest_valid(tmp_path / "nowhere") == (None, {})


def test_a_damaged_one_set_aside_costs_no_whole_one(tmp_path: Path) -> None:
    """Rotation counts what can be gone on from: a newer damaged checkpoint does not push the new one out."""
    for step in (5, 10):
        _saved(tmp_path, step)
    (tmp_path / "step-000010" / "state.json").write_text("{}")
    fault = Fault("state.json has 2 bytes")
    assert set_aside(tmp_path / "step-000010", fault) == tmp_path / "damaged-step-000010"
    _saved(tmp_path, 6)
    rotate(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000006", "damaged-step-000010"}


def test_what_is_set_aside_replaces_nothing(tmp_path: Path) -> None:
    """The same step twice, and of another version, which is no damage: all of them stay, under names that tell."""
    names = []
    for kind in (FaultKind.DAMAGED, FaultKind.DAMAGED, FaultKind.OTHER_VERSION, FaultKind.OTHER_VERSION):
        names.append(set_aside(_saved(tmp_path, 3), Fault("x", kind)).name)
    assert names == [
        *("damaged-step-000003", "damaged-step-000003-2"),
        *("other-version-step-000003", "other-version-step-000003-2"),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert list_checkpoints(tmp_path) == []


def test_rotation_counts_what_looks_whole(tmp_path: Path) -> None:
    """A damaged one in between does not push out the last whole one; behind enough whole ones it goes, too."""
    for step in (1, 2, 3, 4):
        _saved(tmp_path, step)
    for step in (1, 3):
        (tmp_path / f"step-{step:06d}" / "state.json").unlink()
    rotate(tmp_path, 2)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [4, 3, 2]


def test_rotation_leaves_what_may_be_whole(tmp_path: Path) -> None:
    """Of another version, which can go on with it, or on a disk that is away: behind whole ones it stays."""
    for step in (1, 2, 3, 4, 5):
        _saved(tmp_path, step)
    (tmp_path / "step-000001" / "manifest.json").write_text('{"format_version": 1, "files": {}}')
    state = tmp_path / "step-000002" / "state.json"
    state.unlink()
    state.symlink_to("away")
    (tmp_path / "step-000003" / "state.json").unlink()
    rotate(tmp_path, 1)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [5, 2, 1]


def test_restored_state_is_in_memory(tmp_path: Path) -> None:
    """And not in the file, which rotation deletes and anybody may write into."""
    optimizer, parameters = _optimizer("adamw_torch")
    _steps(optimizer, parameters, 0, 1)
    checkpoint = write_some(tmp_path, 3, optimizer, _ADAPTER)
    restore_optimizer(checkpoint, read_state(checkpoint), optimizer)
    before = [state["exp_avg"].clone() for state in optimizer.state.values()]
    file = checkpoint / "optimizer.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(before, optimizer.state.values(), strict=True))


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    """A file, and digits that are none of ours."""
    for step in (3, 1_000_000):
        _saved(tmp_path, step)
    for name in ("step-²", "step-٣", "step-", "step-3a"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-9999999").write_text("")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1000000", "step-000003"]


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

    def full_disk() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError) as caught:
        write_checkpoint(tmp_path, some_snapshot(4, optimizer), go_on=full_disk)
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
        restore_optimizer(checkpoint, read_state(checkpoint), smaller)


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    """Python's, NumPy's and torch's draw on as if nothing had been in between, half-used pairs of normals included."""

    def draws() -> list[float]:
        python = [random.random(), random.gauss(0, 1)]
        return [*python, np.random.rand(), np.random.normal(), torch.rand(1).item(), torch.randn(1).item()]

    draws()
    checkpoint = _saved(tmp_path)
    expected = [draws(), draws()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    restore_random(checkpoint, read_state(checkpoint), 0, CPU)
    assert [draws(), draws()] == expected
    with pytest.raises(CheckpointError, match=r"step-000003: its random states cannot be taken over"):
        restore_random(checkpoint, read_state(checkpoint), 1, CPU)
