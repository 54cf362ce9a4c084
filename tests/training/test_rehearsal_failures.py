"""What the rehearsal finds is told, and a run that has trained nothing leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from qlora_cli.data.batches import Batch
from qlora_cli.disk import size_text
from qlora_cli.errors import CheckpointError, NonFiniteError, RunError
from qlora_cli.model.adapter import read_adapter_tensors
from qlora_cli.training import checkpoint as checkpoint_module
from qlora_cli.training import gradients as gradients_module
from qlora_cli.training import rehearsal as rehearsal_module
from qlora_cli.training import rehearsal_checkpoint as rehearsal_checkpoint_module
from qlora_cli.training.events import Event, Notice, StepDone
from qlora_cli.training.loss import supervised_loss
from qlora_cli.training.run import train
from tests.support.rehearsals import REHEARSING, bits, into, with_extremes
from tests.support.runs import tiny_recipe


def _over(tokens: int, error: Exception) -> Callable[[torch.nn.Module, Batch], torch.Tensor]:
    """A loss for which there is no memory where a batch has more tokens than these."""

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        if batch.input_ids.numel() > tokens:
            raise error
        return supervised_loss(model, batch)

    return loss


_NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes. Error code 12"),
)


@pytest.mark.parametrize("error", _NO_MEMORY, ids=["CUDA", "CPU"])
def test_a_batch_that_does_not_fit_is_told_and_nothing_is_left(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the longest batch is too large: said at once, with its rows and what to do, and the folders that were made
    are gone; with that mended the same command works."""
    recipe = with_extremes(tiny_recipe(tmp_path, rows=30, training={"max_steps": 9}))
    recipe = into(recipe, tmp_path / "some" / "where" / "run")
    monkeypatch.setattr(gradients_module, "supervised_loss", _over(4 * 49, error))
    steps: list[Event] = []
    with pytest.raises(RunError) as caught:
        train(recipe, listeners=[lambda event: steps.append(event) if isinstance(event, StepDone) else None])
    assert not steps
    assert str(caught.value) == (
        "rehearsal: the longest batch, 4 rows of 57 tokens, does not fit in the memory of cpu; nothing was trained "
        "yet. To need less: halve per_device_train_batch_size and double gradient_accumulation_steps; lower "
        f"dataset.max_length. Rows of {recipe.dataset.train} in it: line 24, 33, 34, 36"
    )
    assert not (tmp_path / "some").exists()
    monkeypatch.undo()
    train(recipe)


