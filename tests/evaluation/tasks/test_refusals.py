"""Tasks that may not run, or cannot, told by name before any of their code is run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.build import build_tasks
from qlora_cli.evaluation.tasks.index import Listed, load_index
from qlora_cli.evaluation.tasks.loaded import TaskOptions
from tests.support.benchmarks import keep_index, write_jsonl

_TASK = {
    "task": "mine",
    "dataset_path": "org/set",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


class _Function(str):
    """Text that is written as lm-eval's `!function`."""


yaml.SafeDumper.add_representer(_Function, lambda dumper, text: dumper.represent_scalar("!function", str(text)))


def _index(folder: Path, code: str = "", **changed: Any) -> dict[str, Listed]:
    keep_index()
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / "utils.py").write_text(code)
    (folder / "tasks" / "mine.yaml").write_text(yaml.safe_dump({**_TASK, **changed}))
    write_jsonl(folder / "data" / "org" / "set" / "test.jsonl", [{"question": "q", "answer": "a"}] * 3)
    return load_index([folder / "tasks"])


def _problems(folder: Path, index: dict[str, Listed], **options: Any) -> list[str]:
    with pytest.raises(TaskError) as caught:
        build_tasks(["mine"], index, TaskOptions(data_root=folder / "data", **options))
    lines = str(caught.value).splitlines()
    prefix = f"mine ({folder}/tasks/mine.yaml): "
    assert all(line.startswith(prefix) for line in lines)
    return [line.removeprefix(prefix) for line in lines]


def test_code_that_the_model_writes_is_not_run(tmp_path: Path) -> None:
    """Unless it is allowed."""
    index = _index(tmp_path, unsafe_code=True)
    assert _problems(tmp_path, index) == [
        "it runs code that the model writes. --run-unsafe-code allows that: use a machine made for it."
    ]
    options = TaskOptions(data_root=tmp_path / "data", run_unsafe_code=True)
    assert build_tasks(["mine"], index, options).tasks["mine"].UNSAFE_CODE is True


def test_lm_evals_own_code_tasks_are_refused(index: dict[str, Listed], root: Path) -> None:
    """Their modules fetch code when they are imported, which is why they are not."""
    before = set(sys.modules)
    with pytest.raises(TaskError) as caught:
        build_tasks(["humaneval", "mbpp"], index, TaskOptions(data_root=root))
    lines = str(caught.value).splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["humaneval", "humaneval", "mbpp", "mbpp"]
    assert "it computes 'code_eval' by code that `evaluate.load` fetches from the hub (" in lines[1]
    assert not any("humaneval" in name or "mbpp" in name for name in set(sys.modules) - before)


@pytest.mark.parametrize(
    "code",
    [
        "import evaluate\nx = evaluate.load('rouge')\ndef score(doc, results): return {'a': 1}\n",
        "import evaluate as e\ndef score(doc, results): return helper()\ndef helper(): return e.load('rouge')\n",
        "def score(doc, results):\n    from evaluate import load as fetch\n    return fetch('rouge')\n",
    ],
)
def test_metrics_that_are_code_of_the_hub_are_refused(tmp_path: Path, code: str) -> None:
    """On importing the module, in the function, or in one that it calls; and nothing of it is run to find out."""
    marker = tmp_path / "ran"
    index = _index(tmp_path, f"open({str(marker)!r}, 'w')\n{code}", process_results=_Function("utils.score"))
    assert _problems(tmp_path, index) == [
        f"it computes 'rouge' by code that `evaluate.load` fetches from the hub ({tmp_path}/tasks/utils.py). "
        f"--trust-remote-code allows that."
    ]
    assert not marker.exists()


def test_a_function_beside_one_that_fetches_is_innocent(tmp_path: Path) -> None:
    """Only what the task uses counts."""
    code = (
        "def other():\n    import evaluate\n    return evaluate.load('rouge')\n"
        "def score(doc, results): return {'a': 1}\n"
    )
    index = _index(tmp_path, code, process_results=_Function("utils.score"))
    assert build_tasks(["mine"], index, TaskOptions(data_root=tmp_path / "data")).tasks


