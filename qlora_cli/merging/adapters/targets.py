"""Which modules of a model an adapter's config names, as PEFT reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def targeted_modules(config: dict[str, Any], paths: Iterable[str]) -> list[str]:
    """Those of the module paths that `target_modules` names and no other field takes away again.

    None for a config that names no modules, or all by `all-linear`: PEFT writes their names when it trains.
    """
    wanted = config.get("target_modules")
    if not wanted or wanted == "all-linear":
        return []
    excluded, saved = config.get("exclude_modules") or [], config.get("modules_to_save") or []
    return [
        path
        for path in paths
        if _named(wanted, path)
        and not _named(excluded, path)
        and not any(within(path, name) for name in saved)
        and (isinstance(wanted, str) or path in wanted or _in_layers(config, path))
    ]


def within(path: str, name: str) -> bool:
    """Whether a module is, or lies in, one that has this name or path."""
    return f".{name}." in f".{path}."


def saved_by(path: str, name: str) -> bool:
    """Whether a module is, or lies in, one that `modules_to_save` has saved under this name.

    PEFT takes the end of a path, a part of a word too: `norm` is every `input_layernorm` as well.
    """
    words = path.split(".")
    return any(".".join(words[: count + 1]).endswith(name) for count in range(len(words)))


def ends_with(path: str, name: str) -> bool:
    """Whether a module's path is this name or ends in it."""
    return path == name or path.endswith(f".{name}")


def _named(names: str | list[str], path: str) -> bool:
    """By a list of names, or by an expression for whole paths."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, path))
    return any(ends_with(path, name) for name in names)


def _in_layers(config: dict[str, Any], path: str) -> bool:
    """Whether `layers_to_transform` takes the layer that this module is in: the first number of its path."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)
        # None or no number where the pattern has alternatives or groups of its own.
        if match and match.lastindex and match[match.lastindex].isdecimal():
            return int(match[match.lastindex]) in (layers if isinstance(layers, list) else [layers])
    return False
