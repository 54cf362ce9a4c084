"""`${NAME}` for an environment variable, in the fields that take one; `$${` writes the characters themselves."""

from __future__ import annotations

import os
import re

from qlora_cli.errors import Mistake
from qlora_cli.recipe.fields import all_fields, field_at, takes, takes_environment
from qlora_cli.recipe.values import position_of
from qlora_cli.recipe.words import nearest
from qlora_cli.recipe.yaml_source import Path, Source, Value, dotted, shorten

_REFERENCE = re.compile(r"\$(\$?)\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BARE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")


def substitute(source: Source) -> list[Mistake]:
    """Replace references by what the environment has; what cannot be replaced, or may not be there, is a mistake."""
    mistakes = []
    for path, _ in all_fields():
        section: Value = source.data
        for part in path[:-1]:
            section = section.get(str(part)) if isinstance(section, dict) else None
        if not isinstance(section, dict) or str(path[-1]) not in section:
            continue
        value = section[str(path[-1])]
        if takes_environment(path):
            if isinstance(value, str):
                section[str(path[-1])], problems = _expand(value)
                mistakes += [Mistake(position_of(path, source.places), dotted(path), text) for text in problems]
        else:
            mistakes += _elsewhere(path, value, source)
    return mistakes


def escape(text: str) -> str:
    """Text that `substitute` turns back into `text`."""
    # Only what would be read as a reference: elsewhere a second dollar would stay.
    return _REFERENCE.sub(lambda found: f"${found[0]}", text)


def _expand(text: str) -> tuple[str, list[str]]:
    problems = []

    def replacement(found: re.Match[str]) -> str:
        escaped, name = found.groups()
        if escaped:
            return found[0][1:]
        if not _NAME.fullmatch(name):
            problems.append(f"`{shorten(found[0])}` names no environment variable; write `$${{` for the characters")
        elif name not in os.environ:
            near = nearest(name, os.environ)
            hint = f"; did you mean `${{{near}}}`?" if near else ""
            problems.append(f"the environment variable {shorten(name)} is not set{hint}")
        return os.environ.get(name, found[0])

    for bare in _BARE.finditer(text):
        if bare[1] in os.environ:
            problems.append(f"`{bare[0]}` is not replaced; write `${{{bare[1]}}}` for the environment variable")
    return _REFERENCE.sub(replacement, text), problems


def _elsewhere(path: Path, value: Value, source: Source) -> list[Mistake]:
    """References in text that takes none, which would be taken to the letter."""
    field = field_at(path)
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    if inner:
        return [mistake for part, item in inner for mistake in _elsewhere((*path, part), item, source)]
    if not isinstance(value, str) or (field is not None and not takes(field, str)):
        return []
    if not any(_NAME.fullmatch(found[2]) for found in _REFERENCE.finditer(value)):
        return []
    fields = ", ".join(dotted(known) for known, _ in all_fields() if takes_environment(known))
    text = f"environment variables are not read in this field, only in {fields}; got {shorten(repr(value))}"
    return [Mistake(position_of(path, source.places), dotted(path), text)]
