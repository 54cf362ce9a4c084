"""A checkpoint is whole or it is not one, and gives back exactly what was saved."""

from __future__ import annotations

import hashlib
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
    list_checkpoints,
    newest_valid,
    read_state,
    restore_optimizer,
    restore_random,
    rotate,
    set_aside,
    write_checkpoint,
)
from qlora_cli.training.manifest import find_fault
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


def test_any_flipped_bit_and_any_cut_is_seen(tmp_path: Path) -> None:
    """500 places drawn over all files of a checkpoint, its manifest among them, each file alike: a flipped bit there,
    or the file cut there, and it is not valid any more; mended, it is again."""
    checkpoint = _saved(tmp_path)
    assert find_fault(checkpoint) is None
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    draw = random.Random(0)
    for number in range(500):
        file = files[number % len(files)]
        original = file.read_bytes()
        position = draw.randrange(len(original))
        name = file.relative_to(checkpoint).as_posix()
        if draw.random() < 0.5:
            file.write_bytes(original[:position])
            told = f"{name} has {position:,} bytes, {len(original):,} were written"
        else:
            flipped = original[position] ^ (1 << draw.randrange(8))
            file.write_bytes(original[:position] + bytes([flipped]) + original[position + 1 :])
            told = f"{name} is not what was written: its SHA-256 is another"
        assert find_fault(checkpoint) == ("manifest.json is damaged" if name == "manifest.json" else told)
        file.write_bytes(original)
    assert find_fault(checkpoint) is None


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """No byte of it can change without being seen, its blanks and the names in it included."""
    checkpoint = _saved(tmp_path)
    manifest = checkpoint / "manifest.json"
    original = manifest.read_bytes()
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 1
        manifest.write_bytes(changed)
        assert find_fault(checkpoint) == "manifest.json is damaged", position


def _sign(manifest: Path, change: dict[str, object]) -> None:
    """Change a manifest as another version of the tool might have written it."""
    data = json.loads(manifest.read_text()) | change
    del data["sha256"]
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    signed = data | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    manifest.write_text(json.dumps(signed, indent=2, ensure_ascii=False) + "\n")


def test_faults_are_told(tmp_path: Path) -> None:
    """No manifest, a broken one, another version, a file too few or too many."""
    checkpoint = _saved(tmp_path)
    manifest = checkpoint / "manifest.json"
    text = manifest.read_text()
    _sign(manifest, {"format_version": 9})
    other = "has format version {}, this is 2: another version of this tool wrote it"
    assert find_fault(checkpoint) == other.format(9)
    manifest.write_text('{"format_version": 1, "files": {}}')  # the first version's had no sum of their own
    assert find_fault(checkpoint) == other.format(1)
    for broken in (
        text[:40],
        "[]",
        '{"format_version": 2, "files": 7}',
        '{"format_version": 2}',
        "\ud800",
        "[" * 10**5,
    ):
        manifest.write_bytes(broken.encode("utf-8", "surrogatepass"))
        assert find_fault(checkpoint) == "manifest.json is damaged"
    manifest.write_text(text)
    _sign(manifest, {"files": {}})
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
    path, faults = newest_valid(tmp_path)
    assert path == tmp_path / "step-000009"
    assert list(faults) == [damaged]
    assert faults[damaged].startswith("state.json has 2 bytes, ")
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
