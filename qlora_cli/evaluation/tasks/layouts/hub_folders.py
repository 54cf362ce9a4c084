"""Data filed under its name on the hub: `allenai/ai2_arc/ARC-Easy/validation.jsonl`.

The folder of a configuration holds a file for each split, or several (`test-00000-of-00002.parquet`), or a folder for
each; or it is what `save_to_disk` wrote. Where a task names no configuration, that folder is `default`, or the
dataset's own. A dataset's folder may also be a copy of its repository: then its card, README.md, says which files are
whose, and what types the columns have.

All of it may lie in a folder `hub` of the root, too, beside what others give out.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.layouts.found import DatasetName, Found, Needed, Numbers, child, descendant
from qlora_cli.evaluation.tasks.layouts.tables import CELLS, has_types, read_files
from qlora_cli.recipe.data_files import DATA_SUFFIXES, data_kind, data_stem, shown_path

_DEFAULT = "default"
_PART = re.compile(r"-\d.*")  # of several files: -00000-of-00002
_OF = re.compile(r"-(?P<number>\d{5})-of-(?P<count>\d{5})")
_SAVED = "state.json"  # what `save_to_disk` leaves in the folder of every split
# JSON that `datasets` leaves beside rows, which are none.
_ABOUT_ROWS = frozenset({"dataset_dict.json", "dataset_info.json", "dataset_infos.json", _SAVED})
_REMOTE = re.compile(r"hf://datasets/(?P<dataset>[^/]+/[^/@]+)(@[^/]+)?/(?P<file>.+)")


def find(root: Path, dataset: DatasetName, split: str) -> Found | None:
    """The files of a split; None if they are not there.

    Raises TaskError if there are files of more than one kind, which would be the same rows twice.
    """
    return next(filter(None, (_find(base, dataset, split) for base in _bases(root))), None)


def _bases(root: Path) -> list[Path]:
    inner = child(root, "hub")
    return [root, inner] if inner else [root]


def _find(root: Path, dataset: DatasetName, split: str) -> Found | None:
    named = dataset.arguments.get("data_files")
    if named is not None:
        given = _given_files(root, dataset, split, named)
        if given:
            return _found(given, dataset, root)
    repository = descendant(root, dataset.path)
    if repository is None or not repository.is_dir():
        return None
    for folder in _folders(repository, dataset):
        saved = _saved(folder, split)
        if saved:
            return _found_on_disk(saved)
        files = _split_files(folder, split)
        if files:
            return _found(files, dataset, root)
    files = _card_files(repository, dataset.config, split)
    return _found(files, dataset, root) if files else None


def place(dataset: DatasetName, split: str) -> str:
    """Where a file would be, below the root."""
    return f"{dataset.path}/{dataset.config or _DEFAULT}/{split}{DATA_SUFFIXES[0]}"


def splits(root: Path, dataset: DatasetName) -> list[str]:
    """Names of the splits that look to be there, in no particular order."""
    repositories = filter(None, (descendant(base, dataset.path) for base in _bases(root)))
    names: set[str] = set()
    for folder in (folder for repository in repositories for folder in _folders(repository, dataset)):
        for path in folder.iterdir() if folder.is_dir() else []:
            if _is_of_rows(path) or (path / _SAVED).is_file():
                names.add(_PART.sub("", data_stem(path) if path.is_file() else path.name))
    return sorted(names)


def _folders(repository: Path, dataset: DatasetName) -> Iterator[Path]:
    """Where the files of the configuration may be, the first that has them counts."""
    below = dataset.arguments.get("data_dir")
    inside = descendant(repository, below) if isinstance(below, str) else None
    if inside:
        yield inside
    if dataset.config:
        for folder in (child(repository, dataset.config), descendant(repository, "data", dataset.config)):
            if folder:
                yield folder
        if dataset.config != _DEFAULT:
            return
    for folder in (child(repository, _DEFAULT), repository, child(repository, "data")):
        if folder and folder.is_dir():
            yield folder


def _split_files(folder: Path, split: str) -> list[Path]:
    """The data files of a split in a folder, or in its folder of that name."""
    if not folder.is_dir():
        return []
    wanted = split.casefold()

    def is_of(path: Path) -> bool:
        stem = data_stem(path).casefold()
        return stem == wanted or (stem.startswith(wanted) and _PART.fullmatch(stem[len(wanted) :]) is not None)

    files = sorted(path for path in folder.iterdir() if _is_of_rows(path) and is_of(path))
    inner = child(folder, split)
    if not files and inner and inner.is_dir():
        files = sorted(filter(_is_of_rows, inner.iterdir()))
    stems = [data_stem(path) for path in files]
    if len({data_kind(path) for path in files}) > 1 or len(set(stems)) < len(stems) or _whole_and_parts(stems, wanted):
        raise TaskError(
            f"{shown_path(folder)}: expected the rows of the split {split!r} once, got "
            f"{', '.join(path.name for path in files)}. Leave one of them there."
        )
    _refuse_gaps(folder, split, files)
    return files


def _is_of_rows(path: Path) -> bool:
    return data_kind(path) is not None and path.name not in _ABOUT_ROWS and path.is_file()


def _refuse_gaps(folder: Path, split: str, files: list[Path]) -> None:
    """Raise TaskError if there are fewer files than their names say: a score of some rows is not the task's."""
    numbers = [match for path in files if (match := _OF.search(data_stem(path)))]
    for count in {int(match["count"]) for match in numbers}:
        there = {int(match["number"]) for match in numbers if int(match["count"]) == count}
        missing = [number for number in range(count) if number not in there]
        if missing:
            raise TaskError(
                f"{shown_path(folder)}: expected all {count} files of the split {split!r}, as their names say, got "
                f"{len(there)}; number {missing[0]:05d} is the first that is not there."
            )


