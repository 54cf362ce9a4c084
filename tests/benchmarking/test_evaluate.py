"""A whole evaluation: the scores of an adapter, its base beside it, groups, files, and answers that are kept."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from qlora_cli.benchmarking.evaluate import evaluate
from qlora_cli.benchmarking.events import Evaluated, Event, Prepared, ScoreRow, Turn, Written
from qlora_cli.benchmarking.request import EvalRequest
from qlora_cli.benchmarking.target import Target
from qlora_cli.errors import EvaluationError, RequestError, TaskError
from qlora_cli.evaluation.events import Asking
from qlora_cli.evaluation.harness import score_tasks
from qlora_cli.training.events import Notice
from tests.support.adapters import write_adapter
from tests.support.benchmarks import keep_index, write_data_root, write_jsonl
from tests.support.models import save_tiny_model

TASKS = ("mmlu", "arc_easy", "cola", "mrpc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter that changes what it says, and benchmarks."""
    folder = tmp_path_factory.mktemp("evaluate")
    base = save_tiny_model(folder / "base")
    write_adapter(folder / "adapter", str(base), lora_alpha=64, target_modules=["layers.0.self_attn.q_proj"])
    write_data_root(folder / "data")
    mrpc = [["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]]
    mrpc += [[str(n % 3 % 2), "1", "2", f"the lamp shines {n}", f"a lamp, {n} times, shines"] for n in range(12)]
    lines = "".join("\t".join(row) + "\n" for row in mrpc)
    (folder / "data" / "glue" / "MRPC").mkdir(parents=True)
    for split in ("train", "dev"):
        (folder / "data" / "glue" / "MRPC" / f"{split}.tsv").write_text(lines)
    write_jsonl(folder / "rows.jsonl", ({"prompt": f"say {n}", "completion": f"it is {n * 7}"} for n in range(9)))
    return folder


@pytest.fixture(autouse=True)
def index() -> None:
    keep_index()


def request(folder: Path, **changes: object) -> EvalRequest:
    asked = EvalRequest(
        target=str(folder / "adapter"),
        tasks=TASKS,
        data_root=folder / "data",
        allow_partial=True,
        baseline=True,
        device="cpu",
    )
    return replace(asked, **changes)  # type: ignore[arg-type]


def by_name(found: Evaluated) -> dict[tuple[str, str], ScoreRow]:
    return {(row.task, row.metric): row for row in found.scores}


def test_target_and_base_beside_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every score's difference is the target's minus the base's, of groups and of metrics that are no mean as well;
    the base's column is what the base scores when it is asked by itself."""
    # A thousand resamples take most of the time, for standard errors that nobody looks at here.
    monkeypatch.setattr("qlora_cli.benchmarking.evaluate.score_tasks", partial(score_tasks, bootstrap_iters=10))
    found = by_name(evaluate(request(folder)))
    alone = by_name(evaluate(request(folder, target=str(folder / "base"), baseline=False)))
    assert found.keys() == alone.keys()
    apart = 0
    for key, row in found.items():
        assert row.comparison is not None, key
        assert row.base is not None
        assert row.comparison.difference == pytest.approx(row.value - row.base, abs=1e-12), key
        assert row.comparison.n == row.documents
        # The base is 16 bits, float32 here: the same products, but for where LoRA's layers round.
        assert row.base == pytest.approx(alone[key].value, abs=1e-12), key
        assert alone[key].base is None
        apart += row.value != row.base
    assert apart >= 3, "an adapter that changes nothing shows nothing"


def test_groups_as_lm_eval_has_them(folder: Path) -> None:
    """A group stands before its members, deeper with each level, says of how many tasks it is, and weighs documents."""
    scores = evaluate(request(folder, tasks=("mmlu",), baseline=False)).scores
    told = {row.task: (row.depth, row.partial) for row in scores}
    assert told == {
        "mmlu": (0, "4 of 57 tasks"),
        "mmlu_stem": (1, "2 of 19 tasks"),
        "mmlu_other": (1, "1 of 13 tasks"),
        "mmlu_humanities": (1, "1 of 13 tasks"),
    } | {row.task: (2, None) for row in scores if not row.is_group}
    assert {row.higher_is_better for row in scores} == {True}, "of a group of groups lm-eval does not say"
    rows = {row.task: row for row in scores}
    leaves = [row for row in scores if not row.is_group]
    assert rows["mmlu"].documents == sum(row.documents for row in leaves) == 24
    weighted = sum(row.value * row.documents for row in leaves) / 24
    assert rows["mmlu"].value == pytest.approx(weighted, abs=1e-12)


def test_the_results_file(folder: Path, tmp_path: Path) -> None:
    """It is lm-eval's, with the target, the base and the comparison under `qlora`; samples lie beside it."""
    output = tmp_path / "results_one.json"
    found = evaluate(request(folder, tasks=("arc_easy",), output=output, log_samples=True))
    results = json.loads(output.read_text())
    (acc,) = [row for row in found.scores if row.metric == "acc"]
    assert results["results"]["arc_easy"]["acc,none"] == acc.value
    assert results["qlora"]["base"]["arc_easy"]["acc,none"] == acc.base
    assert results["qlora"]["adapter_sha256"]
    assert results["model_name"] == results["qlora"]["target"] == "adapter"
    assert results["config"]["model_args"] == "pretrained=base,peft=adapter,dtype=float32"
    assert results["qlora"]["scores"][0]["comparison"]["n"] == 8
    assert str(Path.home()) not in output.read_text()
    assert found.samples == (tmp_path / "samples_arc_easy_one.jsonl", tmp_path / "samples_arc_easy_one-base.jsonl")
    assert [len(file.read_text().splitlines()) for file in found.samples] == [8, 8]


def test_the_results_file_says_what_is_partial(folder: Path, tmp_path: Path) -> None:
    """Of a tag, too, and of a group that is a list only: neither has a score of its own to say it beside."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "both.yaml").write_text("group: both\ntask: [arc_easy, arc_challenge]\n")
    output = tmp_path / "r.json"
    asked = request(folder, tasks=("glue", "both"), task_paths=(tasks,), limit=2, baseline=False, output=output)
    assert {row.task: row.depth for row in evaluate(asked).scores} == dict.fromkeys(
        ("cola", "mrpc", "rte", "sst2", "arc_easy"), 0
    )
    assert json.loads(output.read_text())["qlora"]["partial"] == {"glue": "4 of 9 tasks", "both": "1 of 2 tasks"}


_ODD = """
task: {name}
dataset_path: allenai/ai2_arc
dataset_name: ARC-Easy
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices.text}}}}"
doc_to_target: 0
metric_list: [{{metric: {metric}}}]
"""
_NONE = "answers of the kind multiple_choice give no number for perplexity; see metric_list in the definition"


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Tasks whose answers give no number for their metric, and a group that aggregates what its tasks have not."""
    tasks = tmp_path / "odd"
    tasks.mkdir()
    for name, metric in (("fine", "acc"), *((f"odd{n}", "perplexity") for n in range(5))):
        (tasks / f"{name}.yaml").write_text(_ODD.format(name=name, metric=metric))
    (tasks / "g.yaml").write_text("group: g\ntask: [fine, odd0]\naggregate_metric_list: [{metric: zork}]\n")
    return tasks


