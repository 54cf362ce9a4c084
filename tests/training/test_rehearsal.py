"""The rehearsal finds what would fail hours later, and leaves no trace."""

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
from qlora_cli.recipe.schema import OptimizerName, Recipe
from qlora_cli.training import checkpoint as checkpoint_module
from qlora_cli.training import gradients as gradients_module
from qlora_cli.training import rehearsal as rehearsal_module
from qlora_cli.training import rehearsal_checkpoint as rehearsal_checkpoint_module
from qlora_cli.training.checkpoint import RandomStates
from qlora_cli.training.events import Event, Notice, Rehearsed, Stage, StepDone
from qlora_cli.training.loss import supervised_loss
from qlora_cli.training.run import train
from tests.support.runs import read_metrics, tiny_recipe

CPU = torch.device("cpu")
NAMES: tuple[str, ...] = OptimizerName.__args__
_REHEARSING = Stage("rehearsing the longest batch")


def _into(recipe: Recipe, folder: Path, **training: Any) -> Recipe:
    """The recipe with other training settings, into another folder."""
    data = recipe.model_dump(exclude_unset=True)
    data["training"] |= training
    return Recipe.model_validate(data | {"output_dir": str(folder)})


def _bits(run: Path) -> dict[str, bytes]:
    """What a run has trained: its adapter, and the state of its last checkpoint but for the clock."""
    last = max((run / "checkpoints").iterdir())
    files = [run / "adapter" / "adapter_model.safetensors", *(last / name for name in ("random.safetensors",))]
    return {file.name: file.read_bytes() for file in [*files, last / "optimizer.safetensors"]}


def _losses(run: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(run, "train")]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("optimizer", NAMES)
def test_a_run_ends_in_the_same_bits_with_it_and_without(optimizer: str, packing: bool, tmp_path: Path) -> None:
    """Every optimizer, rows and packs, with dropout, accumulation and an evaluation; rehearsed at the start, or at the
    start and where the run goes on: adapter, optimizer state, random states, losses and gradient norms are the same."""
    recipe = tiny_recipe(
        tmp_path,
        rows=20,
        lora={"dropout": 0.2, "rank": 64},
        dataset={"packing": packing, "max_length": 64},
        training={"optimizer": optimizer, "max_steps": 4, "gradient_accumulation_steps": 2, "eval_steps": 2}
        | {"per_device_train_batch_size": 2, "gradient_checkpointing": packing},
    )
    train(_into(recipe, tmp_path / "plain"), rehearse=False)
    train(_into(recipe, tmp_path / "rehearsed"))
    events: list[Event] = []
    train(_into(recipe, tmp_path / "resumed", max_steps=2))
    train(_into(recipe, tmp_path / "resumed"), resume=True, listeners=[events.append])
    assert [type(event) for event in events].count(Rehearsed) == 1
    for name in ("rehearsed", "resumed"):
        assert _bits(tmp_path / name) == _bits(tmp_path / "plain")
        assert _losses(tmp_path / name) == _losses(tmp_path / "plain")


class _Seen(NamedTuple):
    """A batch that went through the model."""

    shape: tuple[int, ...]
    supervised: int


