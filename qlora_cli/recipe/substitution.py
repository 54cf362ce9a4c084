"""`${NAME}` for an environment variable, in the fields that take one; there, `$$` writes a dollar."""

from __future__ import annotations

import os
import re

from qlora_cli.errors import Mistake
from qlora_cli.recipe.fields import all_fields, field_at, takes, takes_environment
from qlora_cli.recipe.paths import is_path
from qlora_cli.recipe.texts import map_texts
from qlora_cli.recipe.values import position_of
from qlora_cli.recipe.words import nearest
from qlora_cli.recipe.yaml_source import Path, Source, Value, dotted, shorten

# `$$`, `${NAME}` or what is meant for it, `$NAME`.
_DOLLAR = re.compile(r"\$\$|\$\{(?:(?P<name>[^{}$]{0,200})\})?|\$(?P<bare>[A-Za-z_][A-Za-z0-9_]*)")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def substitute(source: Source) -> list[Mistake]:
    """Replace references by what the environment has; what cannot be replaced, or may not be there, is a mistake."""
    mistakes: list[Mistake] = []

    def replaced(path: Path, text: str) -> str:
        if not is_path(path, text):
            mistakes.extend(_elsewhere(path, text, source))
            return text
        expanded, problems = _expand(text)
        mistakes.extend(Mistake(position_of(path, source.places), dotted(path), problem) for problem in problems)
        return expanded

    source.data = {key: map_texts(value, replaced, (key,)) for key, value in source.data.items()}
    return mistakes


def escape(text: str) -> str:
    """Text that `substitute` turns back into `text`, in a field that takes references."""
    return text.replace("$", "$$")


def escape_all(data: dict[str, Value]) -> dict[str, Value]:
    """A recipe's data that `substitute` turns back into `data`."""
    return {
        key: map_texts(value, lambda path, text: escape(text) if is_path(path, text) else text, (key,))
        for key, value in data.items()
    }


def _expand(text: str) -> tuple[str, list[str]]:
    problems: dict[str, None] = {}  # each once

    def replacement(found: re.Match[str]) -> str:
        name, bare = found["name"], found["bare"]
        if found[0] == "$$":
            return "$"
        if bare is not None:
            if bare in os.environ:
                problems.setdefault(f"`${bare}` is not replaced; write `${{{bare}}}` for the environment variable")
        elif name is None or not _NAME.fullmatch(name):
            problems.setdefault(f"`{shorten(found[0])}` names no environment variable; write `$$` for a dollar")
        elif name not in os.environ:
            near = nearest(name, os.environ)
            hint = f"; did you mean `${{{near}}}`?" if near else ""
            problems.setdefault(f"the environment variable {shorten(name)} is not set{hint}")
        return os.environ.get(name or "", found[0])

    return _DOLLAR.sub(replacement, text), list(problems)


def _elsewhere(path: Path, text: str, source: Source) -> list[Mistake]:
    """References in text that takes none, which would be taken to the letter."""
    field = field_at(path)
    if "${" not in text or takes_environment(path) or (field is not None and not takes(field, str)):
        return []
    fields = ", ".join(dotted(known) for known, _ in all_fields() if takes_environment(known))
    told = f"environment variables are not read in this field, only in {fields}; got {shorten(repr(text))}"
    return [Mistake(position_of(path, source.places), dotted(path), told)]
