"""Tasks with their rows, or everything that stands against it."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.build import build_tasks
from qlora_cli.evaluation.tasks.index import Index, Listed, load_index
from qlora_cli.evaluation.tasks.loaded import LoadedTasks, Partial, TaskOptions
from tests.support.benchmarks import arc_row, keep_index, rte_row, write_data_root, write_jsonl

_SET = {
    "task": "mine",
    "dataset_path": "org/set",
    "output_type": "multiple_choice",
    "training_split": "train",
    "test_split": "test",
    "doc_to_text": "{{question}}\nAnswer:",
    "doc_to_target": "{{choices.label.index(answerKey)}}",
    "doc_to_choice": "{{choices.text}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


def _build(names: list[str], index: Index, root: Path | None, **options: Any) -> LoadedTasks:
    return build_tasks(names, index, TaskOptions(data_root=root, **options))


def _refused(names: list[str], index: Index, root: Path | None, **options: Any) -> list[str]:
    with pytest.raises(TaskError) as caught:
        _build(names, index, root, **options)
    return str(caught.value).splitlines()


def _own(folder: Path, rows: int = 6, **changed: Any) -> Mapping[str, Listed]:
    """A task of a person's own over ARC's rows, below `folder / data`, with some keys changed; None takes one away."""
    keep_index()
    config = {key: value for key, value in {**_SET, **changed}.items() if value is not None}
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / f"{config['task']}.yaml").write_text(yaml.safe_dump(config))
    for split in ("train", "test"):
        write_jsonl(folder / "data" / "org" / "set" / f"{split}.jsonl", map(arc_row, range(rows)))
    return load_index([folder / "tasks"])


def test_small_benchmarks_are_ready(index: Index, root: Path) -> None:
    """Every task of the small data root, with its own rows, prompts and answers."""
    loaded = _build(["mmlu_anatomy", "arc_easy", "piqa", "rte", "sst2", "cola"], index, root)
    assert {name: len(task.eval_docs) for name, task in loaded.tasks.items()} == {
        "mmlu_anatomy": 6,
        "arc_easy": 8,
        "piqa": 8,
        "rte": 8,
        "sst2": 8,
        "cola": 8,
    }
    assert loaded.groups == {}
    assert loaded.remarks == ()
    rte = loaded.tasks["rte"]
    _, first, second, _ = rte_row(1000)
    assert rte.fewshot_context(rte.eval_docs[0], 0) == f"{first}\nQuestion: {second} True or False?\nAnswer:"
    assert rte.doc_to_target(rte.eval_docs[0]) == 0


def test_a_task_is_the_one_lm_eval_builds(tmp_path: Path) -> None:
    """Prompts, examples, targets and choices of every row are those of lm-eval's own task over the same rows."""
    from lm_eval.tasks import TaskManager

    index = _own(tmp_path)
    files = {split: str(tmp_path / "data" / "org" / "set" / f"{split}.jsonl") for split in ("train", "test")}
    theirs_folder = tmp_path / "theirs"
    theirs_folder.mkdir()
    arguments = {"data_files": files, "cache_dir": str(tmp_path / "cache")}
    theirs_config = {**_SET, "dataset_path": "json", "dataset_kwargs": arguments}
    (theirs_folder / "mine.yaml").write_text(yaml.safe_dump(theirs_config))
    theirs = TaskManager(include_path=str(theirs_folder), include_defaults=False).load(["mine"])["tasks"]["mine"]
    theirs.set_config(key="num_fewshot", value=3)
    theirs.set_fewshot_seed(seed=1234)
    ours = _build(["mine"], index, tmp_path / "data", num_fewshot=3).tasks["mine"]
    assert ours.eval_docs[:] == theirs.eval_docs[:]
    for doc in theirs.eval_docs:
        assert ours.fewshot_context(doc, 3) == theirs.fewshot_context(doc, 3)
        assert (ours.doc_to_target(doc), ours.doc_to_choice(doc)) == (
            theirs.doc_to_target(doc),
            theirs.doc_to_choice(doc),
        )
    of_data = {"dataset_path", "dataset_kwargs", "metadata"}
    assert {k: v for k, v in ours.config.to_dict().items() if k not in of_data} == {
        k: v for k, v in theirs.config.to_dict().items() if k not in of_data
    }


