"""Steps whose loss or gradient is NaN or infinite: passed over without a trace, named, and only so often."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from qlora_cli.errors import NonFiniteError
from qlora_cli.training import gradients as gradients_module
from qlora_cli.training.events import Event, StepDone, StepSkipped
from qlora_cli.training.run import train as train_rehearsed
from tests.support.faults import (
    FAULTS,
    broken_at,
    checkpoint_names,
    digest,
    metric_lines,
    run_record,
    with_training,
)
from tests.support.runs import read_metrics, tiny_recipe

SKIP = {"on_nonfinite": "skip_step"}
# Losses are broken by the number of the call.
train = partial(train_rehearsed, rehearse=False)


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_skipped_step_changes_nothing(
    kind: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 of 4 is broken: the weights and the optimizer's whole state after it are, byte for byte, those after step
    2, and step 4 trains on. (Rank 64, or the 8-bit optimizers would keep 32 bits of what is small.)"""
    training = {"max_steps": 4, "optimizer": optimizer, "save_steps": 1, "save_total_limit": None} | SKIP
    recipe = tiny_recipe(tmp_path, validation_rows=0, lora={"rank": 64}, training=training)
    monkeypatch.setattr(gradients_module, "supervised_loss", broken_at({3}, FAULTS[kind]))
    train(recipe)
    for name in ("optimizer.safetensors", "adapter/adapter_model.safetensors"):
        two, three, four = (
            (tmp_path / "run" / "checkpoints" / f"step-00000{step}" / name).read_bytes() for step in (2, 3, 4)
        )
        assert two == three != four, name


def test_a_skipped_step_is_told_and_not_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two micro-batches of step 3 is NaN: its rows are named, metrics.jsonl has the step in place of its
    loss, and the record after it holds the loss of step 4 alone; tokens and schedule are as ever."""
    training = {"max_steps": 6, "gradient_accumulation_steps": 2, "logging_steps": 2, "lr_scheduler_type": "cosine"}
    recipe = tiny_recipe(tmp_path, validation_rows=0, training=training | SKIP)
    train(with_training(recipe, tmp_path / "whole"))
    monkeypatch.setattr(gradients_module, "supervised_loss", broken_at({5}, FAULTS["loss"]))
    events: list[Event] = []
    finished = train(recipe, listeners=[events.append])
    run, whole = tmp_path / "run", tmp_path / "whole"
    (skipped,) = [event for event in events if isinstance(event, StepSkipped)]
    assert (skipped.step, skipped.reason) == (3, "loss is nan")
    start = f"Rows of {tmp_path / 'train-32.jsonl'} in it: line "
    assert skipped.rows.startswith(start)
    assert len(skipped.rows.removeprefix(start).split(", ")) == 4  # of one micro-batch, not of the step
    lines = metric_lines(run)
    assert [(line["event"], line["step"]) for line in lines] == [
        ("train", 2), ("skipped", 3), ("train", 4), ("train", 6)
    ]  # fmt: skip
    assert lines[1] == {"event": "skipped", "step": 3, "reason": "loss is nan", "rows": skipped.rows}
    done = {event.step: event for event in events if isinstance(event, StepDone)}
    assert sorted(done) == [1, 2, 4, 5, 6]
    assert (lines[2]["loss"], lines[2]["grad_norm"]) == (done[4].loss, done[4].grad_norm)
    for field in ("tokens", "learning_rate", "epoch"):
        assert [line[field] for line in read_metrics(run, "train")] == [
            line[field] for line in read_metrics(whole, "train")
        ]
    assert digest(run) != digest(whole)
    assert (finished.skipped_steps, run_record(run)["skipped_steps"], run_record(whole)["skipped_steps"]) == (1, 1, 0)


def test_a_window_of_skipped_steps_has_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 3 and 4, all of the second window: nothing is told of it but the steps; so it is at the end, with 7 and 8.
    The last record's norm is that of the step that was taken."""
    recipe = tiny_recipe(tmp_path, validation_rows=0, training={"max_steps": 8, "logging_steps": 2} | SKIP)
    monkeypatch.setattr(gradients_module, "supervised_loss", broken_at({3, 4, 6, 7, 8}, FAULTS["gradient"]))
    train(recipe)
    lines = metric_lines(tmp_path / "run")
    assert [(line["event"], line["step"]) for line in lines] == [
        ("train", 2), ("skipped", 3), ("skipped", 4), ("skipped", 6), ("train", 6), ("skipped", 7), ("skipped", 8)
    ]  # fmt: skip
    assert lines[1]["reason"] == "gradient norm is nan"
    assert 0 < lines[4]["grad_norm"] < 100
    assert run_record(tmp_path / "run")["last_train"]["step"] == 6


