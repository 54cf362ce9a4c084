"""YAML text to plain data with positions: safe by construction, and numbers as people write them.

PyYAML composes the node tree; only mappings, sequences and scalars are built from it, by the YAML 1.2 core rules.
So `1e-4` is a number (PyYAML's 1.1 rules read a string), `no` is a string, and no tag can construct an object.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import yaml

from qlora_cli.errors import Mistake, Position, RecipeError
from qlora_cli.recipe.yaml_faults import describe_fault, top_level_blocks, where_it_is

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
_ANCHOR = re.compile(r"&\S")
_MARKERS = ("---", "...")


class Place(NamedTuple):
    """Where a key and its value stand (of a list's item: the value, twice), and an unquoted value as it is written."""

    key: Position
    value: Position
    text: str | None = None


@dataclass
class Source:
    """What was read: plain data, the place of every key and item in it, and what is wrong with it as YAML.

    `whole` is off where faults of syntax hid a part of the file, so that what is missing may only be hidden. `hinted`
    are fields that were meant, but whose value is not known: they are not missing either.
    """

    data: dict[str, Value] = field(default_factory=dict)
    places: dict[Path, Place] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    whole: bool = True
    hinted: set[Path] = field(default_factory=set)


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


def parse_value(text: str, file: str, path: Path) -> tuple[Value, Source]:
    """Read one YAML value, such as the right side of `--set a.b=[q_proj, v_proj]`.

    Positions name `file` alone. The Source has the places of everything in the value, below `path`, and no data.
    """
    source = Source()
    try:
        node = _compose(text, file, source, lines=False)
    except _FaultError as fault:
        source.mistakes.append(fault.mistake)
        source.whole = False
        return None, source
    return _Builder(file, source, lines=False).build(node, path, 0), source


def parse_yaml(text: str, file: str) -> Source:
    """Read a YAML document whose top level is a mapping.

    Faults are in the Source's `mistakes`: what can be read beside them is read.

    Raises:
        RecipeError: if nothing can be read: too large, too deep, or no mapping.
    """
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise _refusal(file, f"larger than {MAX_BYTES:,} bytes, which no recipe is")
    try:
        return _parse(text, file)
    except _FaultError as fault:
        source = _salvage(text, file)
        if not source.mistakes:
            source.mistakes.append(fault.mistake)
        return source


def _parse(text: str, file: str, *, part: bool = False) -> Source:
    source = Source()
    node = _compose(text, file, source)
    data = _Builder(file, source).build(node, (), 0)
    if not isinstance(data, dict):
        # Of what is read in parts, one part may be a stray word.
        line = next((number for number, line in enumerate(text.split("\n"), 1) if line.strip()), 0) if part else 0
        raise _refusal(file, f"expected `key: value` lines at the top level, got {_kind(data)}", line)
    source.data = data
    return source


def _salvage(text: str, file: str) -> Source:
    """What can be read of a document with a fault in it, each top-level key for itself, and every fault found so."""
    result = Source(whole=False)
    for block in top_level_blocks(text):
        try:
            part = _parse(block, file, part=True)
        except _FaultError as fault:
            # An anchor may stand in another block.
            if not (fault.alias and _ANCHOR.search(text)):
                result.mistakes.append(fault.mistake)
        except RecipeError as error:
            if block.strip() not in _MARKERS:
                result.mistakes.extend(error.mistakes)
        else:
            result.data = part.data | result.data
            result.places = part.places | result.places
            result.mistakes.extend(part.mistakes)
    return result


class _FaultError(Exception):
    """Text that is not YAML, and so cannot be read on from there."""

    def __init__(self, mistake: Mistake, *, alias: bool = False) -> None:
        super().__init__(str(mistake))
        self.mistake, self.alias = mistake, alias


class _Composer(yaml.SafeLoader):
    """PyYAML's composer, which notes tags where they stand, and refuses one value too many before reading on."""

    def __init__(self, text: str, file: str, source: Source, *, lines: bool) -> None:
        super().__init__(text)
        self._file, self._source, self._lines, self._nodes = file, source, lines, 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        position = _position(self._file, event.start_mark, lines=self._lines)
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _too_large(position)
        if tag := getattr(event, "tag", None):
            shown = shorten(tag.replace("tag:yaml.org,2002:", "!!"))
            self._source.mistakes.append(Mistake(position, "", f"the tag {shown} is not allowed in a recipe"))
        return super().compose_node(parent, index)


def _compose(text: str, file: str, source: Source, *, lines: bool = True) -> yaml.Node | None:
    try:
        composer = _Composer(text, file, source, lines=lines)
        try:
            return composer.get_single_node()
        finally:
            composer.dispose()
    except yaml.MarkedYAMLError as error:
        mark = where_it_is(error)
        position = _position(file, mark, lines=lines) if mark else Position(file)
        alias = "undefined alias" in (error.problem or "")
        raise _FaultError(Mistake(position, "", describe_fault(error, lines=lines)), alias=alias) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML converts the numbers of escapes (`\Uffffffff`) and of `%YAML` lines unchecked.
        reason = " ".join(str(error).split())
        raise _FaultError(Mistake(Position(file), "", f"not valid YAML: {reason}")) from None
    except RecursionError:
        raise _refusal(file, "nested too deeply") from None


def _position(file: str, mark: yaml.Mark, *, lines: bool) -> Position:
    return Position(file, mark.line + 1, mark.column + 1) if lines else Position(file)


def _refusal(file: str, message: str, line: int = 0) -> RecipeError:
    return RecipeError([Mistake(Position(file, line, 1 if line else 0), "", message)])


def _too_large(position: Position) -> RecipeError:
    return RecipeError([Mistake(position, "", f"more than {MAX_NODES:,} values or {MAX_DEPTH} levels")])


def shorten(text: str, limit: int = 100) -> str:
    """`text`, cut to about `limit` characters, with what would steer a terminal written out."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return shown if len(text) <= limit else shown + "…"


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

    def __init__(self, file: str, source: Source, *, lines: bool = True) -> None:
        self._file, self._source, self._lines = file, source, lines
        self._nodes = 0

    def build(self, node: yaml.Node | None, path: Path, depth: int) -> Value:
        if node is None:
            return None
        self._nodes += 1
        position = self._position(node)
        self._source.places.setdefault(path, Place(position, position, _text(node)))
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
            at = self._position(key_node)
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                self._mistake(at, path, "a key must be a word")
            elif key == "<<" and key_node.style is None:
                self._mistake(at, path, "merge keys (`<<`) are not read; write the keys out, or use `extends`")
            elif key in result:
                first = self._source.places[(*path, key)].key
                before = f" (first on line {first.line})" if first.line else ""
                self._mistake(at, (*path, key), f"`{shorten(key)}` is given twice{before}; leave one out")
            else:
                self._source.places[(*path, key)] = Place(at, self._position(value_node), _text(value_node))
                result[key] = self.build(value_node, (*path, key), depth + 1)
        return result

    def _mistake(self, position: Position, path: Path, message: str) -> None:
        self._source.mistakes.append(Mistake(position, dotted(path), message))

    def _position(self, node: yaml.Node) -> Position:
        return _position(self._file, node.start_mark, lines=self._lines)


def dotted(path: Path) -> str:
    """The name of a field as messages and `--set` have it; long keys are cut."""
    return ".".join(shorten(str(part)) for part in path)


def _text(node: yaml.Node) -> str | None:
    return str(node.value) if isinstance(node, yaml.ScalarNode) and node.style is None else None
