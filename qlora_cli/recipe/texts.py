"""The texts in plain data, wherever they stand in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qlora_cli.recipe.yaml_source import Path, Value


def texts(data: Value, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Every text in nested mappings and lists, with its path; a key is none."""
    if isinstance(data, str):
        yield path, data
    for key, value in _children(data):
        yield from texts(value, (*path, key))


def map_texts(data: Value, change: Callable[[Path, str], str], path: Path = ()) -> Value:
    """The same data with `change(path, text)` in place of every text."""
    match data:
        case str():
            return change(path, data)
        case list():
            return [map_texts(value, change, (*path, number)) for number, value in enumerate(data)]
        case dict():
            return {key: map_texts(value, change, (*path, key)) for key, value in data.items()}
    return data


def _children(data: Value) -> Iterator[tuple[str | int, Value]]:
    if isinstance(data, dict):
        yield from data.items()
    elif isinstance(data, list):
        yield from enumerate(data)
