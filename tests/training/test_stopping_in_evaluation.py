"""Evaluations that are left off, or that memory does not suffice for: nothing that was trained is lost by them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.errors import Interrupted, NonFiniteError, OutOfMemoryError, RunError
from qlora_cli.evaluation.answering.memory import ran_out
from qlora_cli.training import evaluation as evaluation_module
from qlora_cli.training import gradients as gradients_module
from qlora_cli.training.benchmarks import Benchmarks
from qlora_cli.training.events import EvalRecord, EvaluationProgress, Event, Listener, StepDone
from qlora_cli.training.run import train
from tests.support.faults import (
    broken_at,
    checkpoint_names,
    digest,
    metric_lines,
    out_of_memory,
    run_record,
    with_training,
)
from tests.support.runs import read_metrics, tiny_recipe
from tests.support.scored_runs import scored_recipe

# Four batches in an evaluation, after the steps 0, 4 and 8.
TRAINING = {"per_device_eval_batch_size": 2, "eval_steps": 4, "save_steps": 3}


def _in_evaluation(step: int, batch: int, kind: signal.Signals = signal.SIGTERM) -> Listener:
    """A listener that sends a signal after a batch of the evaluation after a step."""
    done = [0]

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            done.append(event.step)
        if isinstance(event, EvaluationProgress) and (done[-1], event.done) == (step, batch):
            os.kill(os.getpid(), kind)

    return listen


# ------------------------------------------------------------------------------------------- Left off


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("step", "batch"), [(4, 1), (4, 3), (8, 2)])
def test_an_evaluation_is_left_off(kind: signal.Signals, step: int, batch: int, tmp_path: Path) -> None:
    """A signal in the middle: no further batch is computed, the step's state is saved, the evaluation is not recorded.
    The resumed run makes it first, and ends as the run that was never stopped: adapter and records, each once."""
    recipe = tiny_recipe(tmp_path, lora={"dropout": 0.1}, training=TRAINING)
    train(with_training(recipe, tmp_path / "whole"))
    batches: list[Event] = []

    def listen(event: Event) -> None:
        if isinstance(event, EvaluationProgress):
            batches.append(event)

    with pytest.raises(Interrupted, match=rf"^{kind.name}: stopped after step {step}, state saved$"):
        train(recipe, listeners=[listen, _in_evaluation(step, batch, kind)])
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert len(batches) == step + batch  # of four each, the evaluations after every fourth step before this one
    assert checkpoint_names(run)[-1] == f"step-{step:06d}"
    assert [line["step"] for line in read_metrics(run, "eval")] == [s for s in (0, 4) if s < step]
    assert run_record(run)["status"] == "interrupted"
    assert not (run / "adapter").exists()
    first: list[Event] = []
    train(recipe, resume=True, listeners=[first.append])
    done = [event for event in first if isinstance(event, StepDone | EvalRecord)]
    assert (type(done[0]), done[0].step) == (EvalRecord, step)
    assert digest(run) == digest(whole)
    assert metric_lines(run) == metric_lines(whole)


def test_a_signal_in_a_step_spares_the_evaluation(tmp_path: Path) -> None:
    """It comes in step 4, after which an evaluation is due: that is not begun."""
    recipe = tiny_recipe(tmp_path, training=TRAINING | {"eval_on_start": False})
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if isinstance(event, StepDone) and event.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"^SIGTERM: stopped after step 4, state saved$"):
        train(recipe, listeners=[listen])
    assert not any(isinstance(event, EvaluationProgress) for event in events)


def test_an_owed_evaluation_is_left_off_again(tmp_path: Path) -> None:
    """Stopped in it, resumed, stopped in it: the state is there as it was, and the third part ends as ever."""
    recipe = tiny_recipe(tmp_path, training=TRAINING)
    train(with_training(recipe, tmp_path / "whole"))
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(recipe, listeners=[_in_evaluation(4, 2)])
    names = checkpoint_names(run)
    with pytest.raises(Interrupted, match=r"^SIGTERM: stopped after step 4, state saved$"):
        train(recipe, resume=True, listeners=[_in_evaluation(0, 2)])  # no step of this part is done
    assert checkpoint_names(run) == names
    train(recipe, resume=True)
    assert digest(run) == digest(tmp_path / "whole")
    assert metric_lines(run) == metric_lines(tmp_path / "whole")


def test_a_signal_before_the_first_step(tmp_path: Path) -> None:
    """In the second batch of the first evaluation: there is nothing to save, and that is said; resumed, it begins."""
    recipe = tiny_recipe(tmp_path, training=TRAINING)
    with pytest.raises(Interrupted) as caught:
        train(recipe, listeners=[_in_evaluation(0, 2)])
    assert str(caught.value) == "SIGTERM: stopped before the first step, nothing was trained yet"
    run = tmp_path / "run"
    assert checkpoint_names(run) == []
    assert run_record(run)["status"] == "interrupted"
    train(recipe, resume=True)
    assert [line["step"] for line in read_metrics(run, "eval")] == [0, 4, 8]


# ------------------------------------------------------------------------------------------- Out of memory


def test_an_evaluation_that_runs_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the third of four batches after step 4: step 4 is saved before the message says so, and what to set. With the
    smaller batch, the resumed run makes that evaluation and ends as one that never failed."""
    recipe = tiny_recipe(tmp_path, lora={"dropout": 0.1}, training=TRAINING | {"eval_on_start": False})
    monkeypatch.setattr(evaluation_module, "supervised_loss", broken_at({3}, out_of_memory))
    with pytest.raises(OutOfMemoryError) as caught:
        train(recipe)
    assert str(caught.value) == (
        "evaluation after step 4 ran out of memory on cpu; the state after step 4 is saved. Set "
        "training.per_device_eval_batch_size lower (it is 2) and go on with --resume"
    )
    assert (isinstance(caught.value, RunError), caught.value.exit_code) == (True, 1)
    run = tmp_path / "run"
    assert checkpoint_names(run) == ["step-000003", "step-000004"]
    record = run_record(run)
    assert (record["status"], record["error"], record["last_checkpoint"]) == (
        "failed", str(caught.value), "step-000004"
    )  # fmt: skip
    monkeypatch.undo()
    smaller = with_training(recipe, per_device_eval_batch_size=1)
    train(smaller, resume=True)
    train(with_training(smaller, tmp_path / "whole"))
    assert digest(run) == digest(tmp_path / "whole")
    assert metric_lines(run) == metric_lines(tmp_path / "whole")


