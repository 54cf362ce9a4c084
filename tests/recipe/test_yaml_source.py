"""YAML as people write it, read by the 1.2 core rules; and nothing that a file can hold does anything but data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.errors import Position, RecipeError
from qlora_cli.recipe.yaml_source import MAX_BYTES, Source, Value, parse_scalar, parse_value, parse_yaml


def read(text: str) -> Source:
    return parse_yaml(text, "r.yaml")


def refusal(text: str) -> str:
    """Everything that is wrong with a text, a line each, whether it could be read on or not."""
    try:
        mistakes = read(text).mistakes
    except RecipeError as error:
        mistakes = list(error.mistakes)
    assert mistakes
    return "\n".join(map(str, mistakes))


def value_of(text: str) -> Value:
    """A value as `--set` reads it."""
    value, source = parse_value(text, "--set x", ("x",))
    assert not source.mistakes
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        ("1.0e-3", 1e-3),
        ("+1.5e+3", 1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-.5", -0.5),
        ("0", 0),
        ("-3", -3),
        ("+4", 4),
        ("017", 17),
        ("1_000", 1000),
        ("1_000_000", 1_000_000),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("1e999", math.inf),
        ("true", True),
        ("False", False),
        ("TRUE", True),
    ],
)
def test_numbers_and_booleans_as_people_write_them(text: str, value: Value) -> None:
    """YAML 1.1 reads `1e-4` as a string and `017` as 15; here a number is what it looks like, of the right type."""
    got = read(f"a: {text}").data["a"]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_not_a_number(text: str) -> None:
    assert math.isnan(read(f"a: {text}").data["a"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        *("yes", "no", "on", "off", "Yes", "NO", "y", "n", "tRUE"),
        *("1__0", "_1", "1_", "1_0.5", "1_000.5", "1e5_0", "1e", "e5", ".", "+", "--1", "1.2.3", "0x1F", "0o17"),
        *("2024-01-01", "2001-12-14t21:59:43.10-05:00", "12:30:45", "190:20:30", "inf", "nan", "+.nan", "none", "nULL"),
        *("=", "<<", "٣", "org/name", "C:\\data", "a b", "a#b", "x: y".replace(": ", ":")),
    ],
)
def test_everything_else_unquoted_stays_text(text: str) -> None:
    """`no` is Norway, a date is a date's text, a time is not a number to base 60."""
    assert read(f"a: {text}").data["a"] == text


@pytest.mark.parametrize("text", ["1e-4", "5", "true", "null", "~", "", ".inf", "no", "<<", "2024-01-01"])
def test_what_is_quoted_stays_text(text: str) -> None:
    assert read(f"a: '{text}'\nb: \"{text}\"").data == {"a": text, "b": text}


def test_block_text() -> None:
    """Literal and folded blocks are text even where a bare value would be a number."""
    assert read("a: |\n  5\nb: >-\n  x\n  y\nc: |-\n  null\n").data == {"a": "5\n", "b": "x y", "c": "null"}


@pytest.mark.parametrize("text", ["", " ", "~", "null", "Null", "NULL", "# nothing"])
def test_forms_of_null(text: str) -> None:
    assert read(f"a: {text}\nb: 1").data == {"a": None, "b": 1}


def test_a_number_too_long_to_be_one() -> None:
    """Python refuses to read integers of thousands of digits; here they are no crash, and no integer either."""
    assert parse_scalar("9" * 100) == 10**100 - 1
    assert parse_scalar("9" * 5000) == math.inf
    assert parse_scalar("1_" * 5000 + "1") == "1_" * 5000 + "1"


def test_lists_sections_and_their_positions() -> None:
    """Every key and every value knows its line and column, from 1; an unquoted value, how it was written."""
    source = read("# top\na: 1\nb:\n  c: [x, 2]\n  d:\n    - {e: f}\n")
    assert source.data == {"a": 1, "b": {"c": ["x", 2], "d": [{"e": "f"}]}}
    assert {path: (*place.key[1:], *place.value[1:], place.text) for path, place in source.places.items()} == {
        (): (2, 1, 2, 1, None),
        ("a",): (2, 1, 2, 4, "1"),
        ("b",): (3, 1, 4, 3, None),
        ("b", "c"): (4, 3, 4, 6, None),
        ("b", "c", 0): (4, 7, 4, 7, "x"),
        ("b", "c", 1): (4, 10, 4, 10, "2"),
        ("b", "d"): (5, 3, 6, 5, None),
        ("b", "d", 0): (6, 7, 6, 7, None),
        ("b", "d", 0, "e"): (6, 8, 6, 11, "f"),
    }


def test_a_position_reads_as_editors_take_it() -> None:
    """file:line:column in a file; of a command-line argument, the argument alone."""
    assert str(Position("r.yaml", 3, 7)) == "r.yaml:3:7"
    assert str(Position("--set a=1")) == "--set a=1"


