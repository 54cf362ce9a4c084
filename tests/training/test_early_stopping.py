"""Runs that stop when the held-out loss falls no more, and end in the adapter with the lowest."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.errors import CheckpointError, Interrupted
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training import loop as loop_module
from qlora_cli.training.benchmarks import Benchmarks
from qlora_cli.training.best_checkpoint import Measured
from qlora_cli.training.checkpoint import Progress
from qlora_cli.training.early_stopping import judged, measured_losses, reason_to_stop
from qlora_cli.training.events import BestKept, CheckpointSaved, EvalRecord, Event, Finished, Notice, StepDone
from qlora_cli.training.run import train
from tests.support.faults import at_step, checkpoint_names, crash, digest, metric_lines, run_record, with_training
from tests.support.runs import read_metrics, tiny_recipe
from tests.support.scored_runs import scored_recipe

# By step: the lowest is that after step 3, and the first of two equal ones.
LOSSES = {0: 0.1, 1: 2.0, 2: 1.5, 3: 1.0, 4: 1.25, 5: 1.0, 6: 1.5, 7: 0.5, 8: 2.0}
EACH = {"eval_steps": 1, "save_steps": 2, "save_total_limit": 1}
REASON = "no lower held-out loss than 1.0000, after step 3, in 3 evaluations in a row"
TOLD = Notice(
    f"stopped early after step 6: {REASON}. To train on all the same, raise training.early_stopping_patience and "
    "--resume"
)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out losses are those above, whatever is trained."""

    def told(*_: Any, step: int, stopping: Callable[[], bool], **__: Any) -> EvalRecord:
        if stopping():
            raise Interrupted("left off")
        return EvalRecord(step, LOSSES[step], None, 1, 0.0)

    monkeypatch.setattr(loop_module, "evaluate", told)


