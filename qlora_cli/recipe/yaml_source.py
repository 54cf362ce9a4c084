"""YAML text to plain data with positions: safe by construction, and numbers as people write them.

PyYAML composes the node tree; only mappings, sequences and scalars are built from it, by the YAML 1.2 core rules.
So `1e-4` is a number (PyYAML's 1.1 rules read a string), `no` is a string, and no tag can construct an object.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import yaml

from qlora_cli.errors import Mistake, Position, RecipeError, printable
from qlora_cli.recipe.yaml_faults import describe_fault, missing_space, top_level_blocks, where_it_is

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
_MAX_FAULTS = 50
_JOINED_BLOCKS = 20


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


def value_at(data: Value, path: Path) -> Value:
    """The value at `path` in nested mappings and lists, or None."""
    for part in path:
        if isinstance(data, list):
            data = data[part] if isinstance(part, int) and part < len(data) else None
        else:
            data = data.get(str(part)) if isinstance(data, dict) else None
    return data


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
    where = _Where(file, lines=False)
    try:
        node = _compose(text, where, source)
    except _FaultError as fault:
        source.mistakes.append(fault.mistake)
        source.whole = False
        return None, source
    return _Builder(where, source).build(node, path, 0), source


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


def _parse(text: str, file: str, *, offset: int | None = None) -> Source:
    source = Source()
    where = _Where(file, offset or 0)
    node = _compose(text, where, source)
    data = _Builder(where, source).build(node, (), 0)
    if not isinstance(data, dict):
        message = f"expected `key: value` lines at the top level, got {_kind(data)}"
        position = where.position(node.start_mark) if node is not None and offset is not None else Position(file)
        raise RecipeError([Mistake(position, "", message)])
    source.data = data
    return source


def _salvage(text: str, file: str) -> Source:
    """What can be read of a document with a fault in it, each top-level key for itself, and every fault found so."""
    result = Source(whole=False)
    blocks, anchors = top_level_blocks(text), bool(_ANCHOR.search(text))
    while blocks and len(result.mistakes) < _MAX_FAULTS:
        part, used = _read_block(blocks, file, anchors=anchors)
        del blocks[:used]
        for key in part.data.keys() & result.data.keys():
            first = result.places[(key,)].key
            part.mistakes.append(_given_twice(part.places[(key,)].key, (key,), first))
        result.data = part.data | result.data
        result.places = part.places | result.places
        result.mistakes += part.mistakes
    return result


def _read_block(blocks: list[tuple[int, str]], file: str, *, anchors: bool) -> tuple[Source, int]:
    """The first of these blocks, and of how many it consists: a bracket or a quote may reach over several."""
    failed = Source(whole=False)
    for used in range(1, min(_JOINED_BLOCKS, len(blocks)) + 1):
        offset = blocks[0][0]
        try:
            return _parse("".join(block for _, block in blocks[:used]), file, offset=offset), used
        except _FaultError as fault:
            # An anchor may stand in another block.
            known = fault.alias and anchors
            failed.mistakes = failed.mistakes or ([] if known else [fault.mistake])
            if known:
                break
        except RecipeError as error:
            failed.mistakes = failed.mistakes or list(error.mistakes)
            break
    return failed, 1


class _FaultError(Exception):
    """Text that is not YAML, and so cannot be read on from there."""

    def __init__(self, mistake: Mistake, *, alias: bool = False) -> None:
        super().__init__(str(mistake))
        self.mistake, self.alias = mistake, alias


class _Where(NamedTuple):
    """Turns marks into positions: of a file, of a part of one that begins after `offset` lines, of an argument."""

    file: str
    offset: int = 0
    lines: bool = True

    def position(self, mark: yaml.Mark | None) -> Position:
        if mark is None or not self.lines:
            return Position(self.file)
        return Position(self.file, mark.line + 1 + self.offset, mark.column + 1)


class _Composer(yaml.SafeLoader):
    """PyYAML's composer, which notes tags where they stand, and refuses one value too many before reading on."""

    def __init__(self, text: str, where: _Where, source: Source) -> None:
        super().__init__(text)
        self._where, self._source, self._nodes = where, source, 0
        self.open_brackets: list[yaml.Mark] = []

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        position = self._where.position(event.start_mark)
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _too_large(position)
        if tag := getattr(event, "tag", None):
            shown = shorten(tag.replace("tag:yaml.org,2002:", "!!"))
            self._source.mistakes.append(Mistake(position, "", f"the tag {shown} is not allowed in a recipe"))
        flow = getattr(event, "flow_style", False)
        if flow:
            self.open_brackets.append(event.start_mark)
        node = super().compose_node(parent, index)
        if flow:
            self.open_brackets.pop()
        if isinstance(event, yaml.AliasEvent) and node is not None:
            node = copy.copy(node)
            node.start_mark = event.start_mark  # where the alias stands, not what it stands for
        return node