def test_keys_are_words() -> None:
    """A key is the text it is, whatever it looks like."""
    assert read("1: a\nyes: b\nnull: c\n1e-4: d\n").data == {"1": "a", "yes": "b", "null": "c", "1e-4": "d"}


def test_utf8_and_its_mark() -> None:
    """Text beyond ASCII in keys and values; a byte order mark at the start is no part of the first key."""
    assert read("\ufeffname: Zoë 日本 🙂").data == {"name": "Zoë 日本 🙂"}
    assert read("ключ: значение").data == {"ключ": "значение"}


def test_anchors_and_aliases_are_copies() -> None:
    """What an alias stands for is there twice, with a place of its own."""
    source = read("a: &x {k: [1]}\nb: *x\n")
    assert source.data == {"a": {"k": [1]}, "b": {"k": [1]}}
    assert source.data["a"] is not source.data["b"]
    assert str(source.places["b",].key) == "r.yaml:2:1"


def test_values_of_overrides() -> None:
    """The right side of --set: the same rules, and nothing at all is null."""
    assert value_of("[q_proj, v_proj]") == ["q_proj", "v_proj"]
    assert value_of("{a: 1e-4}") == {"a": 1e-4}
    assert value_of("2e-4") == 2e-4
    assert value_of("") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1", "--set x: not valid YAML: this bracket is never closed: `]` is missing"),
        ("a: b: c", "--set x: not valid YAML: `: ` inside a value; put it in quotes, or look at the indentation"),
        ("!!str 5", "--set x: the tag !!str is not allowed in a recipe"),
        ("{a: 1, a: 2}", "--set x: x.a: `a` is given twice; leave one out"),
    ],
)
def test_a_wrong_override_names_the_argument_alone(text: str, message: str) -> None:
    """There is no line to look at."""
    _, source = parse_value(text, "--set x", ("x",))
    assert [str(mistake) for mistake in source.mistakes] == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Keys
        ("a: 1\nb: 2\na: 3", "3:1: a: `a` is given twice (first on line 1); leave one out"),
        ("s:\n  a: 1\n  'a': 3", "3:3: s.a: `a` is given twice (first on line 2); leave one out"),
        ("1: x\n'1': y", "2:1: 1: `1` is given twice (first on line 1); leave one out"),
        ("? [a]\n: 1", "1:3: a key must be a word"),
        ("x: 1\n? {a: b}\n: 1", "2:3: a key must be a word"),
        ("a: &x {b: 1}\nc:\n  <<: *x", "3:3: c: merge keys (`<<`) are not read; write the keys out, or use `extends`"),
        # Tabs and indentation
        ("a:\n\tb: 1", "2:1: not valid YAML: a tab; YAML takes spaces only"),
        ("a:\n  b: 1\n\tc: 2", "3:1: not valid YAML: a tab; YAML takes spaces only"),
        ("a:\n  b: 1\n c: 2", "3:2: not valid YAML: indented unlike the lines before it"),
        ("a: 1\n  b: 2", "2:4: not valid YAML: `: ` inside a value; put it in quotes, or look at the indentation"),
        ("a: b: c", "1:5: not valid YAML: `: ` inside a value; put it in quotes, or look at the indentation"),
        ("a:\n  - b\n  c: 1", "3:3: not valid YAML: a list and `key: value` lines are mixed"),
        ("a: - b", "1:4: not valid YAML: `- ` inside a value; begin a new line, or put the value in quotes"),
        ("s:\n  a: 1\n  b 2\n  c: 3", "3:3: not valid YAML: expected `key: value`; there is no `: ` after the key"),
        # Quotes and brackets
        ("a: [1", "1:4: not valid YAML: this bracket is never closed: `]` is missing"),
        ("a: [1\nb: 2", "1:4: not valid YAML: this bracket is never closed: `]` is missing"),
        ("a: [\n  1\n  b: 2\n  ]", "3:4: not valid YAML: expected `,` or `]` between brackets (opened on line 1)"),
        ("a: {b: 1 c: 2}", "1:11: not valid YAML: expected `,` or `}` between brackets"),
        ("a: [1]]", "1:7: not valid YAML: `]` does not belong here"),
        ("a: ]", "1:4: not valid YAML: a value is missing before `]`"),
        ("a: 'x\nb: 1", "1:4: not valid YAML: this quote is never closed"),
        ("a: 'it's'", "1:8: not valid YAML: more text after the end of a value; put quotes around all of it"),
        ('a: "\\d"', "1:6: not valid YAML: `\\d` means nothing in double quotes; use single quotes"),
        # Characters with a meaning
        ("a: *nope", "1:4: not valid YAML: `*nope` stands for nothing: there is no `&nope` before it"),
        ("a: &x 1\nb: &x 2", "2:4: not valid YAML: this `&name` is given twice"),
        ("a: *", "1:5: not valid YAML: a name must follow `*` or `&`; put text in quotes"),
        ("a: @x", "1:4: not valid YAML: the character @ cannot begin a value; put it in quotes"),
        ("a: %x", "1:4: not valid YAML: the character % cannot begin a value; put it in quotes"),
        ("a: `x`", "1:4: not valid YAML: the character ` cannot begin a value; put it in quotes"),
        # Whole documents
        ("a: 1\n---\nb: 2", "2:1: not valid YAML: a second document (`---`); a recipe is one"),
        ("%YAML 3\n---\na: 1", "1:8: not valid YAML: expected a digit or '.', but found '\\n'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(text: str, message: str) -> None:
    assert refusal(text) == f"r.yaml:{message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "r.yaml: expected `key: value` lines at the top level, got a list"),
        ("word", "r.yaml: expected `key: value` lines at the top level, got `word`"),
        ("", "r.yaml: expected `key: value` lines at the top level, got nothing"),
        ("# a comment alone\n", "r.yaml: expected `key: value` lines at the top level, got nothing"),
        ("null", "r.yaml: expected `key: value` lines at the top level, got nothing"),
        (
            'a: "\\Uffffffff"',
            "r.yaml:1:7: not valid YAML: the number of this escape or directive is not one of a character or version",
        ),
    ],
)
def test_what_is_no_recipe_at_all(text: str, message: str) -> None:
    assert refusal(text) == message