def _adapter(folder: Path) -> dict[str, bytes]:
    """The two files that PEFT reads."""
    return {name: (folder / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")}


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# ------------------------------------------------------------------------------------------- The state machine


@given(
    losses=st.lists(st.sampled_from([0.5, 1.0, 1.5, float("inf")]), max_size=12),
    patience=st.integers(1, 4),
    start=st.booleans(),
)
def test_when_it_stops(losses: list[float], patience: int, start: bool) -> None:
    """Against the definition: as soon as the last `patience` losses are none of them lower than the lowest before
    them; the best is the first of the lowest; what was measured before the first step is no loss."""
    progress = judged(Progress(), 0, 0.0) if start else Progress()
    assert (progress.best_eval_loss, progress.best_eval_step) == (None, None)
    for step, loss in enumerate(losses, start=1):
        progress = judged(progress, step, loss)
        so_far = losses[:step]
        assert (progress.evaluated_step, progress.best_eval_loss) == (step, min(so_far))
        assert progress.best_eval_step == so_far.index(min(so_far)) + 1
        stops = len(so_far) > patience and min(so_far[:-patience]) <= min(so_far[-patience:])
        assert (reason_to_stop(progress, patience) is not None) == stops
        assert reason_to_stop(progress, None) is None


def test_why_it_stops() -> None:
    """One evaluation is not several in a row."""
    progress = Progress(best_eval_loss=1.5, best_eval_step=2, evaluations_without_improvement=1)
    assert reason_to_stop(progress, 1) == "no lower held-out loss than 1.5000, after step 2, in 1 evaluation"
    assert reason_to_stop(progress, 2) is None


def test_which_losses_a_resumed_run_has() -> None:
    """Of those recorded, the ones that are not to be measured again; and the best, were it recorded nowhere."""
    progress = Progress(step=4, evaluated_step=2, best_eval_step=1, best_eval_loss=0.5)
    assert measured_losses(progress, [(2, 0.75), (4, 0.25)]) == [Measured(1, 0.5), Measured(2, 0.75)]
    assert measured_losses(Progress(), [(2, 0.75)]) == []


# ------------------------------------------------------------------------------------------- Whole runs


@pytest.mark.usefixtures("losses")
def test_an_early_stop(tmp_path: Path) -> None:
    """Three evaluations in a row are not below that after step 3: the run is complete after step 6 of 8, has told all
    of its steps, and says why; its adapter is that of the last step."""
    recipe = tiny_recipe(tmp_path, training=EACH | {"early_stopping_patience": 3, "logging_steps": 4})
    events: list[Event] = []
    finished = train(recipe, listeners=[events.append])
    run = tmp_path / "run"
    assert (finished.steps, finished.stopped_early, finished.loaded, finished.adapter_step) == (6, REASON, None, 6)
    assert TOLD in events
    record = run_record(run)
    assert (record["status"], record["stopped_early"], record["adapter_step"]) == ("completed", REASON, 6)
    assert [line["step"] for line in read_metrics(run, "train")] == [4, 6]
    assert [line["step"] for line in read_metrics(run, "eval")] == [0, 1, 2, 3, 4, 5, 6]
    assert checkpoint_names(run) == ["step-000006"]
    assert _adapter(run / "adapter") == _adapter(run / "checkpoints" / "step-000006" / "adapter")


@pytest.mark.usefixtures("losses")
def test_a_run_that_stopped_early_stays_so(tmp_path: Path) -> None:
    """Resumed as it was, it says so and changes nothing; with more patience it goes on from there, to the adapter of
    the run that had it from the start."""
    recipe = tiny_recipe(tmp_path, training=EACH | {"early_stopping_patience": 3, "load_best": True})
    train(recipe)
    run = tmp_path / "run"
    before = metric_lines(run), digest(run), checkpoint_names(run)
    events: list[Event] = []
    train(recipe, resume=True, listeners=[events.append])
    assert TOLD in events
    assert not any(isinstance(event, StepDone | EvalRecord | CheckpointSaved) for event in events)
    assert (metric_lines(run), digest(run), checkpoint_names(run)) == before
    assert run_record(run)["stopped_early"] == REASON
    more = with_training(recipe, early_stopping_patience=4)
    finished = train(more, resume=True)
    assert (finished.steps, finished.stopped_early, finished.adapter_step) == (8, None, 7)
    assert run_record(run)["stopped_early"] is None
    train(with_training(more, tmp_path / "whole"))
    assert digest(run) == digest(tmp_path / "whole")
    assert metric_lines(run) == metric_lines(tmp_path / "whole")


@pytest.mark.usefixtures("losses")
def test_patience_at_the_last_step_is_no_early_stop(tmp_path: Path) -> None:
    """All steps were done: nothing is said of stopping."""
    finished = train(tiny_recipe(tmp_path, training=EACH | {"early_stopping_patience": 3, "max_steps": 6}))
    assert (finished.steps, finished.stopped_early) == (6, None)


@pytest.mark.usefixtures("losses")
def test_the_best_adapter_is_the_result(tmp_path: Path) -> None:
    """The best of 6 steps is the third, which no save_steps would have saved: it is saved, stays beside the newest, and
    its files are adapter/'s, bit for bit. run.json and `Finished` say which step it is."""
    recipe = tiny_recipe(tmp_path, training=EACH | {"load_best": True, "max_steps": 6})
    events: list[Event] = []
    finished = train(recipe, listeners=[events.append])
    run = tmp_path / "run"
    assert checkpoint_names(run) == ["step-000003", "step-000006"]
    best, last = (_adapter(run / "checkpoints" / f"step-00000{step}" / "adapter") for step in (3, 6))
    assert _adapter(run / "adapter") == best != last
    assert (run / "adapter" / "tokenizer_config.json").exists()
    kept = BestKept(3, "eval_loss", 1.0, run / "checkpoints" / "step-000003")
    assert [event for event in events if isinstance(event, BestKept)][-1] == kept
    assert (finished.steps, finished.loaded, finished.adapter_step) == (6, kept, 3)
    record = run_record(run)
    assert record["best_eval"] == {"step": 3, "score": "eval_loss", "value": 1.0, "checkpoint": "step-000003"}
    assert (record["best"], record["adapter_step"]) == (None, 3)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("step", "action"), itertools.product((1, 3, 4, 5), (_interrupt, crash)))
@pytest.mark.usefixtures("losses")
def test_interrupted_and_gone_on_with(step: int, action: Callable[[], None], accumulation: int, tmp_path: Path) -> None:
    """Before the best is found, in its step, and after it, by a signal or as good as killed: the resumed run stops at
    the same step with the same adapter and the same records as the run that was never stopped."""
    training = EACH | {"early_stopping_patience": 3, "load_best": True, "gradient_accumulation_steps": accumulation}
    recipe = tiny_recipe(tmp_path, lora={"dropout": 0.1}, training=training)
    train(with_training(recipe, tmp_path / "whole"))
    with pytest.raises((Interrupted, ZeroDivisionError)):
        train(recipe, listeners=[at_step(step, action)])
    finished = train(recipe, resume=True)
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert (finished.steps, finished.adapter_step) == (6, 3)
    assert digest(run) == digest(whole)
    assert metric_lines(run) == metric_lines(whole)
    assert checkpoint_names(run) == checkpoint_names(whole)
    for name in ("best_eval", "stopped_early", "adapter_step"):
        assert run_record(run)[name] == run_record(whole)[name]


@pytest.mark.parametrize("fault", ["gone", "damaged"])
@pytest.mark.usefixtures("losses")
def test_a_best_checkpoint_that_is_lost(fault: str, tmp_path: Path) -> None:
    """It is said that it is, and the best of what there is, or of what comes, is the result."""
    recipe = tiny_recipe(tmp_path, training=EACH | {"load_best": True, "max_steps": 6})
    with pytest.raises(Interrupted):
        train(recipe, listeners=[at_step(4, _interrupt)])
    run = tmp_path / "run"
    lost = run / "checkpoints" / "step-000003"
    if fault == "gone":
        lost.rename(tmp_path / "elsewhere")
        why = "is not there any more"
    else:
        weights = lost / "adapter" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[::-1])
        why = "cannot be taken (adapter/adapter_model.safetensors is not what was written: its SHA-256 is another)"
    events: list[Event] = []
    finished = train(recipe, resume=True, listeners=[events.append])
    # The signal came in step 4, whose evaluation was left off: there is no other yet.
    assert Notice(f"eval_loss was best after step 3, whose checkpoint {why}: the best from here on is kept") in events
    assert (finished.adapter_step, run_record(run)["best_eval"]["step"]) == (5, 5)
    assert _adapter(run / "adapter") == _adapter(run / "checkpoints" / "step-000005" / "adapter")