def _whole_and_parts(stems: list[str], wanted: str) -> bool:
    return len(stems) > 1 and any(stem.casefold() == wanted for stem in stems)


def _saved(folder: Path, split: str) -> Path | None:
    """The folder of a split that `save_to_disk` wrote, of a whole DatasetDict or of a Dataset."""
    inner = child(folder, split)
    return inner if inner and (inner / _SAVED).is_file() else None


def _found_on_disk(folder: Path) -> Found:
    return Found((folder,), lambda _, __: _from_disk(folder))


def _from_disk(folder: Path) -> Any:
    import datasets

    try:
        dataset = datasets.Dataset.load_from_disk(str(folder))
    except Exception as error:  # of Arrow, of JSON, of files that are not there
        reason = " ".join(str(error).split()).rstrip(".")
        raise TaskError(f"{shown_path(folder)}: not readable as what `save_to_disk` wrote ({reason}).") from error
    if not len(dataset):
        raise TaskError(f"{shown_path(folder)}: there is no row in it.")
    return dataset


def _given_files(root: Path, dataset: DatasetName, split: str, named: object) -> list[Path]:
    """Files that the task itself names: on the hub, or in the dataset's repository."""
    paths = named.get(split) if isinstance(named, dict) else named if split == "train" else None
    files = []
    for path in _texts(paths):
        remote = _REMOTE.fullmatch(path)
        below = f"{remote['dataset']}/{remote['file']}" if remote else f"{dataset.path}/{path}"
        found = None if Path(below).is_absolute() or ".." in Path(below).parts else descendant(root, below)
        if found is None or not found.is_file() or not data_kind(found):
            return []
        files.append(found)
    return files


def _card(repository: Path) -> dict[str, Any]:
    """The front matter of the dataset's card; empty where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        text = (repository / "README.md").read_text(encoding="utf-8")
        parts = re.split(r"^---[ \t]*$", text, maxsplit=2, flags=re.MULTILINE)
        if len(parts) == 3 and not parts[0].strip():
            matter = yaml.safe_load(parts[1])
            return matter if isinstance(matter, dict) else {}
    return {}


def _card_files(repository: Path, config: str | None, split: str) -> list[Path]:
    """The files that the card says a split has."""
    for entry in _entries(_card(repository).get("configs")):
        name = entry.get("config_name")
        if name == config or (config is None and (name == _DEFAULT or entry.get("default") is True)):
            items = (item for item in _entries(entry.get("data_files")) if item.get("split") == split)
            patterns = [path for item in items for path in _texts(item.get("path"))]
            safe = [p for p in patterns if not Path(p).is_absolute() and ".." not in Path(p).parts]
            return sorted({path for pattern in safe for path in repository.glob(pattern) if data_kind(path)})
    return []


def _texts(value: object) -> list[str]:
    """A text, or the texts of a list."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def _entries(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _found(files: list[Path], dataset: DatasetName, root: Path) -> Found:
    repository = descendant(root, dataset.path)

    def read(needed: Needed, numbers: Numbers) -> Any:
        return read_files(files, needed, _features(repository, dataset.config), numbers)

    cells = data_kind(files[0]) in CELLS
    return Found(tuple(files), read, guessed=cells and not has_types(files[0], _features(repository, dataset.config)))


def _features(repository: Path | None, config: str | None) -> Any:
    """The types that the card gives the columns, a datasets.Features; None where it gives none."""
    if repository is None or "dataset_info" not in _card(repository):
        return None
    from datasets.info import DatasetInfosDict

    try:
        infos = DatasetInfosDict.from_directory(str(repository))
    except Exception:  # a card that is none: the types are those of the values
        return None
    info = infos.get(config or _DEFAULT) or (next(iter(infos.values())) if config is None and len(infos) == 1 else None)
    return info.features if info else None
