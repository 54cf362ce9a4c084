"""What is wrong with text that is not YAML, in words that say what to do; and which parts of it can still be read."""

from __future__ import annotations

import re

import yaml

# PyYAML's wording, and ours. Tried in order; `{0}` is what the pattern caught.
_FAULTS = (
    (r"found character '\\t' that cannot start any token", "a tab; indent with spaces"),
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
    (r"expected the node content, but found '<stream end>'", "a bracket is never closed"),
    (r"expected the node content, but found '([^<].*)'", "a value is missing before `{0}`"),
    (r"expected alphabetic or numeric character, but found .*", "a name must follow `*` or `&`; put text in quotes"),
    (r"but found another document", "a second document (`---`); a recipe is one"),
)

_INDENT = re.compile(r"\s|$|#|[\]})]|- ")


def where_it_is(error: yaml.MarkedYAMLError) -> yaml.Mark | None:
    """The place to point at: PyYAML notices a missing colon, quote or bracket only further down."""
    missing = "could not find expected ':'", "found unexpected end of stream"
    if error.problem in missing or (error.problem or "").endswith("but got '<stream end>'"):
        return error.context_mark or error.problem_mark
    return error.problem_mark or error.context_mark


def describe_fault(error: yaml.MarkedYAMLError, *, lines: bool) -> str:
    """One fault as a message. `lines` adds on which line a bracket was opened."""
    told = f"not valid YAML: {_in_our_words(error.problem or error.context or 'unreadable')}"
    began, here = error.context_mark, where_it_is(error)
    if lines and "bracket" in told and began and here and began.line < here.line:
        return f"{told} (opened on line {began.line + 1})"
    return told


def _in_our_words(problem: str) -> str:
    for pattern, words in _FAULTS:
        if found := re.fullmatch(pattern, problem):
            return words.format(*found.groups())
    return problem


def top_level_blocks(text: str) -> list[str]:
    """The text of each top-level key with what is indented below it, in front of which stand only line breaks.

    So that each can be read for itself, with the line numbers that it has in the whole.
    """
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines) if not _INDENT.match(line)]
    ends = [*starts[1:], len(lines)] if starts else []
    return ["\n" * start + "\n".join(lines[start:end]) + "\n" for start, end in zip(starts, ends, strict=True)]