def test_datasets_with_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub; rows of the data root need no code."""
    index = _index(tmp_path, dataset_kwargs={"trust_remote_code": True})
    assert build_tasks(["mine"], index, TaskOptions(data_root=tmp_path / "data")).tasks
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TaskError) as caught:
        build_tasks(["mine"], index, TaskOptions())
    assert str(caught.value).endswith(
        "its dataset org/set needs code from the hub. --trust-remote-code allows that; --data-root DIR does without."
    )


def test_unknown_metric_aggregation_and_filter_are_told_together(tmp_path: Path) -> None:
    """Each with the word that was meant."""
    index = _index(
        tmp_path,
        metric_list=[
            {"metric": "exact_mach", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc", "aggregation": "maen", "higher_is_better": True},
        ],
        filter_list=[{"name": "first", "filter": [{"function": "take_frist"}]}],
    )
    assert _problems(tmp_path, index) == [
        "metric 'exact_mach' is none of lm-eval, which would look for code from the hub; did you mean exact_match? "
        "--trust-remote-code allows that.",
        "aggregation 'maen' is none of lm-eval; did you mean mean?",
        "filter 'take_frist' is none of lm-eval; did you mean take_first?",
    ]


def test_a_filter_that_the_task_brings_is_known(tmp_path: Path) -> None:
    """Its module registers it when its functions are resolved."""
    code = (
        "from lm_eval.api.filter import Filter\n"
        "from lm_eval.api.registry import register_filter\n"
        "@register_filter('of_this_test')\n"
        "class Own(Filter):\n"
        "    def apply(self, resps, docs): return resps\n"
        "def text(doc): return doc['question']\n"
    )
    filters = [{"name": "own", "filter": [{"function": "of_this_test"}]}]
    index = _index(tmp_path, code, doc_to_text=_Function("utils.text"), filter_list=filters)
    assert build_tasks(["mine"], index, TaskOptions(data_root=tmp_path / "data")).tasks


def test_a_metric_of_the_hub_is_named(tmp_path: Path) -> None:
    """`hf_evaluate` is a wish for code of the hub."""
    index = _index(tmp_path, metric_list=[{"metric": "exact_match", "hf_evaluate": True}])
    assert _problems(tmp_path, index) == [
        "metric 'exact_match' is to be code from the hub. --trust-remote-code allows that."
    ]


def test_a_metric_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of the hub is allowed, and there is none of that name, or no hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for metric in ({"metric": "zorb"}, {"metric": "zorb", "aggregation": "mean", "higher_is_better": True}):
        index = _index(tmp_path, metric_list=[metric])
        assert _problems(tmp_path, index, trust_remote_code=True) == [
            "metric 'zorb' is neither one of lm-eval nor could it be had from the hub."
        ]


def test_a_task_names_its_own_metrics(tmp_path: Path) -> None:
    """With a function that computes them, any name will do."""
    index = _index(
        tmp_path,
        "def score(doc, results): return {'mine': 1}\n",
        process_results=_Function("utils.score"),
        metric_list=[{"metric": "mine", "aggregation": "mean", "higher_is_better": True}],
    )
    assert build_tasks(["mine"], index, TaskOptions(data_root=tmp_path / "data")).tasks


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("def other(): pass\n", "has no function 'score'"),
        ("def score(:\n", "it cannot be set up: SyntaxError: invalid syntax (utils.py, line 1)."),
        ("raise ValueError('no luck')\n", "it cannot be set up: ValueError: no luck."),
        ("import no_such_package.inner\n", "it needs the package no_such_package, which is not installed: pip install"),
    ],
)
def test_a_function_that_cannot_be_had(tmp_path: Path, code: str, problem: str) -> None:
    """The task, its file, and what is wrong."""
    index = _index(tmp_path, code, process_results=_Function("utils.score"))
    (line,) = _problems(tmp_path, index)
    assert problem in line


def test_an_unknown_kind_of_output(tmp_path: Path) -> None:
    """Told as lm-eval tells it, with the task's file."""
    (line,) = _problems(tmp_path, _index(tmp_path, output_type="sing"))
    assert line.startswith(
        "it cannot be set up: ValueError: Got invalid output_type 'sing', must be in 'loglikelihood,"
    )


def test_rows_that_a_function_leaves_none_of(tmp_path: Path) -> None:
    """A split that is empty once the task has chosen among its rows."""
    code = "def none(docs): return docs.filter(lambda doc: False)\n"
    index = _index(tmp_path, code, process_docs=_Function("utils.none"))
    assert _problems(tmp_path, index) == [
        f"its `process_docs` leaves no row to ask about of {tmp_path}/data/org/set/test.jsonl."
    ]


def test_a_function_that_ends_the_program(tmp_path: Path) -> None:
    """It ends the task, and no more."""
    index = _index(tmp_path, "import sys\ndef all(docs): sys.exit(3)\n", process_docs=_Function("utils.all"))
    assert _problems(tmp_path, index) == [
        "its code ends the program, with sys.exit(3). Look at its functions, or leave it out."
    ]


def test_classes_that_fetch_their_own_rows_need_the_hub(tmp_path: Path) -> None:
    """The data root can put nothing in the place of their code."""
    code = (
        "from lm_eval.api.task import ConfigurableTask\n"
        "class Mine(ConfigurableTask):\n"
        "    def download(self, *args, **named): raise RuntimeError('never called')\n"
    )
    _index(tmp_path, code)
    (tmp_path / "tasks" / "mine.yaml").write_text("task: mine\nclass: !function utils.Mine\n")
    assert _problems(tmp_path, load_index([tmp_path / "tasks"])) == [
        "its class Mine fetches its rows by code of its own, in the place of which --data-root can put nothing. "
        "Leave the task out, or --data-root."
    ]


def test_a_task_that_is_a_class_gets_its_rows(tmp_path: Path) -> None:
    """A Python class, with its own splits, over the data root."""
    code = """
from lm_eval.api.task import ConfigurableTask
class Mine(ConfigurableTask):
    DATASET_PATH = "org/set"
    def __init__(self, config=None):
        super().__init__(config={"metadata": {"version": 1}})
    def has_training_docs(self): return True
    def has_validation_docs(self): return False
    def has_test_docs(self): return True
    def training_docs(self): return self.dataset["train"]
    def test_docs(self): return self.dataset["test"]
    def doc_to_text(self, doc): return doc["question"]
    def doc_to_target(self, doc): return doc["answer"]
"""
    keep_index()
    index = _index(tmp_path, code)
    (tmp_path / "tasks" / "mine.yaml").write_text("task: mine\nclass: !function utils.Mine\n")
    index = load_index([tmp_path / "tasks"])
    task = build_tasks(["mine"], index, TaskOptions(data_root=tmp_path / "data")).tasks["mine"]
    assert (task.task_name, len(task.eval_docs), task.get_config("num_fewshot")) == ("mine", 3, 0)