@pytest.mark.usefixtures("losses")
def test_a_best_checkpoint_that_is_damaged_at_the_end(tmp_path: Path) -> None:
    """It would have been the result: the run fails and says so; resumed, it takes the best of the others."""
    recipe = tiny_recipe(tmp_path, training=EACH | {"load_best": True, "max_steps": 6})
    run = tmp_path / "run"
    damaged = run / "checkpoints" / "step-000003"
    with pytest.raises(CheckpointError) as caught:
        train(recipe, listeners=[at_step(5, lambda: (damaged / "state.json").unlink())])
    assert str(caught.value) == (
        f"training.load_best: the adapter of {damaged} was to be the result, and that checkpoint is damaged "
        "(state.json is missing). Go on with --resume, for the best of the others"
    )
    assert not (run / "adapter").exists()
    assert train(recipe, resume=True).adapter_step == 6


@pytest.mark.usefixtures("losses")
def test_it_may_be_asked_for_later_or_no_more(tmp_path: Path) -> None:
    """A complete run is resumed with `load_best`: of the checkpoints that are there the best is taken, and what is lost
    is told. Resumed without it, the adapter is that of the last step again, and no checkpoint is called the best."""
    recipe = tiny_recipe(tmp_path, training=EACH | {"max_steps": 6, "save_total_limit": 2})
    run = tmp_path / "run"
    train(recipe)
    events: list[Event] = []
    assert train(with_training(recipe, load_best=True), resume=True, listeners=[events.append]).adapter_step == 4
    told = "eval_loss was best after step 3, whose checkpoint is not there any more: the best of the others is kept"
    assert Notice(told) in events
    assert train(recipe, resume=True).adapter_step == 6
    assert (run_record(run)["best_eval"], run_record(run)["adapter_step"]) == (None, 6)
    assert _adapter(run / "adapter") == _adapter(run / "checkpoints" / "step-000006" / "adapter")


