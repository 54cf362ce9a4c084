"""Scores while a model is trained: what is refused before, what is recorded, and that training never notices."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from qlora_cli.errors import EvaluationError, Interrupted, OutputError, TaskError
from qlora_cli.evaluation.events import Asking
from qlora_cli.model.base import load_base
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import EvaluationSection, Recipe
from qlora_cli.training.benchmark_plan import plan_benchmarks, times_scored
from qlora_cli.training.benchmarks import Benchmarks
from qlora_cli.training.events import BenchmarkRecord, Event, Finished, Notice, StepDone
from qlora_cli.training.run import train
from tests.support.benchmarks import write_data_root
from tests.support.faults import at_step, crash
from tests.support.runs import read_metrics
from tests.support.scored_runs import scored_recipe

pytestmark = pytest.mark.usefixtures("indexed")

CPU = torch.device("cpu")
CLOCKS = ("seconds", "tokens_per_second")


def _digest(run: Path) -> str:
    return hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def _lines(run: Path) -> list[dict[str, Any]]:
    """All of metrics.jsonl, but for what clocks say."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if name not in CLOCKS} for record in records]


def _into(recipe: Recipe, folder: Path, **evaluation: Any) -> Recipe:
    data = recipe.model_dump(exclude_unset=True)
    data["evaluation"] |= evaluation
    return Recipe.model_validate(data | {"output_dir": str(folder)})


def _record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def _checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps after which the model was really asked, and not only looked up."""
    steps: list[int] = []
    score, results = Benchmarks.score, Benchmarks._results

    def spy(self: Benchmarks, *args: Any) -> Any:
        steps.append(self.at)  # type: ignore[attr-defined]
        return results(self, *args)

    def note(self: Benchmarks, model: Any, step: int, stopping: Any) -> BenchmarkRecord:
        self.at = step  # type: ignore[attr-defined]
        return score(self, model, step, stopping)

    monkeypatch.setattr(Benchmarks, "_results", spy)
    monkeypatch.setattr(Benchmarks, "score", note)
    return steps


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What `colours` scores, one after the other, in place of what the model does."""
    values: list[float] = []

    def told(self: Benchmarks, *_: Any) -> dict[str, dict[str, float]]:
        return {"words": {"bits_per_byte,none": 2.0}, "colours": {"acc,none": values.pop(0)}}

    monkeypatch.setattr(Benchmarks, "_results", told)
    return values


# ------------------------------------------------------------------------------------------- What is recorded


def test_what_a_scored_run_leaves(tmp_path: Path) -> None:
    """A line in metrics.jsonl for each time, before the first step, every 3 and after the last; first and last in
    run.json; nothing else in the folder."""
    recipe = scored_recipe(tmp_path)
    finished = train(recipe)
    run = tmp_path / "run"
    records = read_metrics(run, "benchmark")
    assert [record["step"] for record in records] == [0, 3, 6, 8]
    assert records[0].keys() == {"event", "step", "scores", "members", "weights", "seconds", "partial"}
    assert list(records[0]["scores"]) == [
        "words/word_perplexity", "words/bits_per_byte", "colours/acc", "colours/acc_stderr"
    ]  # fmt: skip
    # It learns other words of the same kind: what it reads becomes likelier.
    assert records[-1]["scores"]["words/bits_per_byte"] < records[0]["scores"]["words/bits_per_byte"] - 0.1
    assert len({record["weights"] for record in records}) == 4
    record = _record(run)
    assert record["first_benchmark"] == {name: records[0][name] for name in ("step", "scores", "seconds", "partial")}
    assert record["last_benchmark"] == {name: records[-1][name] for name in ("step", "scores", "seconds", "partial")}
    assert record["best"] is None
    assert (finished.first_scores, finished.last_scores) == (records[0]["scores"], records[-1]["scores"])
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml", "run.json", "metrics.jsonl", "adapter", "checkpoints", ".lock"
    }  # fmt: skip
    # Time that it was scored in is not time that it was trained in.
    trained = read_metrics(run, "train")[-1]["seconds"]
    assert trained == finished.seconds == record["timings"]["training_seconds"]
    assert trained + sum(each["seconds"] for each in records) < record["timings"]["total_seconds"]


