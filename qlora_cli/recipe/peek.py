"""What a first recipe may name: the models and data files that are here, and their names as a recipe has them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from qlora_cli.recipe.data_files import DATA_KINDS, DATA_SUFFIXES, data_kind, data_stem, data_suffix
from qlora_cli.recipe.paths import expand_home, looks_local

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_TRAINING = ("train", "training")
_HELD_OUT = ("validation", "valid", "val", "dev", "test", "eval")
# Names that say what a file is for, but not what is in it.
_GENERIC = (*_TRAINING, "data", "dataset", "datasets", "rows")


def guess_model(folder: Path) -> str | None:
    """The model folder in `folder`, or in its `models`, if there is exactly one; relative to `folder`."""
    inside = _folders(folder / "models")
    below = [inner for path in inside for inner in _folders(path)]
    found = [path for path in (*_folders(folder), *inside, *below) if _is_model(path)]
    return _name(found[0], folder) if len(found) == 1 else None


def guess_train(folder: Path) -> str | None:
    """The file of training rows in `folder`, or in its `data`, if it is obvious; relative to `folder`.

    A file named so (`train.csv`, `gsm8k_train.jsonl`), else the only data file of its kind.
    """
    places = [_data_files(place) for place in (folder, folder / "data")]
    named = [[p for p in files if _part(p, _TRAINING)] for files in places]
    others = [[p for p in files if not _part(p, _HELD_OUT)] for files in places]
    kinds = ([p for p in files if _may_be_rows(p, kind)] for kind in DATA_KINDS for files in others)
    for files in (*named, *kinds):
        if len(files) == 1:
            return _name(files[0], folder)
    return None


def possible_rows(folder: Path) -> list[str]:
    """Every data file in `folder` or in its `data` that may hold rows to learn; relative to `folder`."""
    files = [path for place in (folder, folder / "data") for path in _data_files(place)]
    return [_name(path, folder) for path in files if _may_be_rows(path, data_kind(path))]


def guess_validation(train: str) -> list[str]:
    """Files or folders of held-out rows beside local training rows, by their names; the likeliest first.

    `gsm8k_test.jsonl` beside `gsm8k_train.jsonl`, or `test.jsonl` beside any.
    """
    path = Path(train)
    if not _exists(path):
        return []
    part = _part(path, _TRAINING)
    stems = [re.sub(rf"(?i)(?<![a-z]){part}(?![a-z])", word, data_stem(path)) if part else word for word in _HELD_OUT]
    suffixes = dict.fromkeys([data_suffix(path), *DATA_SUFFIXES]) if path.is_file() else [""]
    beside = [path.with_name(stem + suffix) for suffix in suffixes for stem in stems]
    return [str(p) for p in beside if p != path and (p.is_dir() if suffixes == [""] else p.is_file())]


def guess_run_folder(train: str, base_model: str) -> str:
    """`runs/` and a name from the data, or from the model where the data's says nothing; one that is not there yet."""
    path = Path(train)
    local = looks_local(train) or _exists(path)
    words = [data_stem(path), path.parent.name] if local else [path.name]
    words = [re.sub(rf"(?i)[._-]*(?<![a-z])({'|'.join(_TRAINING)})(?![a-z])[._-]*", "", word) for word in words]
    words = [re.sub(r"[^\w.-]+", "-", word).strip("-.") for word in (*words, Path(base_model).name, "first")]
    name = next(word for word in words if word and word.lower() not in _GENERIC)
    names = (name if number == 1 else f"{name}-{number}" for number in range(1, 10_000))
    return next((f"runs/{free}" for free in names if not _exists(Path("runs", free))), f"runs/{name}")


def as_recipe_path(name: str, folder: Path) -> str:
    """A local name, relative to the current folder, as a recipe in `folder` has it; an absolute one stays so."""
    if os.path.isabs(expand_home(name)):  # noqa: PTH117
        return name
    target = os.path.abspath(name)  # noqa: PTH100
    for start in (os.path.abspath(folder), os.path.realpath(folder)):  # noqa: PTH100
        # From behind a symbolic link, `..` leads elsewhere than its name says.
        relative = os.path.relpath(target, start)
        if os.path.realpath(folder / relative) == os.path.realpath(target):
            plain = not relative.startswith("~") and (looks_local(relative) or _exists(folder / relative))
            return relative if plain else os.path.join(os.curdir, relative)  # noqa: PTH118 (Path would drop the dot)
    return target


def _is_model(path: Path) -> bool:
    # Not by Path, which raises for a folder that may not be entered.
    names = ("config.json", *_TOKENIZERS)
    there = [os.path.isfile(path / name) for name in names]  # noqa: PTH113
    return there[0] and any(there[1:])


def _folders(path: Path) -> list[Path]:
    return [p for p in _entries(path) if not p.name.startswith(".") and os.path.isdir(p)]  # noqa: PTH112


def _data_files(path: Path) -> list[Path]:
    files = [p for p in _entries(path) if data_kind(p) and not p.name.startswith(".")]
    return [p for p in files if os.path.isfile(p)]  # noqa: PTH113


def _may_be_rows(path: Path, kind: str | None) -> bool:
    """Whether this is of the kind, and not some setting in JSON, of which any folder may have several."""
    if data_kind(path) != kind or path.suffix.lower() != ".json":  # settings are not packed
        return data_kind(path) == kind
    try:
        with path.open("rb") as file:
            return file.read(100).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except OSError:
        return False


def _entries(path: Path) -> Iterator[Path]:
    try:
        yield from sorted(path.iterdir())
    except OSError:  # not there, no folder, or not ours to read
        return


def _part(path: Path, words: tuple[str, ...]) -> str | None:
    """The word of `words` that the file's name has as a part of its own: `train` in `gsm8k_train-v2`."""
    parts = re.split(r"[\W_\d]+", data_stem(path).lower())
    return next((word for word in words if word in parts), None)


def _name(path: Path, folder: Path) -> str:
    name = str(path.relative_to(folder))
    return os.path.join(os.curdir, name) if name.startswith("~") else name  # noqa: PTH118 (Path would drop the dot)


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 (a name too long to look up is no path)