def test_what_has_no_score_is_named(folder: Path, odd: Path) -> None:
    """A row that is not there would be missed by nobody; nor is what has no score called done."""
    events: list[Event] = []
    asked = request(folder, tasks=("g",), task_paths=(odd,), limit=2, baseline=False)
    found = evaluate(asked, listeners=[events.append])
    assert [(row.task, row.depth) for row in found.scores] == [("fine", 0)]
    assert [event.text for event in events if isinstance(event, Notice) and "no score" in event.text] == [
        f"no score came of odd0: {_NONE}",
        "no score came of the group g: it is to have zork, and its tasks have acc; see aggregate_metric_list in its "
        "definition",
    ]


def test_tasks_without_any_score_have_failed(folder: Path, odd: Path) -> None:
    """Unless there is something else to show."""
    events: list[Event] = []
    asked = request(folder, tasks=("odd*",), task_paths=(odd,), limit=2)
    with pytest.raises(EvaluationError) as caught:
        evaluate(asked, listeners=[events.append])
    assert str(caught.value) == f"no score came of odd0, odd1, odd2 and 2 others: {_NONE}"
    assert Turn("base") not in events
    rows = evaluate(replace(asked, tasks=("odd0",), dataset=str(folder / "rows.jsonl")), listeners=[events.append])
    assert (rows.scores, len(rows.losses)) == ((), 1)
    assert Notice(f"no score came of odd0: {_NONE}") in events


