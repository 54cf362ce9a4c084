"""What a recipe is put together from: the files it extends, the file itself, then every `--set`, each over the last.

Of two files, sections are laid over each other key by key; any other value, a list or `columns` too, replaces the
one below. An override replaces what it names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qlora_cli.errors import Mistake, Position, RecipeError
from qlora_cli.recipe import yaml_source
from qlora_cli.recipe.data_files import near_name
from qlora_cli.recipe.fields import field_at, main_field, section_at
from qlora_cli.recipe.keys import repair_keys
from qlora_cli.recipe.paths import LONGEST_PATH, expand_home, resolve_paths
from qlora_cli.recipe.rules import displaced
from qlora_cli.recipe.substitution import substitute
from qlora_cli.recipe.values import position_of
from qlora_cli.recipe.yaml_source import Place, Source, Value, shorten, value_at

_EXTENDS: yaml_source.Path = ("extends",)
_MAX_CHAIN = 20
_LONGEST_NUMBER = 6  # digits: no list has as many items
_SECTIONS_DEEP = 1  # levels of mappings that files are laid over each other in


@dataclass
class Stack(Source):
    """The layers so far, as one source: what is wrong is so with any of them."""

    _set_by: dict[yaml_source.Path, int] = field(default_factory=dict)
    _layers: int = 0
    _first_override: int | None = None

    def lay(self, source: Source, folder: Path, *, keys: yaml_source.Path = ()) -> None:
        """Lay a source, whose paths are relative to `folder`, over what there is: a file, or what an override says of
        the field at `keys`."""
        self.mistakes += substitute(source)
        source.data = resolve_paths(source.data, folder)
        self._layers += 1
        for path, value in _settings(source.data):
            if value_at(self.data, path) != value:  # said again, it is no change
                self._set_by[path] = self._layers
            self._set_by.setdefault(path, self._layers)
        self._lay(self.data, source.data, (), keys)
        self.places.update(source.places)
        self.whole = self.whole and source.whole
        self.hinted |= source.hinted

    def begin_overrides(self) -> None:
        """What is laid from here on are arguments."""
        self._first_override = self._layers + 1

    def settle(self) -> None:
        """Take out what no longer holds under a later layer."""
        first = self._first_override or self._layers + 1
        # What is taken out may leave more without a use.
        while gone := displaced(self.data, self._set_by, first):
            for path in gone:
                section = value_at(self.data, path[:-1])
                if isinstance(section, dict):
                    section.pop(str(path[-1]), None)
                    self._forget(path)

    def _lay(
        self, below: dict[str, Value], above: dict[str, Value], path: yaml_source.Path, keys: yaml_source.Path
    ) -> None:
        deep = len(path) < (len(keys) - 1 if keys else _SECTIONS_DEEP)
        for key, value in above.items():
            inner = below.get(key)
            if deep and isinstance(value, dict) and isinstance(inner, dict):
                self._lay(inner, value, (*path, key), keys)
            elif deep and isinstance(value, list) and isinstance(inner, list) and (*path, key) == keys[: len(path) + 1]:
                self._lay_item(inner, value, (*path, key), keys)
            else:
                self._forget((*path, key))
                below[key] = value

    def _lay_item(self, below: list[Value], above: list[Value], path: yaml_source.Path, keys: yaml_source.Path) -> None:
        """Lay the one item that an override names, the last of `above`."""
        number = len(above) - 1
        at, value = (*path, number), above[number]
        deep = len(at) < len(keys)
        section, inner = section_at(at), below[number]
        if deep and isinstance(value, dict) and isinstance(inner, str) and section and (main := main_field(section)):
            inner = {main: inner}  # what was only named becomes the section that it stands for
        if deep and isinstance(value, dict) and isinstance(inner, dict):
            self._lay(inner, value, at, keys)
        else:
            self._forget(at)
            inner = value
        below[number] = inner

    def _forget(self, path: yaml_source.Path) -> None:
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]


def lay_file(stack: Stack, path: Path) -> None:
    """Lay a recipe file over the stack, and below it the files that it extends.

    Raises:
        RecipeError: if the file itself cannot be read at all.
    """
    _lay_file(stack, path, (path,))


def _lay_file(stack: Stack, path: Path, chain: tuple[Path, ...]) -> None:
    source = yaml_source.parse_yaml(_read_text(path), str(path))
    mistakes = [*source.mistakes, *repair_keys(source)]
    if source.data.get("extends") is not None:
        problems = _lay_extended(stack, source, path, chain)
        mistakes += problems
        # What the other file would have said is not missing here.
        source.whole = source.whole and not problems
    stack.mistakes += mistakes
    stack.lay(source, path.parent)


def _lay_extended(stack: Stack, source: Source, path: Path, chain: tuple[Path, ...]) -> list[Mistake]:
    """Lay the file that a source extends, and take `extends` out of the source; the problems with it."""
    value = source.data.pop("extends")
    if not isinstance(value, str):
        return [Mistake(_place(source), "extends", f"expected the path of a recipe, got {shorten(repr(value))}")]
    # Alone, since it is needed before anything else of the file.
    alone = Source({"extends": value}, source.places)
    if mistakes := substitute(alone):
        return mistakes
    if len(str(alone.data["extends"])) > LONGEST_PATH:
        return [Mistake(_place(source), "extends", f"{shorten(repr(value))}: longer than any path")]
    try:
        problem = _lay_parent(stack, path.parent / expand_home(str(alone.data["extends"])), chain)
    except (OSError, ValueError) as error:  # a name that no file can have
        problem = f"{shorten(repr(value))}: cannot be looked up: {error}"
    return [Mistake(_place(source), "extends", problem)] if problem else []


def _place(source: Source) -> Position:
    return position_of(_EXTENDS, source.places)


def _lay_parent(stack: Stack, parent: Path, chain: tuple[Path, ...]) -> str | None:
    """Lay the file that is extended; the problem with it, if there is one."""
    parent = Path(os.path.normpath(parent))
    real = parent.resolve()
    if real in [known.resolve() for known in chain]:
        return f"builds on itself: {' -> '.join(map(str, [*chain, parent]))}"
    if len(chain) > _MAX_CHAIN:
        return f"more than {_MAX_CHAIN} recipes build on each other"
    if not parent.is_file():
        return f"{parent}: there is no such file{near_name(parent)}"
    try:
        _lay_file(stack, parent, (*chain, parent))
    except RecipeError as error:
        stack.mistakes += error.mistakes
        return "cannot be read"
    return None


def lay_override(stack: Stack, override: str) -> None:
    """Lay one `key.path=value` over the stack; its place is the argument itself."""
    name, _, text = override.partition("=")
    words = tuple(part.strip() for part in name.split("."))
    argument = Position(f"--set {shorten(override)}")
    if problem := _override_problem(override, words, text):
        stack.mistakes.append(Mistake(argument, "", problem))
        return
    keys = _numbered(words)
    if found := _item_problem(stack, keys):
        stack.mistakes.append(Mistake(argument, *found))
        return
    try:
        value, source = yaml_source.parse_value(text, argument.file, keys)
    except RecipeError as error:
        stack.mistakes += error.mistakes
        return
    stack.mistakes += source.mistakes
    if not source.whole:
        return
    if _is_cut_short(text, source.places.get(keys)):
        stack.mistakes.append(Mistake(argument, "", "`#` begins a comment; put the value in quotes"))
        return
    for key in reversed(keys):
        value = [None] * key + [value] if isinstance(key, int) else {key: value}
    source.data = value if isinstance(value, dict) else {}
    for length in range(len(keys)):
        source.places.setdefault(keys[:length], Place(argument, argument))
    stack.mistakes += repair_keys(source)
    for length in range(len(keys)):
        # A section or a list that the recipe has stands there still.
        if isinstance(value_at(stack.data, keys[:length]), list if isinstance(keys[length], int) else dict):
            source.places.pop(keys[:length], None)
    stack.lay(source, Path.cwd(), keys=keys)


def _override_problem(override: str, keys: tuple[str, ...], text: str) -> str | None:
    if "=" not in override or not all(keys) or len(keys) > yaml_source.MAX_DEPTH:
        return "expected KEY=VALUE, as in --set training.max_steps=20"
    if not text.strip():
        return 'there is no value; write null to unset one, or "" for an empty text'
    return "a recipe can extend another only in its file" if keys == _EXTENDS else None


def _numbered(words: tuple[str, ...]) -> yaml_source.Path:
    """The keys of an override, those that are numbers of items as numbers."""
    keys: yaml_source.Path = ()
    for word in words:
        number = word.isascii() and word.isdecimal() and len(word) < _LONGEST_NUMBER
        keys = (*keys, int(word) if number and field_at((*keys, 0)) is not None else word)
    return keys


def _item_problem(stack: Stack, keys: yaml_source.Path) -> tuple[str, str] | None:
    """The name of what an override takes an item of, and why there is no such item."""
    for length, key in enumerate(keys):
        items = value_at(stack.data, keys[:length])
        if isinstance(key, int) and not (isinstance(items, list) and key < len(items)):
            name = yaml_source.dotted(keys[:length])
            if not isinstance(items, list):
                return name, f"is no list that has items by number; give it whole, as in --set '{name}=[...]'"
            return name, f"there is no item {key}: the list has {len(items)}, numbered from 0"
    return None


def _is_cut_short(text: str, place: Place | None) -> bool:
    """Whether YAML took a part of the text, or all of it, for a comment, which a shell's argument has none of."""
    whole = place is not None and place.text in (None, text.strip())
    return "#" in text and not whole


def _settings(data: dict[str, Value], path: yaml_source.Path = ()) -> Iterator[tuple[yaml_source.Path, Value]]:
    """Every field that a layer sets, sections among them."""
    for key, value in data.items():
        yield (*path, key), value
        if isinstance(value, dict) and not path:
            yield from _settings(value, (key,))


def _read_text(path: Path) -> str:
    problem = None
    try:
        if path.is_dir():
            problem = "is a folder; expected a recipe, a YAML file"
        else:
            with path.open("rb") as file:
                data = file.read(yaml_source.MAX_BYTES + 1)
            if len(data) <= yaml_source.MAX_BYTES:
                return data.decode("utf-8-sig")
            problem = f"larger than {yaml_source.MAX_BYTES:,} bytes, which no recipe is"
    except FileNotFoundError:
        problem = "no such file; expected a recipe, a YAML file"
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text at byte {error.start}"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    raise RecipeError([Mistake(Position(str(path)), "", problem)])