def test_the_bound_holds_through_resumptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 2 and 4 are skipped, which is all that may be; step 5 stops the run, names its rows and saves step 4. Gone
    on with, step 5 stops it again; without the fault the run ends as one that never had it."""
    training = {"max_steps": 6, "save_steps": 3, "max_skipped_steps": 2} | SKIP
    recipe = tiny_recipe(tmp_path, validation_rows=0, lora={"dropout": 0.1}, training=training)
    run = tmp_path / "run"
    for calls, resume in (({2, 4, 5}, False), ({1}, True)):
        monkeypatch.setattr(gradients_module, "supervised_loss", broken_at(calls, FAULTS["loss"]))
        with pytest.raises(NonFiniteError) as caught:
            train(recipe, resume=resume)
        assert str(caught.value).startswith(
            "step 5: the loss is nan after 2 steps that had to be skipped, as many as training.max_skipped_steps "
            f"allows, so training stopped; the state after step 4 is saved. Rows of {tmp_path / 'train-32.jsonl'} in "
            "it: line "
        )
        assert checkpoint_names(run) == ["step-000003", "step-000004"]
        assert (run_record(run)["status"], run_record(run)["skipped_steps"]) == ("failed", 2)
    monkeypatch.undo()
    train(recipe, resume=True)
    monkeypatch.setattr(gradients_module, "supervised_loss", broken_at({2, 4}, FAULTS["loss"]))
    train(with_training(recipe, tmp_path / "whole"))
    assert digest(run) == digest(tmp_path / "whole")
    assert metric_lines(run) == metric_lines(tmp_path / "whole")
    assert run_record(run)["skipped_steps"] == run_record(tmp_path / "whole")["skipped_steps"] == 2


def test_a_run_that_stopped_may_go_on_with_skipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows were looked at, and are as they are: `on_nonfinite` and its bound are free to change."""
    recipe = tiny_recipe(tmp_path, validation_rows=0, training={"max_steps": 4})
    monkeypatch.setattr(gradients_module, "supervised_loss", broken_at({3}, FAULTS["loss"]))
    with pytest.raises(NonFiniteError, match=r"^step 3: the loss is nan, so training stopped; the state after step 2 "):
        train(recipe)
    monkeypatch.setattr(gradients_module, "supervised_loss", broken_at({1}, FAULTS["loss"]))
    train(with_training(recipe, max_skipped_steps=1, **SKIP), resume=True)
    assert [(line["event"], line["step"]) for line in metric_lines(tmp_path / "run")] == [
        ("train", 1), ("train", 2), ("skipped", 3), ("train", 4)
    ]  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw_torch", "lion_8bit"])
def test_a_first_step_that_is_skipped_can_be_gone_on_from(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no optimizer state yet, and the checkpoint is one all the same."""
    training = {"max_steps": 3, "optimizer": optimizer, "save_steps": 1, "max_skipped_steps": 1} | SKIP
    recipe = tiny_recipe(tmp_path, validation_rows=0, training=training)
    monkeypatch.setattr(gradients_module, "supervised_loss", broken_at({1, 2}, FAULTS["gradient"]))
    with pytest.raises(NonFiniteError, match=r"^step 2: .* after 1 step that had to be skipped, .* step 1 is saved\."):
        train(recipe)
    monkeypatch.undo()
    train(recipe, resume=True)
    monkeypatch.setattr(gradients_module, "supervised_loss", broken_at({1}, FAULTS["gradient"]))
    train(with_training(recipe, tmp_path / "whole"))
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