def test_a_held_out_batch_that_does_not_fit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice is of the evaluation's batch size; a single row has only its length to lose."""
    recipe = tiny_recipe(tmp_path, training={"per_device_eval_batch_size": 3})
    monkeypatch.setattr(rehearsal_module, "supervised_loss", _over(0, torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(RunError) as caught:
        train(recipe)
    advice = "nothing was trained yet. To need less: set per_device_eval_batch_size to less than 3; lower "
    assert str(caught.value) == (
        f"rehearsal: the longest held-out batch, 3 rows of 44 tokens, does not fit in the memory of cpu; {advice}"
        f"dataset.max_length. Rows of {recipe.dataset.validation} in it: line 4, 7, 8"
    )
    with pytest.raises(RunError, match=r", 1 row of 44 tokens, .* To need less: lower dataset\.max_length\. Rows of "):
        train(into(recipe, tmp_path / "run", per_device_eval_batch_size=1))
    assert not (tmp_path / "run").exists()


def test_rows_that_break_the_loss_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the longest batch, or in the longest held-out one: exit code 1, the rows named, nothing left."""
    recipe = with_extremes(tiny_recipe(tmp_path, rows=30, training={"max_steps": 9, "eval_on_start": False}))
    base = "Nothing was trained yet, so it is the base model that gives this: look at its weights, or at compute_dtype"

    def broken(model: torch.nn.Module, batch: Batch, limit: int) -> torch.Tensor:
        loss = supervised_loss(model, batch)
        return loss * torch.nan if batch.input_ids.shape[1] > limit else loss

    tried = ((gradients_module, "the longest batch", 50), (rehearsal_module, "the longest held-out batch", 0))
    for module, name, limit in tried:
        with monkeypatch.context() as patch:
            patch.setattr(module, "supervised_loss", partial(broken, limit=limit))
            with pytest.raises(NonFiniteError) as caught:
                train(recipe)
        message = str(caught.value)
        assert message.startswith(f"rehearsal: the loss is nan in {name}, before step 1. Rows of ")
        assert message.endswith(f". {base}")
        assert len(message.split(" in it: line ")[1].split(". ")[0].split(", ")) == 4
        assert not (tmp_path / "run").exists()
    train(recipe)


def test_a_base_that_breaks_every_batch_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step may be skipped, one batch of NaN is a notice; NaN in all of them is the base, which would train
    nothing: told before the first step, and nothing is left."""
    recipe = with_extremes(tiny_recipe(tmp_path, rows=30, validation_rows=0))
    recipe = into(recipe, tmp_path / "run", on_nonfinite="skip_step", max_steps=9)
    for limit, broken in ((50, False), (0, True)):

        def loss(model: torch.nn.Module, batch: Batch, limit: int = limit) -> torch.Tensor:
            right = supervised_loss(model, batch)
            return right * torch.nan if batch.input_ids.shape[1] > limit else right

        events: list[Event] = []
        with monkeypatch.context() as patch:
            patch.setattr(gradients_module, "supervised_loss", loss)
            if broken:
                with pytest.raises(NonFiniteError, match=r"^rehearsal: the loss is nan in the longest batch, bef"):
                    train(recipe, listeners=[events.append])
                assert not (tmp_path / "run").exists()
            else:
                train(into(recipe, tmp_path / "one"), listeners=[events.append])
        told = [event.text for event in events if isinstance(event, Notice) and event.text.startswith("rehearsal")]
        skipped = "training will skip it, as long as max_skipped_steps allows. Rows of "
        batch = "the shortest batch" if broken else "the longest batch"
        assert [text.split(skipped)[0] for text in told] == [f"rehearsal: the loss is nan in {batch}: "]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resumed_run_that_fails_in_it_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that break what was trained: `run.json` says how it ended, and all else is there to go on from."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    before = _contents(tmp_path / "run")
    longer = into(recipe, tmp_path / "run", max_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(gradients_module, "supervised_loss", lambda *given: supervised_loss(*given) * torch.nan)
        with pytest.raises(NonFiniteError) as caught:
            train(longer, resume=True)
    message = str(caught.value)
    assert message.startswith("rehearsal: the loss is nan in the shortest batch, before step 3. Rows of ")
    assert message.endswith(". Look at them, or at compute_dtype; the state after step 2 is as it was")
    after = _contents(tmp_path / "run")
    assert json.loads(after["run.json"])["error"] == message
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed == {"run.json", "recipe.yaml"}
    train(longer, resume=True)
    train(into(recipe, tmp_path / "whole", max_steps=4), rehearse=False)
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk shows before the first step; of the attempt nothing is left, in a resumed run no more than before."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    full = OSError(28, "No space left on device")

    def write(path: Path, *_: Any) -> None:
        if path.name == "optimizer.safetensors":
            raise full

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_bytes", write)
        with pytest.raises(RunError) as caught:
            train(recipe)
    told, size = str(caught.value), caught.value.args[0].split(" of ")[1].split(",")[0]
    assert told == (
        f"rehearsal: a checkpoint, of {size}, in {tmp_path / 'run' / 'checkpoints'}: could not be written: No space "
        "left on device; nothing was trained yet. Mend that, or train into another folder with --output-dir"
    )
    assert size.endswith("kB")
    assert not (tmp_path / "run").exists()

    train(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_bytes", write)
        with pytest.raises(RunError, match=r"No space left on device; what was saved before is whole\. Mend that, "):
            train(into(recipe, tmp_path / "run", max_steps=4), resume=True)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


def test_a_disk_that_became_read_only_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be taken back then, which is not what is told."""

    def fail(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(Path, "unlink", fail)
        monkeypatch.setattr(Path, "rmdir", fail)
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoint_module, "write_bytes", fail)
    with pytest.raises(RunError, match=r"^rehearsal: a checkpoint, .* Read-only file system; nothing was trained yet"):
        train(tiny_recipe(tmp_path))


def test_a_checkpoint_that_is_read_otherwise_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight comes back as another: told, before anybody counts on it."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        tensors = read_adapter_tensors(folder)
        name = next(iter(tensors))
        return tensors | {name: tensors[name] + 1}

    monkeypatch.setattr(rehearsal_checkpoint_module, "read_adapter_tensors", read)
    with pytest.raises(CheckpointError, match=r"step-000000: was written, and read again the trained weights are oth"):
        train(tiny_recipe(tmp_path))


class _Usage(NamedTuple):
    free: int


@pytest.mark.parametrize(
    ("limit", "resumed", "number", "way_out"),
    [(2, False, 3, "lower"), (2, True, 1, "lower"), (None, False, 5, "set"), (9, False, 5, "lower")],
)
def test_a_disk_without_room_is_told(
    limit: int | None, resumed: bool, number: int, way_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for the checkpoints there will be at a time, one more than are kept, or for all to come if they are fewer:
    less than that ends it with both sizes, and if the run may stop early before they are all there, it is a notice;
    that much is neither."""
    recipe = tiny_recipe(
        tmp_path,
        training={"max_steps": 2 if resumed else 9, "save_steps": 1 if resumed else 2, "save_total_limit": limit},
    )
    if resumed:
        train(recipe)
        recipe = into(recipe, tmp_path / "run", max_steps=9)
    for short, patience in ((True, None), (True, 5), (False, None)):
        folder = tmp_path / f"run-{short}-{patience}"
        if resumed:
            shutil.copytree(tmp_path / "run", folder)
        events: list[Event] = []
        needed: list[int] = []

        def usage(_path: Path, short: bool = short, needed: list[int] = needed) -> _Usage:
            return _Usage(needed[0] - short)

        def write(*args: Any, needed: list[int] = needed, **kwargs: Any) -> Path:
            needed.append(number * args[1].bytes)
            return checkpoint_module.write_checkpoint(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(rehearsal_checkpoint_module, "write_checkpoint", write)
            patch.setattr(rehearsal_checkpoint_module.shutil, "disk_usage", usage)
            again = into(recipe, folder, early_stopping_patience=patience, eval_steps=3)
            refused = ""
            try:
                train(again, resume=resumed, listeners=[events.append])
            except RunError as error:
                refused = str(error)
        told = [event.text for event in events if isinstance(event, Notice) and "of room" in event.text]
        wanted = (
            f"the disk of {folder / 'checkpoints'} has {size_text(needed[0] - 1)} of room, and the run will hold "
            f"{number} more checkpoint{'s' * (number > 1)} of {size_text(needed[0] // number)}: make room, or "
            f"{way_out} training.save_total_limit"
        )
        begin = "; --no-rehearsal begins all the same"
        assert refused == (f"rehearsal: {wanted}{begin}" if short and patience is None else "")
        assert told == ([wanted] if short and patience else [])
        assert (folder / "adapter").exists() == (resumed or not refused)


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    """Ctrl-C in the rehearsal, into a folder that holds something else: that is what is left in it."""
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")

    def stop(event: Event) -> None:
        if event == REHEARSING:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, listeners=[stop])
    assert _contents(tmp_path / "run") == {"notes.txt": b"mine"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
