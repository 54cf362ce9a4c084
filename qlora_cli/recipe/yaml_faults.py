"""What is wrong with text that is not YAML, in words that say what to do; and which parts of it can still be read."""

from __future__ import annotations

import re

import yaml

# PyYAML's wording, and ours. Tried in order; `{0}` is what the pattern caught.
_FAULTS = (
    (r"found character '\\t' that cannot start any token", "a tab; YAML takes spaces only"),
    (
        r"found character '(.)' that cannot start any token",
        "the character {0} cannot begin a value; put it in quotes",
    ),
    (
        r"mapping values are not allowed here",
        "`: ` inside a value; put it in quotes, or look at the indentation",
    ),
    (r"could not find expected ':'", "expected `key: value`; there is no `: ` after the key"),
    (r"expected <block end>, but found '<block mapping start>'", "indented unlike the lines before it"),
    (r"expected <block end>, but found '<scalar>'", "more text after the end of a value; put quotes around all of it"),
    (r"expected <block end>, but found '-'", "a list item where a `key: value` line is expected"),
    (r"expected <block end>, but found '\?'", "a list and `key: value` lines are mixed"),
    (r"expected <block end>, but found '([^<].*)'", "`{0}` does not belong here"),
    (r"found unexpected end of stream", "this quote is never closed"),
    (r"expected ',' or '([\]}])', but got '<stream end>'", "this bracket is never closed: `{0}` is missing"),
    (r"expected ',' or '([\]}])', but got .*", "expected `,` or `{0}` between brackets"),
    (r"found undefined alias '(.*)'", "`*{0}` stands for nothing: there is no `&{0}` before it"),
    (r"second occurrence", "this `&name` is given twice"),
    (r"found unknown escape character '(.)'", "`\\{0}` means nothing in double quotes; use single quotes"),
    (r"sequence entries are not allowed here", "`- ` inside a value; begin a new line, or put the value in quotes"),
    (r"expected the node content, but found '<stream end>'", "this bracket is never closed"),
    (r"expected the node content, but found '([^<].*)'", "a value is missing before `{0}`"),
    (r"expected alphabetic or numeric character, but found .*", "a name must follow `*` or `&`; put text in quotes"),
    (r"but found another document", "a second document (`---`); a recipe is one"),
)

_NO_SPACE = re.compile(r"(\s*)([\w-]+):\S")
_INDENT = re.compile(r"\s|$|#|[\]})]|- ")


def where_it_is(error: yaml.MarkedYAMLError) -> yaml.Mark | None:
    """The place to point at: PyYAML notices a missing colon or quote only further down."""
    if error.problem in ("could not find expected ':'", "found unexpected end of stream"):
        return error.context_mark or error.problem_mark
    return error.problem_mark or error.context_mark


def describe_fault(error: yaml.MarkedYAMLError, here: yaml.Mark | None, *, offset: int | None) -> str:
    """One fault, told at `here`, as a message; with the line on which a bracket was opened, which needs the `offset`
    of lines before the text."""
    told = f"not valid YAML: {_in_our_words(error.problem or error.context or 'unreadable')}"
    began = error.context_mark
    if offset is not None and "bracket" in told and began and here and began.line < here.line:
        return f"{told} (opened on line {began.line + 1 + offset})"
    return told


def missing_space(error: yaml.MarkedYAMLError, text: str) -> tuple[yaml.Mark, str] | None:
    """Where a `key:value` above the fault lacks its space, and what is said of it; None if that is not the fault."""
    mark = error.problem_mark
    if error.problem != "mapping values are not allowed here" or mark is None or not mark.line:
        return None
    lines = text.split("\n")[: mark.line]
    number = next((n for n in range(len(lines) - 1, -1, -1) if lines[n].strip()), 0)
    found = _NO_SPACE.match(lines[number])
    if found is None:
        return None
    spot = yaml.Mark("", 0, number, len(found[1]), None, 0)
    return spot, f"not valid YAML: a space is missing after `{found[2]}:`"


def _in_our_words(problem: str) -> str:
    for pattern, words in _FAULTS:
        if found := re.fullmatch(pattern, problem):
            return words.format(*found.groups())
    return problem


def top_level_blocks(text: str) -> list[tuple[int, str]]:
    """The text of each top-level key with what is indented below it, and how many lines stand before it.

    So that each can be read for itself. What begins or ends a document, or directs how to read it, is left out.
    """
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines) if not _INDENT.match(line)]
    ends = [*starts[1:], len(lines)] if starts else []
    blocks = [(start, "\n".join(lines[start:end]) + "\n") for start, end in zip(starts, ends, strict=True)]
    return [(start, block) for start, block in blocks if not block.startswith(("%", "---", "..."))]