def test_faults_do_not_hide_each_other() -> None:
    """Where one top-level key cannot be read, the others still are: every fault is told, with its own line, and what
    is whole is there to be checked."""
    text = "a:\n\tb: 1\nc: {d: 1}\nstray\ne: [1\nf: x\nf: 'y\n"
    assert refusal(text).splitlines() == [
        "r.yaml:2:1: not valid YAML: a tab; YAML takes spaces only",
        "r.yaml:4:1: expected `key: value` lines at the top level, got `stray`",
        "r.yaml:5:4: not valid YAML: this bracket is never closed: `]` is missing",
        "r.yaml:7:4: not valid YAML: this quote is never closed",
    ]
    source = read(text)
    assert not source.whole
    assert source.data == {"c": {"d": 1}, "f": "x"}
    assert str(source.places["c", "d"].key) == "r.yaml:3:5"


def test_faults_in_a_file_with_windows_line_ends() -> None:
    assert refusal("a: [1\r\n\r\nb: 'x\r\n\r\nc: 1\r\n").splitlines() == [
        "r.yaml:1:4: not valid YAML: this bracket is never closed: `]` is missing",
        "r.yaml:3:4: not valid YAML: this quote is never closed",
    ]
    assert read("a: 1\r\nb:\r\n  c: 2\r\n").data == {"a": 1, "b": {"c": 2}}


def test_an_anchor_in_a_block_that_cannot_be_read() -> None:
    """Its aliases in other blocks are no mistakes of theirs."""
    assert refusal("a: &x [1\nb: *x\n").splitlines() == [
        "r.yaml:1:4: not valid YAML: this bracket is never closed: `]` is missing"
    ]


@pytest.mark.parametrize(
    ("text", "place", "tag"),
    [
        ("a: !!python/object/apply:os.system ['true']", "1:4", "!!python/object/apply:os.system"),
        ("a: !!python/name:os.system", "1:4", "!!python/name:os.system"),
        ("a: 1\nb: [!foo x]", "2:5", "!foo"),
        ("!!python/tuple a: 1", "1:1", "!!python/tuple"),
        ("!!set {a, b}", "1:1", "!!set"),
        ("a: !!binary aGk=", "1:4", "!!binary"),
        ("a: !!str 5", "1:4", "!!str"),
        ("a: !!int '5'", "1:4", "!!int"),
        ("%TAG ! tag:example.com,2000:\n---\na: !y 1", "3:4", "tag:example.com,2000:y"),
        ("a: ! x", "1:4", "!"),
    ],
)
def test_every_tag_is_refused(text: str, place: str, tag: str) -> None:
    """On values and on keys, known to YAML or not: one that were passed over would mean something else."""
    assert refusal(text) == f"r.yaml:{place}: the tag {tag} is not allowed in a recipe"


LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "r.yaml:1:10: more than 10,000 values or 40 levels"),
        ("a: &x [*x]", "r.yaml:1:8: more than 10,000 values or 40 levels"),
        ("&x a: &y {b: *y}", "r.yaml:1:14: more than 10,000 values or 40 levels"),
        ("a: " + "[" * 60 + "]" * 60, "r.yaml:1:44: more than 10,000 values or 40 levels"),
        ("[" * 100_000, "r.yaml: nested too deeply"),
        ("- " * 100_000, "r.yaml: nested too deeply"),
        ("{a: " * 100_000, "r.yaml: nested too deeply"),
        ("a: [" + "1," * 400_000 + "]", "r.yaml:1:19999: more than 10,000 values or 40 levels"),
        ("a:\n" * 300_000, "r.yaml:5000:3: more than 10,000 values or 40 levels"),
        ("x" * (MAX_BYTES + 1), "r.yaml: larger than 1,000,000 bytes, which no recipe is"),
        ("é" * (MAX_BYTES // 2 + 1), "r.yaml: larger than 1,000,000 bytes, which no recipe is"),
        ("a: 1\nb: \ud800", "r.yaml:2:4: not valid YAML: the character U+D800 is not allowed"),
        ("a: \x07", "r.yaml:1:4: not valid YAML: the character U+0007 is not allowed"),
    ],
    ids=lambda text: text[:24],
)  # fmt: skip
def test_what_would_grow_without_bound_is_refused_at_once(text: str, message: str) -> None:
    """Billion laughs, an alias to itself, endless nesting, a file that is no recipe: a message, not minutes or a
    crash. (The timeout is a net for what would take hours, not a measurement.)"""
    assert refusal(text) == message


def test_long_keys_tags_and_values_are_cut_in_messages() -> None:
    """Nobody reads a megabyte of error."""
    long = "k" * 200_000
    assert refusal(f"{long[:200]}: 1\n{long[:200]}: 2") == (
        f"r.yaml:2:1: {'k' * 100}…: `{'k' * 100}…` is given twice (first on line 1); leave one out"
    )
    assert refusal(long) == f"r.yaml: expected `key: value` lines at the top level, got `{'k' * 100}…`"
    assert refusal(f"a: !{long} x") == f"r.yaml:1:4: the tag !{'k' * 99}… is not allowed in a recipe"


YAML_LIKE = st.text(st.sampled_from("ab1.-+_: \n\t\r'\"[]{}#&*!|>%@`?,~<=\\xuU0eE\ufeff\x00\x85\u2028é🙂"), max_size=60)
FRAGMENTS = st.lists(
    st.sampled_from(
        [
            *("a: ", "b: ", "\n", "  ", "- ", "? ", "&x ", "*x", "!!str ", "!t ", "|\n", ">-\n", "---\n", "...\n"),
            *("%YAML 1.2\n", "%TAG ! x\n", "[", "]", "{", "}", ",", "'", '"', "\\", "\\x4", "\\U0011ffff", "#", "<<: "),
            *("1e-4", "null", "text", "\t", "%41", "!<", ">", "0x", "\r"),
        ]
    ),
    max_size=25,
).map("".join)


@settings(max_examples=400, deadline=None)
@given(st.text() | YAML_LIKE | FRAGMENTS | st.text(st.characters(), max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Whatever the text, data come back or a RecipeError that names the file; never another exception."""
    try:
        source = read(text)
    except RecipeError as error:
        told = [str(error)]
    else:
        told = [*map(str, source.mistakes), *(str(place.key) for place in source.places.values())]
        assert source.whole or source.mistakes
    assert told
    assert all(line.startswith("r.yaml") for line in told)


# Left out: what PyYAML writes bare because YAML 1.1 reads it as text, but 1.2 as a number, such as `1e5` and `08`.
TEXT = st.text(max_size=30).filter(lambda text: parse_scalar(text) == text) | st.sampled_from(
    [
        "yes",
        "no",
        "1_000.5",
        "0x1F",
        "2024-01-01",
        "a: b",
        "#c",
        " x ",
        "é",
        "🙂",
        "\u2028",
        "\ufeff",
        "- x",
        "&a",
        "!t",
    ]
)
LEAVES = (
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
)
NESTED = st.dictionaries(
    TEXT,
    st.recursive(
        LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=20
    ),
    max_size=6,
)


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The path of everything below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in [(*path, key), *leaves(inner, (*path, key))]]


@settings(max_examples=200, deadline=None)
@given(NESTED, st.booleans())
def test_what_pyyaml_writes_is_read_back(data: dict[str, Any], flow: bool) -> None:
    """Any nested data in block or flow style come back equal, type for type, and every value has a position at which
    its key, bare or quoted, stands."""
    text = yaml.safe_dump(data, default_flow_style=flow, sort_keys=False)
    source = read(text)
    assert source.data == data
    assert repr(source.data) == repr(data)
    paths = leaves(data)
    assert set(source.places) == {(), *paths}
    assert not source.mistakes
    lines = text.split("\n")
    for path in paths:
        at = source.places[path].key
        rest = lines[at.line - 1][at.column - 1 :]
        key = path[-1]
        assert isinstance(key, int) or rest.startswith((key, "'", '"'))
        assert rest