def test_a_group_misses_subjects(index: Index, root: Path) -> None:
    """All that are missing are named, where they were looked for, and what to do."""
    lines = _refused(["mmlu"], index, root)
    assert lines[0] == "mmlu: 53 of its 57 tasks have no data below --data-root:"
    *names, looked, leave = lines[1:]
    assert names[0].startswith("    mmlu_astronomy, mmlu_")
    assert "".join(names).count("mmlu_") == 53
    assert max(map(len, names)) <= 104
    assert looked == (
        f"    looked, for the first of them, for {root}/cais/mmlu/astronomy/test.jsonl, also as .json, .csv, .tsv or "
        f".parquet, and {root}/mmlu/test/astronomy_test.csv"
    )
    assert leave == "    --allow-partial runs mmlu on the 4 that are there"


def test_a_partial_group_says_so(index: Index, root: Path) -> None:
    """With leave, a group runs on what is there; every group in it that is not whole is told, and empty ones go."""
    loaded = _build(["mmlu"], index, root, allow_partial=True)
    there = ("mmlu_abstract_algebra", "mmlu_anatomy", "mmlu_virology", "mmlu_world_religions")
    assert tuple(loaded.tasks) == there
    assert set(loaded.groups) == {"mmlu", "mmlu_stem", "mmlu_other", "mmlu_humanities"}
    assert loaded.groups["mmlu"].child_names == ["mmlu_stem", "mmlu_other", "mmlu_humanities"]
    assert loaded.groups["mmlu_stem"].child_names == ["mmlu_abstract_algebra", "mmlu_anatomy"]
    assert loaded.partial["mmlu"].there == there
    assert len(loaded.partial["mmlu"].missing) == 53
    assert loaded.partial["mmlu_humanities"].there == ("mmlu_world_religions",)
    assert loaded.remarks[0] == (
        "mmlu: scored on 4 of its 57 tasks; there is no data for mmlu_astronomy, mmlu_college_biology, "
        "mmlu_college_chemistry and 50 others."
    )


def test_a_partial_tag_says_so(index: Index, root: Path) -> None:
    """A tag is no group of lm-eval's, and is as partial as one."""
    loaded = _build(["glue"], index, root, allow_partial=True)
    assert loaded.partial == {
        "glue": Partial(("cola", "rte", "sst2"), ("mnli", "mnli_mismatch", "mrpc", "qnli", "qqp", "wnli"))
    }
    assert loaded.groups == {}
    lines = _refused(["glue"], index, root)
    assert lines[:2] == [
        "glue: 6 of its 9 tasks have no data below --data-root:", "    mnli, mnli_mismatch, mrpc, qnli, qqp, wnli"
    ]  # fmt: skip


def test_a_task_that_is_named_is_never_left_out(index: Index, root: Path) -> None:
    """Not even where partial groups are allowed; nor is a group of which nothing is there."""
    lines = _refused(["glue", "mrpc", "hellaswag", "mmlu_social_sciences"], index, root, allow_partial=True)
    assert lines[0] == "mrpc: the split 'validation' of nyu-mll/glue, mrpc is not below --data-root"
    assert lines[1] == (
        f"    looked for {root}/nyu-mll/glue/mrpc/validation.jsonl, also as .json, .csv, .tsv or .parquet, "
        f"and {root}/glue/MRPC/dev.tsv"
    )
    assert lines[2] == "hellaswag: the split 'validation' of Rowan/hellaswag is not below --data-root"
    assert lines[4] == "mmlu_social_sciences: 12 of its 12 tasks have no data below --data-root:"


def test_only_splits_that_are_asked_for_have_to_be_there(index: Index, root: Path) -> None:
    """Without examples, the rows to learn from are not looked at, and with them they are named."""
    shutil.rmtree(root / "mmlu" / "dev")
    (root / "glue" / "RTE" / "train.tsv").write_text("no table\n")
    assert list(_build(["mmlu_anatomy", "rte"], index, root).tasks) == ["mmlu_anatomy", "rte"]
    lines = _refused(["mmlu_anatomy", "rte"], index, root, num_fewshot=2)
    assert "RTE/train.tsv, line 1: expected a header with the columns label, sentence1, sentence2" in lines[0]
    assert lines[1] == "mmlu_anatomy: the split 'dev' of cais/mmlu, anatomy is not below --data-root (there: test)"


def test_another_split_takes_leave(index: Index, root: Path) -> None:
    """Without its test split, a task that has a validation split is asked about that, if that is allowed."""
    (root / "allenai" / "ai2_arc" / "ARC-Easy" / "test.jsonl").unlink()
    assert _refused(["arc_easy"], index, root) == [
        "arc_easy: the split 'test' of allenai/ai2_arc, ARC-Easy is not below --data-root (there: train, validation)",
        f"    looked for {root}/allenai/ai2_arc/ARC-Easy/test.jsonl, also as .json, .csv, .tsv or .parquet",
        "    --allow-partial scores arc_easy on its split 'validation'",
    ]
    loaded = _build(["arc_easy"], index, root, allow_partial=True, num_fewshot=1)
    assert loaded.splits == {"arc_easy": "validation"}
    assert loaded.remarks == ("arc_easy: scored on its validation split, since the test split is not there.",)
    assert loaded.tasks["arc_easy"].eval_docs["id"][0] == arc_row(500)["id"]


