"""What a row means: six ways of laying out training data, reduced to three kinds of example.

A `Conversation` goes through the tokenizer's chat template; a `Passage` does so if there is one, and is plain
text if not; a `Text` is learned whole.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qlora_cli.data.cells import field_name, got, read_optional_text, read_text
from qlora_cli.data.messages import Turns, read_exchange, read_messages, read_tools, read_turns
from qlora_cli.data.raw_rows import name_columns
from qlora_cli.errors import DataError
from qlora_cli.recipe.rules import column_problems
from qlora_cli.recipe.schema import FORMAT_COLUMNS, FormatName

Format = Literal["messages", "conversations", "alpaca", "prompt_completion", "classification", "text"]

REQUIRED: dict[Format, tuple[str, ...]] = {name: FORMAT_COLUMNS[name].required for name in get_args(Format)}
OPTIONAL: dict[Format, tuple[str, ...]] = {name: FORMAT_COLUMNS[name].optional for name in get_args(Format)}

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
    """Messages as chat templates take them, at least one of them from the assistant and to be learned.

    `tools` are the functions that may be called, `unlearned` the positions of assistant turns that are only read.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    unlearned: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Passage:
    """A prompt and the completion to learn. `bare_prompt` is the prompt where there is no chat template.

    `system` is the system prompt, which `bare_prompt` has too.
    """

    prompt: str
    completion: str
    bare_prompt: str
    system: str | None = None


@dataclass(frozen=True)
class Text:
    """Text to learn from its first token to its last."""

    text: str


Example = Conversation | Passage | Text


def resolve_format(format: FormatName, columns: Mapping[str, str], column_names: Sequence[str], source: str) -> Format:
    """The format of rows with these columns, checked against `columns` (field: column).

    Raises DataError if `auto` fits no format or several, or if a column is not there.
    """
    _check_fields(format, columns)
    for field, column in columns.items():
        if column not in column_names:
            raise DataError(
                f"{source}: dataset.columns takes {field} from the column {column!r}, which is not there"
                f"{_suggestion(column, column_names)} {_there(column_names, source)}"
            )
    if format != "auto":
        _check_needed(format, columns, column_names, source)
        return format
    fitting = _narrowest([name for name in REQUIRED if _fits(name, columns, column_names)])
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DataError(
            f"{source}: the columns {_named(column_names)} fit more than one format: {_listed(fitting)}. "
            f"Set dataset.format to the one that is meant."
        )
    needs = "\n".join(f"  {name}: {', '.join(fields)}" for name, fields in REQUIRED.items())
    named = f", with dataset.columns for {_listed(columns)}" if columns else ""
    raise DataError(
        f"{source}: the columns {_named(column_names)}{named} fit no format. A format needs\n{needs}\n"
        f"Set dataset.format, and dataset.columns as in {{prompt: your_column}}."
    )


def read_row(row: Mapping[str, Any], format: Format, columns: Mapping[str, str], *, where: str) -> Example:
    """The example in a row. `where` opens every message, as in `train.jsonl, line 3`; raises DataError."""
    match format:
        case "messages" | "conversations":
            return _conversation(row, format, columns, where)
        case "alpaca":
            return _alpaca(row, columns, where)
        case "prompt_completion":
            return _completion(row, columns, where)
        case "classification":
            return _classification(row, columns, where)
        case "text":
            return Text(read_text(row, "text", columns, where))


def _fits(format: Format, columns: Mapping[str, str], column_names: Sequence[str]) -> bool:
    known = (*REQUIRED[format], *OPTIONAL[format])
    return all(field in known for field in columns) and all(
        columns.get(field, field) in column_names for field in REQUIRED[format]
    )


def _narrowest(formats: Sequence[Format]) -> list[Format]:
    """Those that do not ask for part of what another asks for: text and label is more than text."""
    return [name for name in formats if not any(set(REQUIRED[name]) < set(REQUIRED[other]) for other in formats)]


def _check_fields(format: FormatName, columns: Mapping[str, str]) -> None:
    for problem, _ in column_problems(format, columns).values():
        raise DataError(f"dataset.columns: {problem}")


