"""YAML text to plain data with positions: safe by construction, and numbers as people write them.

PyYAML composes the node tree; only mappings, sequences and scalars are built from it, by the YAML 1.2 core rules.
So `1e-4` is a number (PyYAML's 1.1 rules read a string), `no` is a string, and no tag can construct an object.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import yaml

from qlora_cli.errors import RecipeError

Value: TypeAlias = "bool | int | float | str | list[Value] | dict[str, Value] | None"
Path: TypeAlias = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_NODES = 10_000
MAX_DEPTH = 40
MAX_INT_DIGITS = 100  # Python itself refuses to read very long ones

_NULL = re.compile(r"|~|null|Null|NULL")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Position(NamedTuple):
    """Where a value stands: file as the user named it, line and column from 1; line 0 for what is not in a file."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True)
class YamlSource:
    """Plain data and, for every key and item in it, its position."""

    data: dict[str, Value]
    positions: dict[Path, Position]


def parse_scalar(text: str) -> Value:
    """Read one unquoted scalar by the YAML 1.2 core schema, with `_` allowed between the digits of an integer."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text) and len(text) <= MAX_INT_DIGITS:
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        # Python spells YAML's .inf and .nan without the leading dot.
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def parse_value(text: str, file: str) -> Value:
    """Read one YAML value, such as the right side of `--set a.b=[q_proj, v_proj]`; messages name `file` alone."""
    return _Builder(file, lines=False).build(_compose(text, file, lines=False), (), 0)


def parse_yaml(text: str, file: str) -> YamlSource:
    """Read a YAML document whose top level is a mapping.

    Raises:
        RecipeError: for syntax faults, duplicate keys, tags, oversized or deeply nested documents.
    """
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise RecipeError(f"{file}: larger than {MAX_BYTES:,} bytes, which no recipe is")
    node = _compose(text, file)
    builder = _Builder(file)
    data = builder.build(node, (), 0)
    if not isinstance(data, dict):
        raise RecipeError(f"{file}: expected `key: value` lines at the top level, got {_kind(data)}")
    return YamlSource(data, builder.positions)


class _Composer(yaml.SafeLoader):
    """PyYAML's composer, which refuses a tag or one value too many where it stands, before reading on."""

    def __init__(self, text: str, file: str, *, lines: bool) -> None:
        super().__init__(text)
        self._file, self._lines, self._nodes = file, lines, 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _too_large(_position(self._file, event.start_mark, lines=self._lines))
        if tag := getattr(event, "tag", None):
            shown = shorten(tag.replace("tag:yaml.org,2002:", "!!"))
            position = _position(self._file, event.start_mark, lines=self._lines)
            raise RecipeError(f"{position}: the tag {shown} is not allowed in a recipe")
        return super().compose_node(parent, index)


def _compose(text: str, file: str, *, lines: bool = True) -> yaml.Node | None:
    try:
        composer = _Composer(text, file, lines=lines)
        try:
            return composer.get_single_node()
        finally:
            composer.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = _position(file, mark, lines=lines) if mark else file
        raise RecipeError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML converts the numbers of escapes (`\Uffffffff`) and of `%YAML` lines unchecked.
        raise RecipeError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{file}: nested too deeply") from None


def _position(file: str, mark: yaml.Mark, *, lines: bool) -> Position:
    return Position(file, mark.line + 1, mark.column + 1) if lines else Position(file, 0, 0)


def _too_large(position: Position) -> RecipeError:
    return RecipeError(f"{position}: more than {MAX_NODES:,} values or {MAX_DEPTH} levels")


def shorten(text: str, limit: int = 100) -> str:
    """`text`, cut to about `limit` characters."""
    return text if len(text) <= limit else text[:limit] + "…"


def _kind(value: Value) -> str:
    match value:
        case None:
            return "nothing"
        case list():
            return "a list"
        case _:
            return f"`{shorten(str(value))}`"


class _Builder:
    """Builds plain data from composed nodes and remembers where each came from."""

    def __init__(self, file: str, *, lines: bool = True) -> None:
        self.positions: dict[Path, Position] = {}
        self._file, self._lines = file, lines
        self._nodes = 0

    def build(self, node: yaml.Node | None, path: Path, depth: int) -> Value:
        if node is None:
            return None
        self._nodes += 1
        position = self._position(node)
        self.positions.setdefault(path, position)
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            # Aliases that refer to aliases, or to themselves, grow without bound.
            raise _too_large(position)
        match node:
            case yaml.MappingNode():
                return self._mapping(node, path, depth)
            case yaml.SequenceNode():
                return [self.build(item, (*path, i), depth + 1) for i, item in enumerate(node.value)]
            case yaml.ScalarNode(style=None):
                return parse_scalar(node.value)
            case _:
                return str(node.value)

    def _mapping(self, node: yaml.MappingNode, path: Path, depth: int) -> dict[str, Value]:
        result: dict[str, Value] = {}
        for key_node, value_node in node.value:
            position = self._position(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{position}: a key must be a word")
            key = str(key_node.value)
            if key == "<<" and key_node.style is None:
                raise RecipeError(f"{position}: merge keys (`<<`) are not read; write the keys out")
            if key in result:
                raise RecipeError(f"{position}: `{shorten(key)}` is given twice")
            self.positions[(*path, key)] = position
            result[key] = self.build(value_node, (*path, key), depth + 1)
        return result

    def _position(self, node: yaml.Node) -> Position:
        return _position(self._file, node.start_mark, lines=self._lines)