def test_the_measured_loss_decides(tmp_path: Path) -> None:
    """Without anything made up: a learning rate that is far too high from some step on, so that the held-out loss rises
    again; the run stops, and the adapter has the lowest loss of metrics.jsonl."""
    recipe = tiny_recipe(
        tmp_path,
        training={"max_steps": 60, "learning_rate": 0.3, "warmup_steps": 40, "eval_steps": 2, "logging_steps": 60}
        | {"early_stopping_patience": 2, "load_best": True, "save_total_limit": 1, "max_grad_norm": None},
    )
    finished = train(recipe)
    records = read_metrics(tmp_path / "run", "eval")[1:]
    best = min(records, key=lambda record: record["eval_loss"])
    assert finished.stopped_early is not None
    assert finished.adapter_step == best["step"] == records[-3]["step"] < finished.steps == records[-1]["step"] < 60
    assert finished.loaded is not None
    assert finished.loaded.value == best["eval_loss"]


# ------------------------------------------------------------------------------------------- With benchmarks


@pytest.mark.usefixtures("losses", "indexed")
def test_both_kinds_of_best_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best score after step 2, the lowest loss after step 3, rotation to one checkpoint, a stop after step 4: both
    stay to the end, the model is scored where the run stops early, and each is the best of its own kind."""
    scores = {0: 0.9, 2: 0.75, 4: 0.5, 6: 0.25}
    at: list[int] = []
    score = Benchmarks.score

    def note(self: Benchmarks, model: Any, step: int, stopping: Any) -> Any:
        at.append(step)
        return score(self, model, step, stopping)

    monkeypatch.setattr(Benchmarks, "score", note)
    monkeypatch.setattr(
        Benchmarks,
        "_results",
        lambda *_: {"words": {"bits_per_byte,none": 2.0}, "colours": {"acc,none": scores[at[-1]]}},
    )
    recipe = scored_recipe(
        tmp_path,
        evaluation={"every_steps": 2, "keep_best": "colours/acc"},
        training=EACH | {"early_stopping_patience": 3, "load_best": True},
    )
    whole = Recipe.model_validate(recipe.model_dump(exclude_unset=True) | {"output_dir": str(tmp_path / "whole")})
    train(whole)
    with pytest.raises(Interrupted):
        train(recipe, listeners=[at_step(4, _interrupt)])
    finished = train(recipe, resume=True)
    assert isinstance(finished, Finished)
    assert (finished.best is not None, finished.loaded is not None) == (True, True)
    for run in (tmp_path / "run", tmp_path / "whole"):
        assert checkpoint_names(run) == ["step-000002", "step-000003", "step-000006"]
        record = run_record(run)
        assert (record["best"]["step"], record["best_eval"]["step"], record["adapter_step"]) == (2, 3, 3)
        assert [line["step"] for line in read_metrics(run, "benchmark")] == [0, 2, 4, 6]
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert json.dumps(metric_lines(tmp_path / "run")) == json.dumps(metric_lines(tmp_path / "whole"))