@pytest.mark.parametrize(("own", "asked", "used"), [(None, None, 0), (None, 2, 2), (3, None, 3), (3, 2, 2), (0, 2, 0)])
def test_number_of_examples_is_lm_evals_rule(tmp_path: Path, own: int | None, asked: int | None, used: int) -> None:
    """What is asked for, unless a task says 0; else the task's own number; else none."""
    index = _own(tmp_path, num_fewshot=own)
    task = _build(["mine"], index, tmp_path / "data", num_fewshot=asked).tasks["mine"]
    assert task.config.num_fewshot == used
    prompt = task.fewshot_context(task.eval_docs[0], used)
    assert prompt.count("Answer:") == used + 1


def test_a_configuration_may_look_like_a_number(tmp_path: Path) -> None:
    """YAML reads `2024` as one, and the folder is called so all the same."""
    index = _own(tmp_path, dataset_name=2024)
    write_jsonl(tmp_path / "data" / "org" / "set" / "2024" / "test.jsonl", map(arc_row, range(2)))
    assert len(_build(["mine"], index, tmp_path / "data").tasks["mine"].eval_docs) == 2


def test_too_few_rows_to_draw_examples_from(tmp_path: Path) -> None:
    """Told before anything is asked."""
    index = _own(tmp_path, rows=3, fewshot_split="train")
    (line,) = _refused(["mine"], index, tmp_path / "data", num_fewshot=4)
    assert line == (
        f"mine ({tmp_path}/tasks/mine.yaml): expected 4 rows at least to draw 4 examples from, got 3 of "
        f"{tmp_path}/data/org/set/train.jsonl."
    )


def test_examples_are_drawn_by_the_seed(index: Index, root: Path) -> None:
    """The same seed draws the same examples, and another draws others."""

    def prompts(seed: int) -> list[str]:
        task = _build(["rte"], index, root, num_fewshot=3, seed=seed).tasks["rte"]
        return [task.fewshot_context(doc, 3) for doc in task.eval_docs]

    assert prompts(1) == prompts(1)
    assert prompts(1) != prompts(2)


def test_a_task_beside_its_group_is_asked_once(index: Index, root: Path) -> None:
    """Of a name and the group or tag that holds it, the group's counts, and it is said."""
    loaded = _build(["rte", "mmlu_anatomy", "glue", "mmlu", "mmlu_stem"], index, root, allow_partial=True)
    assert list(loaded.tasks).count("rte") == 1
    assert loaded.groups["mmlu_stem"].get("mmlu_anatomy") is loaded.tasks["mmlu_anatomy"]
    assert "rte is part of glue, and is asked as that asks it." in loaded.remarks
    assert "mmlu_anatomy is part of mmlu, and is asked as that asks it." in loaded.remarks
    assert "mmlu_stem is part of mmlu, and is not asked for twice." in loaded.remarks


def test_groups_with_tasks_in_common_are_refused(tmp_path: Path) -> None:
    """lm-eval cannot keep the two apart, and neither can a person."""
    index = _own(tmp_path)
    for name in ("one", "two"):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": ["mine"]}))
    index = load_index([tmp_path / "tasks"])
    assert _refused(["one", "two"], index, tmp_path / "data") == [
        "two and one have tasks in common, and one evaluation asks each task once: mine. Evaluate one group at a time."
    ]


def test_tasks_that_are_written_into_a_group(tmp_path: Path) -> None:
    """Inline tasks get their rows from the data root, too, and the names that lm-eval gives them."""
    _own(tmp_path)
    inline = {**_SET, "task": "inline"}
    (tmp_path / "tasks" / "one.yaml").write_text(
        yaml.safe_dump({"group": "one", "task": [inline, {"task": "mine", "num_fewshot": 1}]})
    )
    loaded = _build(["one"], load_index([tmp_path / "tasks"]), tmp_path / "data")
    assert list(loaded.tasks) == ["one::inline", "mine"]
    assert loaded.tasks["mine"].config.num_fewshot == 1