def _compose(text: str, where: _Where, source: Source) -> yaml.Node | None:
    composer = None
    try:
        composer = _Composer(text, where, source)
        return composer.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _fault(error, text, where, composer) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        mark = yaml.Mark("", 0, before.count("\n"), error.position - before.rfind("\n") - 1, None, 0)
        told = f"not valid YAML: the character U+{error.character:04X} is not allowed"
        raise _FaultError(Mistake(where.position(mark), "", told)) from None
    except (yaml.YAMLError, ValueError, OverflowError):
        # PyYAML converts the numbers of escapes (`\Uffffffff`) and of `%YAML` lines unchecked.
        found = composer.get_mark() if composer else None
        told = "not valid YAML: the number of this escape or directive is not one of a character or version"
        raise _FaultError(Mistake(where.position(found), "", told)) from None
    except RecursionError:
        raise _refusal(where.file, "nested too deeply") from None
    finally:
        if composer is not None:
            composer.dispose()


def _fault(error: yaml.MarkedYAMLError, text: str, where: _Where, composer: _Composer | None) -> _FaultError:
    mark = where_it_is(error)
    if "<stream end>" in (error.problem or "") and composer and composer.open_brackets:
        mark = composer.open_brackets[-1]
    told = describe_fault(error, mark, offset=where.offset if where.lines else None)
    if (spot := missing_space(error, text)) is not None:
        mark, told = spot
    alias = "undefined alias" in (error.problem or "")
    return _FaultError(Mistake(where.position(mark), "", told), alias=alias)


def _given_twice(at: Position, path: Path, first: Position) -> Mistake:
    before = f" (first on line {first.line})" if first.line else ""
    return Mistake(at, dotted(path), f"`{shorten(str(path[-1]))}` is given twice{before}; leave one out")


def _refusal(file: str, message: str) -> RecipeError:
    return RecipeError([Mistake(Position(file), "", message)])


def _too_large(position: Position) -> RecipeError:
    return RecipeError([Mistake(position, "", f"more than {MAX_NODES:,} values or {MAX_DEPTH} levels")])


def shorten(text: str, limit: int = 100) -> str:
    """`text`, cut to about `limit` characters, with what would steer a terminal written out."""
    shown = printable(text[:limit])
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

    def __init__(self, where: _Where, source: Source) -> None:
        self._where, self._source = where, source
        self._nodes = 0

    def build(self, node: yaml.Node | None, path: Path, depth: int) -> Value:
        if node is None:
            return None
        self._nodes += 1
        position = self._where.position(node.start_mark)
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
            at = self._where.position(key_node.start_mark)
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                self._source.mistakes.append(Mistake(at, dotted(path), "a key must be a word"))
            elif key == "<<" and key_node.style is None:
                told = "merge keys (`<<`) are not read; write the keys out, or use `extends`"
                self._source.mistakes.append(Mistake(at, dotted(path), told))
            elif key in result:
                first = self._source.places[(*path, key)].key
                self._source.mistakes.append(_given_twice(at, (*path, key), first))
                again, present = self.build(value_node, (*path, key), depth + 1), result[key]
                if isinstance(again, dict) and isinstance(present, dict):
                    result[key] = again | present  # so that what is wrong in either is told
            else:
                place = Place(at, self._where.position(value_node.start_mark), _text(value_node))
                self._source.places[(*path, key)] = place
                result[key] = self.build(value_node, (*path, key), depth + 1)
        return result


def dotted(path: Path) -> str:
    """The name of a field as messages and `--set` have it; long keys are cut."""
    return ".".join(shorten(str(part)) for part in path)


def _text(node: yaml.Node) -> str | None:
    return str(node.value) if isinstance(node, yaml.ScalarNode) and node.style is None else None