def _check_needed(format: Format, columns: Mapping[str, str], column_names: Sequence[str], source: str) -> None:
    for field in REQUIRED[format]:
        if columns.get(field, field) not in column_names:
            raise DataError(
                f"{source}: the format {format} needs a column {field!r}, which is not there"
                f"{_suggestion(field, column_names)} {_there(column_names, source)} "
                f"Say which one it is with dataset.columns: {{{field}: your_column}}."
            )


def _suggestion(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _named(columns: Sequence[str]) -> str:
    # In a table without a header they are cells of its first row, of any length.
    return name_columns(columns) or "none"


def _there(columns: Sequence[str], source: str) -> str:
    """A sentence on the columns there are."""
    table = source.removesuffix(".gz").removesuffix(".zst").endswith((".csv", ".tsv"))
    header = ", by the first line; if that is a row already, put a line of names before it" if table else ""
    return f"The columns are {_named(columns)}{header}."


def _completion(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Passage | Conversation:
    asked, answered = (row.get(columns.get(field, field)) for field in ("prompt", "completion"))
    if isinstance(asked, list) and isinstance(answered, list):
        turns = read_exchange(asked, answered, where)
        return Conversation(turns.messages, unlearned=turns.unlearned)
    prompt = read_text(row, "prompt", columns, where)
    return Passage(prompt, read_text(row, "completion", columns, where), bare_prompt=prompt)


def _alpaca(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Passage:
    instruction = read_text(row, "instruction", columns, where)
    output = read_text(row, "output", columns, where)
    context = read_optional_text(row, "input", columns, where)
    system = read_optional_text(row, "system", columns, where)
    prompt, bare = instruction, _ALPACA_WITHOUT_INPUT.format(instruction=instruction)
    if context is not None:
        prompt = f"{instruction}\n\n{context}"
        bare = _ALPACA_WITH_INPUT.format(instruction=instruction, input=context)
    return Passage(prompt, output, bare if system is None else f"{system}\n\n{bare}", system)


def _classification(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Passage:
    prompt = read_text(row, "text", columns, where)
    pair = read_optional_text(row, "text_pair", columns, where)
    if pair is not None:
        prompt = f"{prompt}\n{pair}"
    # In plain text, the label must not run into the last word.
    return Passage(prompt, _label(row, columns, where), bare_prompt=f"{prompt}\n")


def _label(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> str:
    column = columns.get("label", "label")
    match row.get(column):
        case bool(value):
            return "true" if value else "false"
        case int(value):
            return str(value)
        case float(value) if value.is_integer():  # whole numbers, in a column that has empty cells too
            return str(int(value))
        case str(value) if value:
            return read_text(row, "label", columns, where)
    name = field_name("label", columns)
    raise DataError(f"{where}: {name}: expected text, a whole number or a boolean, got {got(row, column)}.")


def _conversation(
    row: Mapping[str, Any], format: Literal["messages", "conversations"], columns: Mapping[str, str], where: str
) -> Conversation:
    column = columns.get(format, format)
    name = field_name(format, columns)
    if column not in row:
        noun = "message" if format == "messages" else "turn"
        raise DataError(f"{where}: {name}: expected a list of {noun}s, got nothing.")
    if format == "messages":
        turns = read_messages(row[column], name, where, column=column)
    else:
        system = read_optional_text(row, "system", columns, where)
        turns = _after_system(read_turns(row[column], name, where), system, where)
    tools = read_tools(row.get(columns.get("tools", "tools")), f"{where}: {field_name('tools', columns)}")
    return Conversation(turns.messages, tools, turns.unlearned)


def _after_system(turns: Turns, system: str | None, where: str) -> Turns:
    if system is None:
        return turns
    if any(message["role"] == "system" for message in turns.messages):
        raise DataError(f"{where}: system: there is a system turn in the conversation as well: leave out one of them.")
    opening = {"role": "system", "content": system}
    return Turns((opening, *turns.messages), frozenset(position + 1 for position in turns.unlearned))