def test_everything_is_told_at_once(index: Index, root: Path) -> None:
    """Broken files, empty ones and missing ones in one message, each with its file."""
    (root / "mmlu" / "test" / "anatomy_test.csv").write_text("")
    (root / "glue" / "SST-2" / "dev.tsv").write_text("sentence\tlabel\ngood\t7\n")
    (root / "glue" / "CoLA" / "dev.tsv").unlink()
    lines = _refused(["mmlu_anatomy", "sst2", "cola", "rte"], index, root)
    assert [line.split(" ")[0].rstrip(":") for line in lines if not line.startswith(" ")] == [
        "mmlu_anatomy",
        "sst2",
        "cola",
    ]
    assert f"{root}/mmlu/test/anatomy_test.csv: there is no row in it." in lines[0]
    assert f"{root}/glue/SST-2/dev.tsv, line 2: label: expected negative, positive" in lines[1]


def test_a_broken_file_is_no_missing_one(index: Index, root: Path) -> None:
    """Leave to do without what is missing is none to do without what is broken."""
    (root / "mmlu" / "test" / "anatomy_test.csv").write_text("")
    (line,) = _refused(["mmlu"], index, root, allow_partial=True)
    assert "anatomy_test.csv: there is no row in it." in line


def test_without_a_network_the_data_root_is_named(
    index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One message, after one try, whatever number of tasks there are."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = []

    def silent(*args: Any, **named: Any) -> None:
        asked.append(named)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", silent)
    (line,) = _refused(["mmlu", "arc_easy"], index, None)
    assert line == (
        "the hub cannot be reached, and the dataset cais/mmlu, abstract_algebra is not in its cache. File the rows of "
        "the tasks under their hub names in a folder, and give it with --data-root DIR, or try again with a network."
    )
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (RuntimeError("Dataset scripts are no longer supported, but found piqa.py"), "needs code from the hub"),
        (ValueError("BuilderConfig 'x' not found"), "could not be had: ValueError: BuilderConfig 'x' not found."),
        (PermissionError("Dataset is a gated dataset on the Hub"), "is gated: accept its terms on the hub"),
    ],
)
def test_what_the_hub_says_is_told(
    index: Index, monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str
) -> None:
    """With the task and the dataset."""

    def refuse(*args: Any, **named: Any) -> None:
        raise error

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    (line,) = _refused(["piqa"], index, None)
    assert line.startswith("piqa (")
    assert f"its dataset baber/piqa {problem}" in line


def test_lm_evals_log_is_left_as_it_was(index: Index, root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its warnings of defaults, task by task, are not shown; afterwards it logs as before."""
    level = logging.getLogger("lm_eval").level
    _build(["rte"], index, root)
    assert caplog.text == ""
    assert logging.getLogger("lm_eval").level == level


_SHUFFLING = """
import random
def shuffled(docs):
    def one(doc):
        order = list(range(len(doc["choices"]["text"])))
        random.shuffle(order)
        choices = {key: [values[i] for i in order] for key, values in doc["choices"].items()}
        return {**doc, "choices": choices}
    return docs.map(one)
"""


def test_tasks_that_shuffle_do_so_once(tmp_path: Path) -> None:
    """The choices of a row are in the same order in its prompt, when answers are compared, and in every run; the
    program's own random numbers go on as if nothing had been drawn."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "utils.py").write_text(_SHUFFLING)
    _own(tmp_path, rows=12)
    config = tmp_path / "tasks" / "mine.yaml"
    config.write_text(config.read_text() + "process_docs: !function utils.shuffled\n")
    index = load_index([tmp_path / "tasks"])
    state = random.getstate()
    task = _build(["mine"], index, tmp_path / "data").tasks["mine"]
    assert random.getstate() == state
    choices = [doc["choices"]["label"] for doc in task.eval_docs]
    assert choices != [arc_row(number)["choices"]["label"] for number in range(12)]
    assert [doc["choices"]["label"] for doc in task.eval_docs] == choices
    random.random()
    again = _build(["mine"], index, tmp_path / "data").tasks["mine"]
    assert [doc["choices"]["label"] for doc in again.eval_docs] == choices
    assert "random.shuffle(order)" in task.dump_config()["process_docs"]


def test_nothing_is_written(index: Index, root: Path) -> None:
    """The data root is only read."""
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    _build(["mmlu", "arc_easy", "glue"], index, root, allow_partial=True, num_fewshot=2)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_the_root_may_be_relative(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages call files as the person does."""
    write_data_root(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert list(_build(["rte"], index, Path("data")).tasks) == ["rte"]
    monkeypatch.chdir(tmp_path / "data")
    assert len(_build(["arc_easy"], index, Path()).tasks["arc_easy"].eval_docs) == 8
    monkeypatch.chdir(tmp_path)
    assert "looked for data/nyu-mll/glue/mrpc/validation.jsonl" in _refused(["mrpc"], index, Path("data"))[1]