def test_the_hf_backend_scores_the_adapter_as_the_run_did(tmp_path: Path) -> None:
    """lm-eval's own backend, over PEFT's model of the base in 4 bits and the adapter that was saved: the same scores,
    examples drawn for the prompts among what makes them so."""
    recipe = scored_recipe(tmp_path, evaluation={"at_start": False, "every_steps": None})
    train(recipe)
    run = tmp_path / "run"
    base = load_base(ModelSource(recipe.base_model), recipe.quantization, CPU)
    model = peft.PeftModel.from_pretrained(base, run / "adapter").eval()
    backend = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(run / "adapter"), batch_size=1)
    plan = plan_benchmarks(recipe.evaluation)
    assert plan is not None
    for task in plan.loaded.tasks.values():
        task.set_fewshot_seed(1234)
    found = evaluate(backend, {"tasks": plan.loaded.tasks, "groups": {}}, bootstrap_iters=0)["results"]
    (record,) = read_metrics(run, "benchmark")
    assert record["scores"]["colours/acc"] == found["colours"]["acc,none"]
    assert record["scores"]["words/bits_per_byte"] == pytest.approx(found["words"]["bits_per_byte,none"], rel=1e-5)


def test_groups_and_their_tasks(tmp_path: Path) -> None:
    """Of a group the aggregate is shown, its tasks are among the members; a part of one is scored, and that is said."""
    root = write_data_root(tmp_path / "data")
    names = {"tasks": ["mmlu", "rte"], "task_path": None, "data_root": str(root), "limit": 2, "every_steps": None}
    recipe = scored_recipe(
        tmp_path, evaluation={**names, "at_start": False, "allow_partial": True}, training={"max_steps": 1}
    )
    events: list[Event] = []
    train(recipe, listeners=[events.append])
    (record,) = read_metrics(tmp_path / "run", "benchmark")
    assert list(record["scores"]) == ["mmlu/acc", "mmlu/acc_stderr", "rte/acc", "rte/acc_stderr"]
    assert {"mmlu_stem/acc", "mmlu_anatomy/acc"} <= record["members"].keys()
    told = [event.text for event in events if isinstance(event, Notice)]
    assert any(text.startswith("mmlu: scored on 4 of its 57 tasks") for text in told)


# ------------------------------------------------------------------------------------------- What training notices


def test_scoring_does_not_disturb_training(tmp_path: Path) -> None:
    """With dropout, a run that is scored at every step ends in the bits of one that never is."""
    recipe = scored_recipe(tmp_path, lora={"dropout": 0.3}, training={"max_steps": 4})
    train(_into(recipe, tmp_path / "often", every_steps=1))
    train(_into(recipe, tmp_path / "never", tasks=[], every_steps=None, at_start=False, data_root=None, task_path=None))
    assert _digest(tmp_path / "often") == _digest(tmp_path / "never")
    trained = [
        [line for line in _lines(tmp_path / name) if line["event"] != "benchmark"] for name in ("often", "never")
    ]
    assert trained[0] == trained[1]


