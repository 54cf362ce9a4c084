"""What a row means: five ways of laying out training data, reduced to three kinds of example.

A `Conversation` goes through the tokenizer's chat template; a `Passage` does so if there is one, and is plain
text if not; a `Text` is learned whole.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qlora_cli.data.files import describe
from qlora_cli.errors import DataError
from qlora_cli.recipe.rules import column_problems
from qlora_cli.recipe.schema import FORMAT_COLUMNS, DatasetSection

Format = Literal["messages", "alpaca", "prompt_completion", "text"]

REQUIRED: dict[Format, tuple[str, ...]] = {name: FORMAT_COLUMNS[name].required for name in get_args(Format)}
OPTIONAL: dict[Format, tuple[str, ...]] = {name: FORMAT_COLUMNS[name].optional for name in get_args(Format)}
ROLES = ("system", "user", "assistant", "tool")

# Wording of Stanford Alpaca's prompts, so that models without a chat template see what they would there.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's shape, at least one of them from the assistant; every assistant turn is learned."""

    messages: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Passage:
    """A prompt and the completion to learn. `bare_prompt` is the prompt where there is no chat template."""

    prompt: str
    completion: str
    bare_prompt: str


@dataclass(frozen=True)
class Text:
    """Text to learn from its first token to its last."""

    text: str


Example = Conversation | Passage | Text


def resolve_format(section: DatasetSection, column_names: Sequence[str], source: str) -> Format:
    """The format of rows with these columns, checked against `section.columns`.

    Raises DataError if `auto` fits no format or several, or if a column is not there.
    """
    _check_fields(section)
    for field, column in section.columns.items():
        if column not in column_names:
            raise DataError(
                f"{source}: dataset.columns takes {field} from the column {column!r}, which is not there"
                f"{_suggestion(column, column_names)} The columns are {_listed(column_names)}."
            )
    if section.format != "auto":
        _check_needed(section, section.format, column_names, source)
        return section.format
    fitting = [name for name in REQUIRED if _fits(section, name, column_names)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DataError(
            f"{source}: the columns {_listed(column_names)} fit more than one format: {_listed(fitting)}. "
            f"Set dataset.format to the one that is meant."
        )
    needs = "\n".join(f"  {name}: {', '.join(fields)}" for name, fields in REQUIRED.items())
    named = f", with dataset.columns for {_listed(section.columns)}" if section.columns else ""
    raise DataError(
        f"{source}: the columns {_listed(column_names)}{named} fit no format. A format needs\n{needs}\n"
        f"Set dataset.format, and dataset.columns as in {{prompt: your_column}}."
    )


def columns_used(format: Format, columns: Mapping[str, str], column_names: Sequence[str]) -> list[str]:
    """Those of `column_names` that `read_row` looks at."""
    wanted = {columns.get(field, field) for field in (*REQUIRED[format], *OPTIONAL[format])}
    return [name for name in column_names if name in wanted]


def read_row(row: Mapping[str, Any], format: Format, columns: Mapping[str, str], *, where: str) -> Example:
    """The example in a row. `where` opens every message, as in `train.jsonl, line 3`; raises DataError."""
    match format:
        case "messages":
            return _conversation(row, columns, where)
        case "alpaca":
            return _alpaca(row, columns, where)
        case "prompt_completion":
            prompt = _text(row, "prompt", columns, where)
            return Passage(prompt, _text(row, "completion", columns, where), bare_prompt=prompt)
        case "text":
            return Text(_text(row, "text", columns, where))


def _fits(section: DatasetSection, format: Format, column_names: Sequence[str]) -> bool:
    known = (*REQUIRED[format], *OPTIONAL[format])
    return all(field in known for field in section.columns) and all(
        section.columns.get(field, field) in column_names for field in REQUIRED[format]
    )


def _check_fields(section: DatasetSection) -> None:
    for problem, _ in column_problems(section.format, section.columns).values():
        raise DataError(f"dataset.columns: {problem}")


def _check_needed(section: DatasetSection, format: Format, column_names: Sequence[str], source: str) -> None:
    for field in REQUIRED[format]:
        if section.columns.get(field, field) not in column_names:
            raise DataError(
                f"{source}: the format {format} needs a column {field!r}, which is not there"
                f"{_suggestion(field, column_names)} The columns are {_listed(column_names)}. "
                f"Say which one it is with dataset.columns: {{{field}: your_column}}."
            )


def _suggestion(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _text(row: Mapping[str, Any], field: str, columns: Mapping[str, str], where: str) -> str:
    column = columns.get(field, field)
    name = field if column == field else f"{field} (column {column!r})"
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"{where}: {name}: expected text, got {describe(value)}.")
    _check_unicode(value, f"{where}: {name}")
    return value


def _check_unicode(value: str, where: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise DataError(f"{where}: expected text, got {half}, half of a surrogate pair.") from error


def _alpaca(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Passage:
    instruction = _text(row, "instruction", columns, where)
    output = _text(row, "output", columns, where)
    if row.get(columns.get("input", "input")) in (None, ""):
        return Passage(instruction, output, _ALPACA_WITHOUT_INPUT.format(instruction=instruction))
    context = _text(row, "input", columns, where)
    bare = _ALPACA_WITH_INPUT.format(instruction=instruction, input=context)
    return Passage(f"{instruction}\n\n{context}", output, bare)


def _conversation(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Conversation:
    messages = row.get(columns.get("messages", "messages"))
    if not isinstance(messages, list):
        raise DataError(f"{where}: messages: expected a list of messages, got {describe(messages)}.")
    if not messages:
        raise DataError(f"{where}: messages: expected at least one message, got an empty list.")
    turns = tuple(_message(message, f"{where}: message {n}") for n, message in enumerate(messages, 1))
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(f"{where}: messages: there is no assistant turn, so nothing to learn.")
    return Conversation(turns)


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{where}: expected an object with role and content, got {describe(message)}.")
    # Arrow fills keys that other messages have with null; a template would take those for given.
    turn = {key: value for key, value in message.items() if value is not None}
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: role: expected {', '.join(ROLES[:-1])} or {ROLES[-1]}, got {describe(role)}.")
    if content is None and role == "assistant" and turn.get("tool_calls"):
        return {**turn, "content": ""}
    if not isinstance(content, str):
        raise DataError(f"{where}: content: expected text, got {describe(content)}.")
    _check_unicode(content, f"{where}: content")
    return turn
