"""Which tasks, groups and tags there are.

lm-eval finds that out by parsing all of its 14,000 YAML files, which takes five seconds, and by importing itself, which
takes another. What it found is kept in the user's cache folder, so that a misspelt name is told at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from qlora_cli.data.cache import cache_folder
from qlora_cli.disk import json_text, write_text
from qlora_cli.errors import QloraError, TaskError

Kind: TypeAlias = Literal["task", "python task", "group", "tag"]

_FORMAT = 2  # of the kept file


@dataclass(frozen=True, slots=True)
class Listed:
    """A name that can be asked for.

    Attributes:
        file: the YAML file that defines it; None for a tag, which is only a word that tasks bear.
        members: of a group or a tag, the names that it is made of; those of a group's inline tasks may be in no index.
        output_type: of a task, lm-eval's word for what it asks; None where the file does not say.
    """

    name: str
    kind: Kind
    file: str | None
    members: tuple[str, ...] = ()
    output_type: str | None = None


Index: TypeAlias = Mapping[str, Listed]


def load_index(task_paths: Sequence[Path] = (), *, waiting: Callable[[], None] = lambda: None) -> dict[str, Listed]:
    """Every name that lm-eval knows, and those of the YAML files below `task_paths`, which come first.

    Args:
        waiting: called before all of lm-eval's files are read, which takes seconds, if that has to be.

    Raises:
        TaskError: if lm-eval is not installed, a folder of `task_paths` is not there or holds no task, or files in it
            cannot be read as tasks: all of them are named.
    """
    own = _lm_eval_index(waiting)
    found = _scan_all(task_paths)
    # A folder may add tasks to a tag that is there already, and must not take the others from it.
    for name, listed in found.items():
        if listed.kind == "tag" and name in own and own[name].kind == "tag":
            members = tuple(sorted({*own[name].members, *listed.members}))
            found[name] = Listed(name, "tag", None, members)
    return {**own, **found}


def task_names(name: str, index: Index) -> list[str]:
    """The tasks that a name stands for: itself, or those of a group or a tag, those of its groups, and so on."""
    tasks: dict[str, None] = {}
    _collect(name, index, tasks, set())
    return list(tasks)


def _collect(name: str, index: Index, tasks: dict[str, None], seen: set[str]) -> None:
    listed = index.get(name)
    if listed is None or not listed.members:
        tasks[name] = None
    elif name not in seen:
        seen.add(name)
        for member in listed.members:
            _collect(member, index, tasks, seen)


def entries(index: Index) -> dict[str, Any]:
    """The index as lm-eval has it: its own entries, of type lm_eval.tasks._index.Entry, by name."""
    from lm_eval.tasks._index import Entry, Kind

    kinds = {"task": Kind.TASK, "python task": Kind.PY_TASK, "group": Kind.GROUP, "tag": Kind.TAG}
    return {
        name: Entry(
            name=name,
            kind=kinds[listed.kind],
            yaml_path=Path(listed.file) if listed.file else None,
            tags=set(listed.members) if listed.kind == "tag" else set(),
        )
        for name, listed in index.items()
    }


def lm_eval_tasks() -> Path:
    """The folder of lm-eval's own tasks, found without importing it."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise TaskError("lm-eval is not installed here: pip install 'lm-eval>=0.4.13,<0.5'")
    return Path(spec.submodule_search_locations[0]).resolve() / "tasks"


def _lm_eval_index(waiting: Callable[[], None]) -> dict[str, Listed]:
    folder = lm_eval_tasks()
    kept = _kept_file(folder)
    found = _read(kept, folder) if kept else None
    if found is None:
        waiting()
        found = _scan(folder, own=True)
        if kept:
            _write(kept, folder, found)
    return found


def _kept_file(folder: Path) -> Path | None:
    """Where the index of this folder is kept; another version has another file."""
    with contextlib.suppress(OSError, RuntimeError):  # no home
        version = importlib.metadata.version("lm_eval")
        # One that is edited, as in a clone of lm-eval, changes at least where a file comes or goes.
        changed = max(path.stat().st_mtime_ns for path in (folder, *folder.iterdir()))
        facts = json.dumps([_FORMAT, version, str(folder), changed])
        return cache_folder() / f"tasks-{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"
    return None