def test_packed_rows_change_no_score(tmp_path: Path) -> None:
    """What keeps the rows of a pack apart in training is out of the way in scoring: before the first step, the model
    scores as one that is not packed, to float32 noise, and is packed again afterwards."""
    found = []
    for packing in (False, True):
        recipe = scored_recipe(tmp_path, dataset={"packing": packing, "max_length": 64}, training={"max_steps": 3})
        train(_into(recipe, tmp_path / str(packing), every_steps=2))
        found.append(read_metrics(tmp_path / str(packing), "benchmark")[0]["scores"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    never = _into(recipe, tmp_path / "never", every_steps=None, at_start=False)
    train(never)
    assert _digest(tmp_path / "never") == _digest(tmp_path / "True")


# ------------------------------------------------------------------------------------------- Stopped and gone on with


def test_a_stopped_run_goes_on_to_the_same_scores(tmp_path: Path, asked: list[int]) -> None:
    """Ctrl-C after step 5 of 8: the adapter and all of metrics.jsonl are those of the run that was never stopped, and
    nothing is asked twice."""
    recipe = scored_recipe(tmp_path, lora={"dropout": 0.1}, evaluation={"keep_best": "words/bits_per_byte"})
    train(_into(recipe, tmp_path / "whole"))
    asked.clear()
    stopped = _into(recipe, tmp_path / "stopped")
    with pytest.raises(Interrupted, match=r"^SIGINT: stopped after step 5, state saved$"):
        train(stopped, listeners=[at_step(5, _interrupt)])
    train(stopped, resume=True)
    assert asked == [0, 3, 6, 8]
    assert _digest(tmp_path / "whole") == _digest(tmp_path / "stopped")
    assert _lines(tmp_path / "whole") == _lines(tmp_path / "stopped")
    first, second = (_record(tmp_path / name) for name in ("whole", "stopped"))
    assert first["best"] is not None
    assert first["best"] == second["best"]
    train(stopped, resume=True)  # once more: nothing is left to do
    assert asked == [0, 3, 6, 8]
    assert _record(tmp_path / "stopped")["best"] == first["best"]


def test_scores_beyond_the_checkpoint_are_not_asked_for_again(tmp_path: Path, asked: list[int]) -> None:
    """Killed after step 7 with step 5 saved: step 6 was scored, the resumed run comes by the same weights, and takes
    the score as it was. With other weights under that step, it asks."""
    recipe = scored_recipe(tmp_path, training={"save_steps": 5})
    train(_into(recipe, tmp_path / "whole"))
    for name, expected in (("same", [8]), ("other", [6, 8])):
        killed = _into(recipe, tmp_path / name)
        with pytest.raises(ZeroDivisionError):
            train(killed, listeners=[at_step(7, crash)])
        metrics = tmp_path / name / "metrics.jsonl"
        if name == "other":
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
            changed = [line | {"weights": "0"} if line.get("weights") and line["step"] == 6 else line for line in lines]
            metrics.write_text("".join(json.dumps(line) + "\n" for line in changed))
        with metrics.open("a") as file:
            file.write('{"event": "benchmark", "step"')  # a kill in the middle of a line
        asked.clear()
        train(killed, resume=True)
        assert asked == expected
        assert _lines(tmp_path / name) == _lines(tmp_path / "whole")


def test_a_checkpoint_that_is_kept_no_more_is_not_called_the_best(tmp_path: Path, scores: list[float]) -> None:
    """Gone on with without `keep_best`: rotation takes it, and run.json does not name what is not there."""
    scores += [0.0, 0.8, 0.1, 0.1]
    training = {"max_steps": 6, "save_steps": 1, "save_total_limit": 1}
    recipe = scored_recipe(tmp_path, evaluation={"every_steps": 2, "keep_best": "colours/acc"}, training=training)
    with pytest.raises(Interrupted):
        train(recipe, listeners=[at_step(3, _interrupt)])
    assert _record(tmp_path / "run")["best"]["checkpoint"] == "step-000002"
    train(_into(recipe, tmp_path / "run", keep_best=None), resume=True)
    assert _checkpoints(tmp_path / "run") == ["step-000006"]
    assert _record(tmp_path / "run")["best"] is None


@pytest.mark.parametrize("step", [6, 8])
def test_ctrl_c_while_it_is_scored(step: int, tmp_path: Path, asked: list[int]) -> None:
    """Scoring is left off at once, in the middle of the run or after its last step: the state is saved, and the resumed
    run scores that step before it goes on, without the questions that had an answer."""
    recipe = scored_recipe(tmp_path, training={"save_steps": 50})
    train(_into(recipe, tmp_path / "whole"))
    stopped = _into(recipe, tmp_path / "stopped")
    done: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            done.append(event.step)
        if isinstance(event, Asking) and event.kind == "loglikelihood" and done[-1:] == [step]:
            _interrupt()

    with pytest.raises(Interrupted, match=rf"^SIGINT: stopped after step {step}, state saved$"):
        train(stopped, listeners=[listen])
    run = tmp_path / "stopped"
    assert _checkpoints(run) == [f"step-{step:06d}"]
    assert not (run / "adapter").exists()
    assert _record(run)["status"] == "interrupted"
    assert any((run / "answers").iterdir())
    asked.clear()
    kept: list[int] = []
    train(stopped, resume=True, listeners=[lambda event: isinstance(event, Asking) and kept.append(event.kept)])
    assert asked == [step, *([8] if step < 8 else [])]
    assert max(kept) == 5  # of `words`, which was asked before
    assert _digest(tmp_path / "whole") == _digest(run)
    assert _lines(tmp_path / "whole") == _lines(run)
    assert not (run / "answers").exists()


def test_other_questions_under_the_same_name_are_refused(tmp_path: Path) -> None:
    """A resumed run asks what its first part asked, but as often as it likes; one that was not scored may be now."""
    recipe = scored_recipe(tmp_path, training={"max_steps": 2})
    run = tmp_path / "run"
    train(recipe)
    with pytest.raises(OutputError, match=r"\n  evaluation\.limit: was None, is 2\n"):
        train(_into(recipe, run, limit=2), resume=True)
    train(_into(recipe, run, every_steps=1, keep_best="colours/acc"), resume=True)
    none = _into(recipe, tmp_path / "none", tasks=[], every_steps=None, at_start=False, data_root=None, task_path=None)
    train(none)
    train(_into(recipe, tmp_path / "none"), resume=True)
    assert [record["step"] for record in read_metrics(tmp_path / "none", "benchmark")] == [2]


def test_a_score_of_a_part_of_a_group_says_so(tmp_path: Path) -> None:
    """In metrics.jsonl and run.json, where the scores are; of what is whole nothing is said."""
    write_data_root(tmp_path / "benchmarks")
    recipe = scored_recipe(
        tmp_path,
        training={"max_steps": 1},
        evaluation={
            "tasks": ["mmlu_stem", "arc_easy"], "task_path": None, "data_root": str(tmp_path / "benchmarks"),
            "allow_partial": True, "at_start": False, "every_steps": None, "limit": 1,
        },
    )  # fmt: skip
    train(recipe)
    (line,) = read_metrics(tmp_path / "run", "benchmark")
    assert line["partial"] == {"mmlu_stem": "2 of 19 tasks"}
    assert _record(tmp_path / "run")["last_benchmark"]["partial"] == line["partial"]
    train(recipe, resume=True)


# ------------------------------------------------------------------------------------------- The best checkpoint


def test_the_best_checkpoint_stays(tmp_path: Path, scores: list[float]) -> None:
    """Best after step 2, the first of two equal ones, although the base was better still; rotation to one checkpoint
    passes over it, and run.json says which it is."""
    scores += [0.9, 0.1, 0.5, 0.5, 0.4, 0.2, 0.3]
    recipe = scored_recipe(
        tmp_path,
        evaluation={"every_steps": 1, "keep_best": "colours/acc"},
        training={"max_steps": 6, "save_steps": 1, "save_total_limit": 1},
    )
    finished = train(recipe)
    run = tmp_path / "run"
    assert _checkpoints(run) == ["step-000002", "step-000006"]
    best = {"step": 2, "score": "colours/acc", "value": 0.5, "checkpoint": "step-000002"}
    assert _record(run)["best"] == best
    assert finished.best is not None
    assert (finished.best.step, finished.best.path) == (2, run / "checkpoints" / "step-000002")


def test_the_best_is_saved_where_nothing_else_is(tmp_path: Path, scores: list[float]) -> None:
    """Without checkpoints on the way, each new best is one, and the one before it goes."""
    scores += [0.0, 0.2, 0.1, 0.3, 0.25]
    training = {"max_steps": 4, "save_steps": None, "save_total_limit": 1}
    evaluation = {"every_steps": 1, "keep_best": "colours/acc"}
    train(scored_recipe(tmp_path, evaluation=evaluation, training=training))
    assert _checkpoints(tmp_path / "run") == ["step-000003", "step-000004"]


def test_the_best_survives_a_resumption(tmp_path: Path, scores: list[float]) -> None:
    """Stopped after the best was found: it stays the best, and stays, as long as nothing is better."""
    scores += [0.0, 0.2, 0.8, 0.1]
    training = {"max_steps": 8, "save_steps": 1, "save_total_limit": 1}
    recipe = scored_recipe(tmp_path, evaluation={"every_steps": 1, "keep_best": "colours/acc"}, training=training)
    with pytest.raises(Interrupted):
        train(recipe, listeners=[at_step(3, _interrupt)])
    scores[:] = [0.3, 0.7, 0.6, 0.5, 0.4]
    events: list[Event] = []
    train(recipe, resume=True, listeners=[events.append])
    assert _checkpoints(tmp_path / "run") == ["step-000002", "step-000008"]
    assert _record(tmp_path / "run")["best"]["step"] == 2
    assert not any(isinstance(event, Notice) and "was best" in event.text for event in events)


def test_a_best_checkpoint_that_is_gone_is_told(tmp_path: Path, scores: list[float]) -> None:
    """Damaged, say: the next best that is whole takes its place."""
    scores += [0.0, 0.2, 0.8, 0.1]
    training = {"max_steps": 3, "save_steps": 1, "save_total_limit": None}
    recipe = scored_recipe(tmp_path, evaluation={"every_steps": 1, "keep_best": "colours/acc"}, training=training)
    train(recipe)
    state = tmp_path / "run" / "checkpoints" / "step-000002" / "state.json"
    size = state.stat().st_size
    state.write_text("{}")
    events: list[Event] = []
    train(recipe, resume=True, listeners=[events.append])
    fault = f"state.json has 2 bytes, {size:,} were written"
    told = (
        f"colours/acc was best after step 2, whose checkpoint cannot be taken ({fault}): the best of the others is kept"
    )
    assert Notice(told) in events
    assert _record(tmp_path / "run")["best"]["step"] == 1


# ------------------------------------------------------------------------------------------- What is refused


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"tasks": ["words", "mlmu"]}, "evaluation.tasks: 'mlmu' is no task, group or tag that lm-eval knows"),
        ({"tasks": ["arc_easy"]}, "is not below evaluation.data_root"),
        ({"tasks": ["mmlu"]}, "have no data below evaluation.data_root"),
        ({"tasks": ["humaneval"]}, "qlora eval --run-unsafe-code allows that"),
        (
            {"keep_best": "word/acc"},
            "evaluation.keep_best: 'word' is not among the tasks and groups that are scored; did you mean words?",
        ),
        (
            {"keep_best": "colours/ac"},
            "evaluation.keep_best: colours has acc, not 'ac'; did you mean colours/acc?",
        ),
        (
            {"keep_best": "both/bits_per_byte", "tasks": ["both"]},
            "evaluation.keep_best: both has acc, not 'bits_per_byte'",
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_is_refused_before_weights_are_loaded(
    evaluation: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that there are not, data that is missing, code that may not run, a score to choose by that there is not:
    told in the recipe's words, and there is no run folder."""

    def never(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("qlora_cli.training.loading.load_base", never)
    with pytest.raises(TaskError) as caught:
        train(scored_recipe(tmp_path, evaluation=evaluation))
    assert message in str(caught.value)
    assert "--data-root" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    """Prompts as conversations need one."""
    recipe = scored_recipe(tmp_path, evaluation={"apply_chat_template": True}, training={"max_steps": 1})
    train(recipe)
    tokenizer = AutoTokenizer.from_pretrained(recipe.base_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(recipe.base_model)
    (Path(recipe.base_model) / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(TaskError, match=r"^evaluation: prompts are to be rendered with a chat template"):
        train(_into(recipe, tmp_path / "other"))


def test_a_scoring_that_fails_saves_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After step 3, in the middle: which step it was, what went wrong, and that its state is saved; resumed, the run
    scores that step first."""

    def fail(self: Benchmarks, *_: Any) -> None:
        raise EvaluationError("the model gives no number")

    recipe = scored_recipe(tmp_path, evaluation={"at_start": False})
    monkeypatch.setattr(Benchmarks, "_results", fail)
    with pytest.raises(EvaluationError) as caught:
        train(recipe)
    assert str(caught.value) == "scoring after step 3: the model gives no number; the state after step 3 is saved"
    assert _checkpoints(tmp_path / "run") == ["step-000003"]
    monkeypatch.undo()
    train(recipe, resume=True)
    assert [record["step"] for record in read_metrics(tmp_path / "run", "benchmark")] == [3, 6, 8]


def test_no_tasks_no_plan() -> None:
    """A run that names no tasks reads none."""
    assert plan_benchmarks(EvaluationSection()) is None


def test_a_group_without_a_score_of_its_own(tmp_path: Path) -> None:
    """A tag is answered for by its tasks."""
    root = write_data_root(tmp_path / "data")
    section = EvaluationSection(tasks=["mmlu_stem", "ai2_arc"], data_root=str(root), allow_partial=True)
    plan = plan_benchmarks(section)
    assert plan is not None
    assert plan.names == ("mmlu_stem", "arc_easy")


@pytest.mark.parametrize(
    ("section", "steps", "times"),
    [
        ({}, 8, 1),
        ({"at_start": True}, 8, 2),
        ({"every_steps": 3}, 8, 3),
        ({"every_steps": 4}, 8, 2),
        ({"every_steps": 100, "at_start": True}, 8, 2),
    ],
)
def test_how_often(section: dict[str, Any], steps: int, times: int) -> None:
    """Always at the end, and there once."""
    assert times_scored(EvaluationSection(tasks="words", **section), steps) == times


def test_metrics_of_a_finished_run_are_told(tmp_path: Path) -> None:
    """`Finished` has what the screen ends with, a resumed run's first scores too."""
    recipe = scored_recipe(tmp_path, training={"max_steps": 2})
    events: list[Event] = []
    train(recipe)
    train(recipe, resume=True, listeners=[events.append])
    (finished,) = [event for event in events if isinstance(event, Finished)]
    records = read_metrics(tmp_path / "run", "benchmark")
    assert finished.first_scores == records[0]["scores"]
    assert finished.last_scores == records[-1]["scores"]
