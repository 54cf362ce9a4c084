"""The names of tasks: lm-eval's own index, kept, and folders of a person's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_cli.data.cache import cache_folder
from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.index import entries, lm_eval_tasks, load_index, task_names
from tests.support.benchmarks import keep_index

_TASK = "task: {name}\ndataset_path: some/where\noutput_type: generate_until\ntest_split: test\n"


def test_kept_index_is_lm_evals_own() -> None:
    """What comes back from the cache folder is, entry for entry, what lm-eval's own scan finds."""
    from lm_eval.tasks._index import TaskIndex

    keep_index()
    ours = entries(load_index())
    theirs = TaskIndex.build([lm_eval_tasks()])
    assert ours.keys() == theirs.keys()
    for name, entry in theirs.items():
        assert (ours[name].kind, ours[name].yaml_path) == (entry.kind, entry.yaml_path)
        if entry.kind.name == "TAG":
            assert ours[name].tags == entry.tags


def test_kept_index_needs_no_lm_eval() -> None:
    """A name is looked up without importing lm-eval or torch."""
    keep_index()
    code = (
        "import sys; from qlora_cli.evaluation.tasks.index import load_index, task_names; index = load_index();"
        "assert len(task_names('mmlu', index)) == 57; assert not {'lm_eval', 'torch', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"names": [[1, 2]]}', b'{"names": [["a", 9, null, [], null]]}']
)
def test_damaged_index_is_made_again(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache file that is cut off, or something else, is replaced."""
    keep_index()
    whole = load_index()
    (kept,) = cache_folder().glob("tasks-*.json")
    kept.write_bytes(content)
    monkeypatch.setattr("qlora_cli.evaluation.tasks.index._scan", lambda folder, own: whole)
    said: list[str] = []
    assert load_index(waiting=lambda: said.append("it takes seconds")) == whole
    assert json.loads(kept.read_bytes())["names"]
    assert load_index(waiting=lambda: said.append("and again")) == whole
    assert said == ["it takes seconds"]


def test_tags_and_groups_lead_to_their_tasks() -> None:
    """A name stands for the tasks of its groups and tags, whatever their depth."""
    keep_index()
    index = load_index()
    assert task_names("glue", index) == sorted(
        ["cola", "mnli", "mnli_mismatch", "mrpc", "qnli", "qqp", "rte", "sst2", "wnli"]
    )
    assert len(task_names("mmlu", index)) == 57
    assert task_names("rte", index) == ["rte"]


def test_task_path_comes_first(tmp_path: Path) -> None:
    """Tasks of a person's own folder are found, replace lm-eval's of that name, and may bear its tags."""
    keep_index()
    (tmp_path / "mine.yaml").write_text(_TASK.format(name="mine") + "tag: glue\n")
    (tmp_path / "rte.yaml").write_text(_TASK.format(name="rte"))
    (tmp_path / "_part.yaml").write_text("output_type: generate_until\n")  # to be included: no task
    index = load_index([tmp_path])
    assert index["mine"].file == str(tmp_path / "mine.yaml")
    assert index["mine"].output_type == "generate_until"
    assert index["rte"].file == str(tmp_path / "rte.yaml")
    assert {"mine", "cola"} <= set(task_names("glue", index))


def test_broken_task_files_are_all_named(tmp_path: Path) -> None:
    """YAML that cannot be parsed, an include that is not there, and a name that is taken are told together."""
    keep_index()
    (tmp_path / "a.yaml").write_text("task: [\n")
    (tmp_path / "b.yaml").write_text("include: nowhere.yaml\ntask: b\n")
    (tmp_path / "c.yaml").write_text(_TASK.format(name="same"))
    (tmp_path / "d.yaml").write_text(_TASK.format(name="same"))
    with pytest.raises(TaskError) as caught:
        load_index([tmp_path, tmp_path / "nowhere"])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{tmp_path / 'a.yaml'}: not readable as a task: while parsing a flow node")
    assert "nowhere.yaml" in lines[1]
    assert lines[2] == (
        f"{tmp_path / 'd.yaml'}: not readable as a task: `same` is defined in {tmp_path / 'c.yaml'} as well; "
        f"give one of them another name"
    )
    assert lines[3] == f"--task-path: {tmp_path / 'nowhere'} is not a folder. Give one that holds tasks as YAML files."


def test_task_path_without_tasks(tmp_path: Path) -> None:
    """A folder with nothing in it was probably not the one that was meant."""
    keep_index()
    with pytest.raises(TaskError, match=r"there is no task below .*: expected \.yaml files with the key `task`\."):
        load_index([tmp_path])