def _read(file: Path, folder: Path) -> dict[str, Listed] | None:
    """What `_write` wrote; None if that is not there, or is something else."""
    try:
        rows = json.loads(file.read_bytes())["names"]
        kinds = get_args(Kind)
        found = {
            name: Listed(name, kinds[kind], str(folder / path) if path else None, tuple(members), output_type)
            for name, kind, path, members, output_type in rows
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    with contextlib.suppress(OSError):
        file.touch()  # or it makes room, as what nobody uses does
    return found


def _write(file: Path, folder: Path, index: Index) -> None:
    kinds = get_args(Kind)
    rows = [
        [
            listed.name,
            kinds.index(listed.kind),
            Path(listed.file).relative_to(folder).as_posix() if listed.file else None,
            listed.members,
            listed.output_type,
        ]
        for listed in index.values()
    ]
    # A full disk, or none to write on, costs some seconds the next time.
    with contextlib.suppress(OSError, QloraError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_text(file, json_text({"folder": str(folder), "names": rows}))


def _scan_all(task_paths: Iterable[Path]) -> dict[str, Listed]:
    found: dict[str, Listed] = {}
    problems = []
    for path in task_paths:
        try:
            found |= _scan(path, own=False)
        except TaskError as error:
            problems.append(str(error))
    if problems:
        raise TaskError("\n".join(problems))
    return found


def _scan(folder: Path, *, own: bool) -> dict[str, Listed]:
    """What lm-eval finds below a folder. Of its `own` files those that it cannot read are passed over, as it does."""
    if not folder.is_dir():
        raise TaskError(f"--task-path: {folder} is not a folder. Give one that holds tasks as YAML files.")
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    found: dict[str, Any] = {}
    problems = []
    for file in TaskIndex._iter_yaml_files(folder.resolve()):
        try:
            config = load_yaml(file, resolve_func=False)
            if own or config.keys() & {"task", "group", "class"}:  # what others include has none of these
                _refuse_second(config, file, found, own=own)
                TaskIndex.process_cfg(config, file, found)
        except Exception as error:  # of parsing, of an include that is not there, of a shape that is none
            if not own:
                problems.append(f"{file}: not readable as a task: {_on_one_line(error)}")
    if problems:
        raise TaskError("\n".join(problems))
    if not found:
        raise TaskError(f"--task-path: there is no task below {folder}: expected .yaml files with the key `task`.")
    return {name: _listed(entry) for name, entry in found.items()}


def _refuse_second(config: Mapping[str, Any], file: Path, found: Mapping[str, Any], *, own: bool) -> None:
    name = config.get("group") if "group" in config and "class" not in config else config.get("task")
    if not own and not isinstance(name, str):
        raise TaskError(f"expected a name under `task` or `group`, got {name!r}")
    earlier = found.get(str(name))
    if not own and earlier is not None and earlier.yaml_path is not None:
        raise TaskError(f"`{name}` is defined in {earlier.yaml_path} as well; give one of them another name")


def _listed(entry: Any) -> Listed:
    """The kept facts of an lm_eval.tasks._index.Entry."""
    kinds: dict[str, Kind] = {"TASK": "task", "PY_TASK": "python task", "GROUP": "group", "TAG": "tag"}
    kind = kinds[entry.kind.name]
    file = str(entry.yaml_path) if entry.yaml_path else None
    config = entry.cfg or {}
    if kind == "tag":
        return Listed(entry.name, kind, None, tuple(sorted(entry.tags)))
    if kind == "group":
        return Listed(entry.name, kind, file, tuple(_members(config.get("task"))))
    output_type = config.get("output_type")
    return Listed(entry.name, kind, file, (), output_type if isinstance(output_type, str) else None)


def _members(tasks: object) -> Iterable[str]:
    """The names in a group's list; an inline group gives those in its own."""
    for item in tasks if isinstance(tasks, list) else [tasks]:
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict) and isinstance(item.get("task"), list):
            yield from _members(item["task"])
        elif isinstance(item, dict):
            name = item.get("group") or item.get("task")
            if isinstance(name, str):
                yield name


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