def _seen(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[_Seen]:
    """The batches whose loss a module computes."""
    seen: list[_Seen] = []

    def note(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(_Seen(tuple(batch.input_ids.shape), batch.supervised_tokens))
        return supervised_loss(model, batch)

    monkeypatch.setattr(module, "supervised_loss", note)
    return seen


def _with_extremes(recipe: Recipe) -> Recipe:
    """Among the rows some with much to read, and some with much to learn."""
    rows = Path(recipe.dataset.train)
    odd = [("red " * 20, "apple")] * 3 + [("red", "apple " * 12)] * 3
    rows.write_text(rows.read_text() + "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in odd))
    return recipe


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_tried_is_the_worst_to_come(accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First a small batch, so that the optimizer's state is there; then that with the most to learn and the longest,
    each after a small one where gradients are accumulated; then the longest held-out one. Over the epoch that follows,
    no batch is larger in either sense."""
    training = {"max_steps": 18 // accumulation, "per_device_train_batch_size": 2, "optimizer": "adamw_torch"}
    recipe = tiny_recipe(
        tmp_path, rows=30, training=training | {"gradient_accumulation_steps": accumulation, "eval_steps": None}
    )
    trained, held_out = _seen(monkeypatch, gradients_module), _seen(monkeypatch, rehearsal_module)
    events: list[Event] = []
    train(_with_extremes(recipe), listeners=[events.append])
    tried, steps = trained[: 1 + 2 * accumulation], trained[1 + 2 * accumulation :]
    assert len(steps) == 18

    def tokens(batch: _Seen) -> int:
        return batch.shape[0] * batch.shape[1]

    assert tokens(tried[0]) == min(map(tokens, steps))
    assert tried[1:-1] == [tried[0]] * (accumulation - 1) + [tried[accumulation]] + [tried[0]] * (accumulation - 1)
    assert tried[accumulation].supervised == max(batch.supervised for batch in steps)
    assert tokens(tried[-1]) == max(map(tokens, steps))
    assert tried[-1].supervised < tried[accumulation].supervised
    (told,) = (event for event in events if isinstance(event, Rehearsed))
    assert (told.rows, told.tokens) == tried[-1].shape
    assert [batch.shape[0] for batch in held_out] == [2]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["timings"]["rehearsal"] == vars(told)
    weights = (tmp_path / "run" / "checkpoints" / "step-000018" if accumulation == 1 else tmp_path / "run").rglob("*")
    assert told.checkpoint_bytes > sum(path.stat().st_size for path in weights if path.name == "optimizer.safetensors")


def test_it_draws_nothing(tmp_path: Path) -> None:
    """Random states before and after it are the same, with dropout inside."""
    states: list[RandomStates] = []

    def note(event: Event) -> None:
        if event == _REHEARSING or isinstance(event, Rehearsed):
            states.append(RandomStates.here(CPU))

    train(tiny_recipe(tmp_path, lora={"dropout": 0.3}, training={"max_steps": 1}), listeners=[note])
    before, after = states
    assert before.numbers == after.numbers
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())


def test_with_no_step_left_there_is_none(tmp_path: Path) -> None:
    """A complete run that is resumed is complete: nothing is tried."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 1})
    train(recipe)
    events: list[Event] = []
    train(recipe, resume=True, listeners=[events.append])
    assert _REHEARSING not in events


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
    recipe = _with_extremes(tiny_recipe(tmp_path, rows=30, training={"max_steps": 9}))
    recipe = _into(recipe, tmp_path / "some" / "where" / "run")
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
        train(_into(recipe, tmp_path / "run", per_device_eval_batch_size=1))
    assert not (tmp_path / "run").exists()


def test_rows_that_break_the_loss_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the longest batch, or in the longest held-out one: exit code 1, the rows named, nothing left."""
    recipe = _with_extremes(tiny_recipe(tmp_path, rows=30, training={"max_steps": 9, "eval_on_start": False}))
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


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_resumed_run_that_fails_in_it_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that break what was trained: `run.json` says how it ended, and all else is there to go on from."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    before = _contents(tmp_path / "run")
    longer = _into(recipe, tmp_path / "run", max_steps=4)
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
    train(_into(recipe, tmp_path / "whole", max_steps=4), rehearse=False)
    assert _bits(tmp_path / "run") == _bits(tmp_path / "whole")


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
    scratch = tmp_path / "run" / "checkpoints" / ".rehearsal.writing"
    assert str(caught.value) == f"{scratch / 'step-000000'}: could not be written: No space left on device"
    assert not (tmp_path / "run").exists()

    train(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_bytes", write)
        with pytest.raises(RunError, match=r"No space left on device"):
            train(_into(recipe, tmp_path / "run", max_steps=4), resume=True)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


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
    less than that is a notice with both sizes, and the run goes on; that much is none."""
    recipe = tiny_recipe(
        tmp_path,
        training={"max_steps": 2 if resumed else 9, "save_steps": 1 if resumed else 2, "save_total_limit": limit},
    )
    if resumed:
        train(recipe)
        recipe = _into(recipe, tmp_path / "run", max_steps=9)
    for short in (True, False):
        folder = tmp_path / f"run-{short}"
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
            train(_into(recipe, folder), resume=resumed, listeners=[events.append])
        told = [event.text for event in events if isinstance(event, Notice) and "of room" in event.text]
        wanted = (
            f"the disk of {folder / 'checkpoints'} has {size_text(needed[0] - 1)} of room, and the run will hold "
            f"{number} more checkpoint{'s' * (number > 1)} of {size_text(needed[0] // number)}: make room, or "
            f"{way_out} training.save_total_limit"
        )
        assert told == [wanted] * short


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    """Ctrl-C in the rehearsal, into a folder that holds something else: that is what is left in it."""
    recipe = tiny_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")

    def stop(event: Event) -> None:
        if event == _REHEARSING:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, listeners=[stop])
    assert _contents(tmp_path / "run") == {"notes.txt": b"mine"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
