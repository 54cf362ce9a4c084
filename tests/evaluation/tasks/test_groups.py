"""Groups as a person writes them, and names that a pattern stands for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.build import build_tasks
from qlora_cli.evaluation.tasks.index import Listed, load_index
from qlora_cli.evaluation.tasks.loaded import LoadedTasks, TaskOptions
from qlora_cli.evaluation.tasks.names import choose
from tests.support.benchmarks import keep_index, write_jsonl

_TASK = {
    "dataset_path": "org/set",
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def _index(folder: Path, groups: Mapping[str, Any], tasks: Mapping[str, str | None]) -> dict[str, Listed]:
    """Groups with their lists, and tasks over the configurations of a dataset, `there` of which is there."""
    keep_index()
    (folder / "tasks").mkdir(parents=True)
    for name, members in groups.items():
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": members}))
    for name, config in tasks.items():
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "dataset_name": config} | _TASK))
    write_jsonl(folder / "data" / "org" / "set" / "there" / "test.jsonl", [{"question": "q", "answer": "a"}] * 3)
    return load_index([folder / "tasks"])


def _build(names: list[str], index: Mapping[str, Listed], folder: Path, **options: Any) -> LoadedTasks:
    return build_tasks(choose(names, index), index, TaskOptions(data_root=folder / "data", **options))


def _refused(names: list[str], index: Mapping[str, Listed], folder: Path, **options: Any) -> list[str]:
    with pytest.raises(TaskError) as caught:
        _build(names, index, folder, **options)
    return str(caught.value).replace(f"{folder}/tasks/", "").splitlines()


@pytest.mark.parametrize("member", ["mine_onee", {"task": "mine_onee", "num_fewshot": 0}])
def test_a_name_in_a_group_that_there_is_not(tmp_path: Path, member: Any) -> None:
    """The group, its file, and the name that was meant."""
    index = _index(tmp_path, {"ours": ["mine_one", member]}, {"mine_one": "there"})
    assert _refused(["ours"], index, tmp_path) == [
        "ours (ours.yaml): 'mine_onee' is no task, group or tag that lm-eval knows; did you mean mine_one?"
    ]


def test_groups_in_a_circle(tmp_path: Path) -> None:
    """All of it is shown; a group that is in two others is no circle."""
    groups = {"ours": ["theirs"], "theirs": ["mine_one", "ours"], "itself": ["itself"]}
    index = _index(tmp_path, groups, {"mine_one": "there"})
    assert _refused(["mine_one", "ours"], index, tmp_path) == [
        "ours (ours.yaml): the group is part of itself (ours > theirs > ours). Take it out of one list."
    ]
    assert _refused(["itself"], index, tmp_path) == [
        "itself (itself.yaml): the group is part of itself (itself > itself). Take it out of one list."
    ]


@pytest.mark.parametrize("members", [[], None, "mine_one"])
def test_a_group_of_nothing(tmp_path: Path, members: Any) -> None:
    """There would be nothing to score, after the model was loaded."""
    index = _index(tmp_path, {"ours": members, "around": ["mine_one", "ours"]}, {"mine_one": "there"})
    problem = "ours (ours.yaml): there is no task in this group. List some under `task`."
    assert _refused(["ours"], index, tmp_path) == [problem]
    assert _refused(["around"], index, tmp_path) == [problem]


_FOUR = {"mine_one": "there", "mine_two": "there", "mine_three": "gone", "mine_four": "gone"}


def test_what_a_pattern_brings_is_missing(tmp_path: Path) -> None:
    """Told as of a group, with one place that was looked into."""
    index = _index(tmp_path, {}, _FOUR)
    assert _refused(["mine_*"], index, tmp_path) == [
        "'mine_*': 2 of its 4 tasks have no data below --data-root:",
        "    mine_four, mine_three",
        f"    looked, for the first of them, for {tmp_path}/data/org/set/gone/test.jsonl, also as .json, .csv, .tsv or "
        f".parquet",
        "    --allow-partial runs 'mine_*' on the 2 that are there",
    ]


def test_another_split_counts_as_there(index: Mapping[str, Listed], root: Path) -> None:
    """Where leave would have a task scored on it."""
    (root / "allenai" / "ai2_arc" / "ARC-Easy" / "test.jsonl").unlink()
    with pytest.raises(TaskError) as caught:
        build_tasks(choose(["arc_e*y"], index), index, TaskOptions(data_root=root))
    first, *_, leave = str(caught.value).splitlines()
    assert first == "'arc_e*y': 2 of its 2 tasks have no data below --data-root:"
    assert leave == "    --allow-partial runs 'arc_e*y' on the 1 that are there, 1 of them on the validation split"
    loaded = build_tasks(choose(["arc_e*y"], index), index, TaskOptions(data_root=root, allow_partial=True))
    assert loaded.remarks == (
        "arc_easy: scored on its validation split, since the test split is not there.",
        "'arc_e*y': there is no data for arc_eu_easy, left out.",
    )


def test_what_a_pattern_brings_may_be_left_out(tmp_path: Path) -> None:
    """With leave, and said; not what was asked for by its name, nor all of it."""
    index = _index(tmp_path, {"mine_group": ["mine_one", "mine_three"], "mine_other": ["mine_four"]}, _FOUR)
    loaded = _build(["mine_*"], index, tmp_path, allow_partial=True)
    assert set(loaded.tasks) == {"mine_one", "mine_two"}
    assert set(loaded.groups) == set(loaded.partial) == {"mine_group"}
    assert loaded.remarks[:2] == (
        "'mine_*': there is no data for mine_four, mine_three, left out.",
        "mine_group: scored on 1 of its 2 tasks; there is no data for mine_three.",
    )
    assert _refused(["mine_*", "mine_three"], index, tmp_path, allow_partial=True)[0] == (
        "mine_three: the split 'test' of org/set, gone is not below --data-root"
    )
    assert _refused(["mine_fo*,mine_thr*"], index, tmp_path, allow_partial=True)[0] == (
        "mine_four: the split 'test' of org/set, gone is not below --data-root"
    )
    assert _refused(["mine_*e", "mine_f*"], index, tmp_path)[0] == (
        "mine_four: the split 'test' of org/set, gone is not below --data-root"
    )


def test_a_group_in_a_group_that_there_is_not(tmp_path: Path) -> None:
    """It is no group of its own without a list."""
    index = _index(tmp_path, {"ours": ["mine_one", {"group": "thiers"}], "theirs": ["mine_one"]}, {"mine_one": "there"})
    assert _refused(["ours"], index, tmp_path) == [
        "ours (ours.yaml): 'thiers' is no task, group or tag that lm-eval knows; did you mean theirs?"
    ]
    inline = {"group": "inner", "task": ["mine_one"]}
    index = _index(tmp_path / "other", {"ours": [inline, {"group": "theirs"}], "theirs": []}, {"mine_one": "there"})
    assert _refused(["ours"], index, tmp_path / "other") == [
        "theirs (theirs.yaml): there is no task in this group. List some under `task`."
    ]


def test_a_group_may_define_what_its_list_names(tmp_path: Path) -> None:
    """As lm-eval has it: what stands beside the list is of each in it."""
    index = _index(tmp_path, {"ours": ["first"]}, {})
    file = tmp_path / "tasks" / "ours.yaml"
    file.write_text(file.read_text() + yaml.safe_dump(_TASK | {"dataset_name": "there"}))
    loaded = _build(["ours"], index, tmp_path)
    assert [len(task.eval_docs) for task in loaded.tasks.values()] == [3]
    assert list(loaded.tasks) == ["ours::first"]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise SystemExit(1)", "its code ends the program, with sys.exit(1). Look at its functions, or leave it out."),
        ("raise ValueError('no luck')", "it cannot be set up: ValueError: no luck."),
    ],
)
def test_code_of_a_group_that_fails(tmp_path: Path, code: str, problem: str) -> None:
    """Told as that of a task."""
    _index(tmp_path, {"ours": ["mine_one"]}, {"mine_one": "there"})
    (tmp_path / "tasks" / "utils.py").write_text(code)
    file = tmp_path / "tasks" / "ours.yaml"
    file.write_text(file.read_text() + "process_docs: !function utils.all\n")
    assert _refused(["ours"], load_index([tmp_path / "tasks"]), tmp_path) == [f"ours (ours.yaml): {problem}"]