def test_answers_that_are_to_be_written_need_no_score(folder: Path, odd: Path, tmp_path: Path) -> None:
    """Somebody may want nothing but what the model answers."""
    output = tmp_path / "answers.json"
    asked = request(folder, tasks=("odd0",), task_paths=(odd,), limit=2, baseline=False)
    found = evaluate(replace(asked, output=output, log_samples=True))
    assert found.scores == ()
    assert [file.name for file in found.samples] == ["samples_odd0_answers.jsonl"]
    assert len(found.samples[0].read_text(encoding="utf-8").splitlines()) == 2


def test_a_second_start_asks_nothing(folder: Path) -> None:
    """What was answered is kept, of target and base apart: the same scores, and no question asked again."""
    asked = request(folder, tasks=("arc_easy",))
    first, second = evaluate(asked), evaluate(asked)
    assert (first.kept, second.kept) == (0, second.answers)
    assert second.scores == first.scores
    assert evaluate(replace(asked, keep_answers=False)).kept == 0


def test_rows_of_a_dataset(folder: Path) -> None:
    """A dataset's loss stands beside the base's, with or without tasks."""
    found = evaluate(request(folder, tasks=(), dataset=str(folder / "rows.jsonl")))
    (row,) = found.losses
    assert (found.scores, row.rows, found.answers) == ((), 9, 0)
    assert row.base is not None
    assert row.comparison is not None
    assert row.comparison.difference == pytest.approx(row.loss - row.base, abs=1e-9)
    assert row.loss != row.base