@pytest.mark.parametrize(
    ("training", "advice"),
    [
        ({}, "Set training.per_device_eval_batch_size lower (it is 4) and go on with --resume"),
        (
            {"per_device_eval_batch_size": 1},
            "training.per_device_eval_batch_size is 1 already: go on with --resume where there is more memory",
        ),
    ],
)
def test_before_the_first_step(
    training: dict[str, int], advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to save; and where a batch is of one row already, no smaller one is asked for."""
    monkeypatch.setattr(evaluation_module, "supervised_loss", broken_at({1}, out_of_memory))
    with pytest.raises(OutOfMemoryError) as caught:
        train(tiny_recipe(tmp_path, training=training))
    assert str(caught.value) == (
        f"evaluation before the first step ran out of memory on cpu; nothing was trained yet. {advice}"
    )
    assert checkpoint_names(tmp_path / "run") == []


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_whatever_it_is_called(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's error, and Python's own."""

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(evaluation_module, "supervised_loss", broken_at({1}, fail))
    with pytest.raises(OutOfMemoryError, match=r"^evaluation before the first step ran out of memory on cpu; "):
        train(tiny_recipe(tmp_path))


def test_training_that_runs_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second micro-batch of step 3: step 2 is saved, though no checkpoint was due, what needs less is named, and
    with enough memory the run goes on to the same end. In the first step there is nothing to save."""
    recipe = tiny_recipe(tmp_path, training={"gradient_accumulation_steps": 2, "max_steps": 4})
    told = "{} on cpu; {}. To need less: halve per_device_train_batch_size and double gradient_accumulation_steps; "
    told += "lower dataset.max_length"
    cases = (
        ("first", 1, told.format("step 1 ran out of memory", "nothing was trained yet")),
        ("third", 6, told.format("step 3 ran out of memory", "the state after step 2 is saved")),
    )
    for name, call, message in cases:
        monkeypatch.setattr(gradients_module, "supervised_loss", broken_at({call}, out_of_memory))
        with pytest.raises(OutOfMemoryError) as caught:
            train(with_training(recipe, tmp_path / name), rehearse=False)
        assert str(caught.value) == message
    assert (checkpoint_names(tmp_path / "first"), checkpoint_names(tmp_path / "third")) == ([], ["step-000002"])
    monkeypatch.undo()
    train(with_training(recipe, tmp_path / "third"), resume=True)
    train(with_training(recipe, tmp_path / "whole"))
    assert digest(tmp_path / "third") == digest(tmp_path / "whole")


def test_what_is_no_lack_of_memory() -> None:
    """A message of ours that speaks of it, and other faults."""
    assert not ran_out(OutOfMemoryError("out of memory on cpu"))
    assert not ran_out(NonFiniteError("can't allocate memory"))
    assert not ran_out(RuntimeError("shapes cannot be multiplied"))


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Scoring runs out of memory, until this is called."""

    def fail(self: Benchmarks, *_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(Benchmarks, "_results", fail)
        yield patch.undo


@pytest.mark.usefixtures("indexed")
def test_scoring_that_runs_out_of_memory(tmp_path: Path, fails: Callable[[], None]) -> None:
    """After step 3, and before the first: the same, with the setting that is for it."""
    recipe = scored_recipe(tmp_path, evaluation={"at_start": False})
    with pytest.raises(OutOfMemoryError) as caught:
        train(recipe)
    assert str(caught.value) == (
        "scoring after step 3 ran out of memory on cpu; the state after step 3 is saved. Set "
        "evaluation.per_device_batch_size lower (by default it is as many as it takes) and go on with --resume"
    )
    assert checkpoint_names(tmp_path / "run") == ["step-000003"]
    early = scored_recipe(tmp_path, evaluation={"per_device_batch_size": 8})
    with pytest.raises(OutOfMemoryError) as caught:
        train(with_training(early, tmp_path / "early"))
    assert str(caught.value) == (
        "scoring before the first step ran out of memory on cpu; nothing was trained yet. Set "
        "evaluation.per_device_batch_size lower (it is 8) and go on with --resume"
    )
    fails()
    train(recipe, resume=True)
    assert [line["step"] for line in read_metrics(tmp_path / "run", "benchmark")] == [3, 6, 8]