def test_only_a_dataset_has_a_file_too(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that was measured, of how many rows, and without the home folder's name, as that of tasks."""
    output = tmp_path / "new" / "losses.json"
    monkeypatch.setenv("HOME", str(folder))
    asked = request(folder, tasks=(), dataset=str(folder / "rows.jsonl"), output=output, limit=5)
    (row,) = evaluate(asked).losses
    told = json.loads(output.read_text())["qlora"]
    assert told["limit"] == 5
    (written,) = told["dataset"]
    assert (written["dataset"], written["rows"], written["loss"]) == ("~/rows.jsonl", 5, row.loss)
    assert row.bits_per_byte is not None
    assert row.base_bits_per_byte is not None
    ratio = row.base_bits_per_byte / row.bits_per_byte
    assert ratio == pytest.approx((row.base or 0.0) / row.loss), "both are of the same bytes"
    assert str(folder) not in output.read_text()


def test_what_was_asked_for_is_told_with_the_scores(folder: Path) -> None:
    """What makes the scores others than the tasks' own."""
    found = evaluate(
        request(folder, tasks=("arc_easy",), baseline=False, limit=3, seed=7, system_instruction="Be terse.")
    )
    assert (found.limit, found.seed, found.system_instruction) == (3, 7, "Be terse.")


def test_an_empty_system_instruction_is_none(folder: Path, tmp_path: Path) -> None:
    """A script may have nothing to say: then it is not told that something was said."""
    output = tmp_path / "r.json"
    found = evaluate(
        request(folder, tasks=("arc_easy",), baseline=False, limit=3, system_instruction="", output=output)
    )
    assert found.system_instruction is None
    assert json.loads(output.read_text())["system_instruction"] is None


def test_what_is_told(folder: Path, tmp_path: Path) -> None:
    """What is scored is told before the first question, then each of the two as it is asked, the scores before they
    are written, and each kind of files once it is there."""
    events: list[Event] = []
    output = tmp_path / "out.json"

    def listen(event: Event) -> None:
        assert output.exists() == isinstance(event, Written)
        events.append(event)

    asked = request(folder, tasks=("arc_easy",), output=output, log_samples=True)
    found = evaluate(asked, listeners=[listen])
    prepared = next(event for event in events if isinstance(event, Prepared))
    assert (prepared.tasks, prepared.documents, prepared.base) == (1, 8, "base")
    told = [event for event in events if isinstance(event, Prepared | Turn | Evaluated | Written)]
    names = ["Prepared", "Turn", "Turn", "Evaluated", "Written", "Written"]
    assert [type(event).__name__ for event in told] == names
    assert told[-2:] == [Written("results", (output,)), Written("samples", found.samples)]
    assert (found.output, len(found.samples)) == (output, 2)
    last = [event for event in events if isinstance(event, Asking)][-1]
    assert last.answered == last.questions


def test_a_whole_model_has_no_base(folder: Path) -> None:
    """Refused before anything is read of it but its configuration."""
    with pytest.raises(RequestError) as caught:
        evaluate(request(folder, target=str(folder / "base")))
    assert str(caught.value).endswith(
        "base is a whole model, and has no base to set beside it. Leave it out, or score both models, each with "
        "--output FILE"
    )


def test_what_is_missing_is_told_before_weights_are_read(folder: Path) -> None:
    """A group runs on a part of its tasks only if that is allowed."""
    events: list[Event] = []
    with pytest.raises(TaskError, match="mmlu"):
        evaluate(request(folder, allow_partial=False), listeners=[events.append])
    assert not any(isinstance(event, Prepared) for event in events)


_DRAWING = """
import random

def mixed(docs):
    number = random.randrange(10**9)
    return docs.map(lambda row: {**row, "question": f"{number} {row['question']}"})
"""
_DRAWN = """
task: drawn
dataset_path: allenai/ai2_arc
dataset_name: ARC-Easy
test_split: test
output_type: generate_until
process_docs: !function drawing.mixed
doc_to_text: "{{answerKey}}"
doc_to_target: "{{answerKey}}"
generation_kwargs: {do_sample: true, temperature: 1.0, max_gen_toks: 8, until: ["@@"]}
metric_list: [{metric: exact_match}]
"""


def test_a_seed_is_of_all_that_is_drawn(folder: Path, tmp_path: Path) -> None:
    """What a task draws as it is built, and what the model writes where it samples, are the seed's: the same with the
    same, others with another."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "drawing.py").write_text(_DRAWING)
    (tasks / "drawn.yaml").write_text(_DRAWN)

    def scored(name: str, seed: int) -> tuple[list[str], list[object]]:
        asked = request(
            folder, tasks=("drawn",), task_paths=(tasks,), baseline=False, limit=3, seed=seed, log_samples=True
        )
        (file,) = evaluate(replace(asked, output=tmp_path / f"{name}.json")).samples
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        return [sample["doc"]["question"] for sample in samples], [sample["resps"] for sample in samples]

    first, again, other = scored("a", 7), scored("b", 7), scored("c", 8)
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_model_that_does_not_fit_is_told(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sentence, not in a traceback; other faults are as they were."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Target, "load", fail)
    with pytest.raises(EvaluationError) as caught:
        evaluate(request(folder, tasks=("arc_easy",)))
    assert str(caught.value).startswith(f"memory ran out on cpu: it does not hold {folder / 'adapter'} (")
    error = RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="shapes"):
        evaluate(request(folder, tasks=("arc_easy",)))
