"""The first rows of local data: what their columns mean, and how long they may become. Light: without Arrow for text.

What is found here is a guess for a first recipe; `sources`, `formats` and `encode` have the last word.
"""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from qlora_cli.data.files import BadRow, Row, read_file
from qlora_cli.data.formats import (
    OPTIONAL,
    REQUIRED,
    Conversation,
    Example,
    Format,
    Passage,
    Text,
    read_row,
    resolve_format,
)
from qlora_cli.errors import DataError
from qlora_cli.recipe.data_files import data_kind, find_data_files, shown_path

_ROWS = 10_000
_CHARACTERS = 50_000_000  # of rows kept in memory

# Well-known pairs of columns, the first of a pair as the prompt and the second as what is learned.
_PAIRS: dict[str, tuple[str, ...]] = {
    "question": ("answer", "response"),
    "instruction": ("response", "answer", "completion"),
    "query": ("response", "answer"),
    "problem": ("solution", "answer"),
    "prompt": ("response", "answer", "output"),
    "input": ("output", "target", "response", "answer"),
    "inputs": ("targets", "outputs"),
    "user": ("assistant",),
    "source": ("target",),
    "src": ("tgt",),
    "article": ("summary", "highlights"),
    "document": ("summary",),
    "dialogue": ("summary",),
    "mr": ("ref",),
    "meaning_representation": ("human_reference",),
    "context": ("response",),
}
# Prompts that may come with a text of their own, which alpaca has a place for, and the names of that text.
_INSTRUCTIONS = ("question", "instruction", "query", "prompt", "problem")
_CONTEXTS = ("context", "input")
_CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_TURN_KEYS: dict[str, tuple[str, str]] = {"messages": ("role", "content"), "conversations": ("from", "value")}
# Texts and what they are told to be: few names, since a text beside some category may as well be learned itself.
_JUDGED = ("text", "sentence", "review", "tweet", "utterance")
_LABELS = ("label", "labels", "sentiment", "intent")
_PASSAGES = ("content", "document", "passage", "body", "article", "story")

# Byte-level tokenizers make at most a token of every byte. Of letters and spaces they make far fewer, about one of
# four and a half in English; one of two is assumed. Digits, punctuation and other scripts can each be tokens, and so
# can letters where there are no words, as in base64.
_LETTERS = (string.ascii_letters + " ").encode()
_NO_WORDS = re.compile(rb"\S{30,}")
# Tokens that a chat template puts around a row, a system prompt of its own included, and around each message.
_TEMPLATE = 64
_TURN = 16


@dataclass(frozen=True, eq=False)
class Sample:
    """The first rows of a source, each with its place for messages; `complete` if there are no others."""

    source: str
    rows: list[tuple[str, Row]]
    columns: tuple[str, ...]
    complete: bool


@dataclass(frozen=True)
class Layout:
    """What columns mean: the format, and the columns that do not have the names of its fields.

    `named` is off where `format: auto` finds this format by itself.
    """

    format: Format
    columns: Mapping[str, str] = field(default_factory=dict)
    named: bool = False


def take_sample(name: str) -> Sample:
    """The first rows of a file, a folder or a glob.

    Raises:
        DataError: with file and line, for what cannot be read; and if there are no rows.
    """
    paths = find_data_files(name)
    source = shown_path(Path(name))
    for path in paths:
        if path.stat().st_size == 0:
            raise DataError(f"{shown_path(path)}: the file is empty.")
    taken: list[tuple[str, Row]] = []
    characters = 0
    with closing(_rows(paths)) as rows:
        for where, row in itertools.islice(rows, _ROWS):
            taken.append((where, row))
            characters += sum(len(value) for value in row.values() if isinstance(value, str))
            if characters > _CHARACTERS:
                break
        complete = next(rows, None) is None
    if not taken:
        raise DataError(f"{source}: there are no rows.")
    columns = dict.fromkeys(itertools.chain.from_iterable(row for _, row in taken))
    return Sample(source, taken, tuple(columns), complete)


def layouts(sample: Sample, format: Format | Literal["auto"] = "auto") -> list[Layout]:
    """What the columns may mean, the likeliest first: none if they do not tell, one if they do.

    Columns named as a format's fields are that format, but for turns of ShareGPT's in a column called messages.
    """
    wanted = _wanted(format)
    exact = [name for name in wanted if all(column in sample.columns for column in REQUIRED[name])]
    if exact and not (exact[0] == "messages" and _holds_turns(sample, "messages", *_TURN_KEYS["conversations"])):
        return [_layout(sample, exact[0], {})]
    known = {column.strip().lower(): column for column in reversed(sample.columns)}
    for name in wanted:
        if found := [_layout(sample, name, columns) for columns in _likely_columns(sample, name, known)]:
            return found
    return []


def chosen_layout(sample: Sample, columns: Mapping[str, str], format: Format | Literal["auto"] = "auto") -> Layout:
    """The layout in which `columns` (field: column) are meant. Raises DataError if they do not fit the rows."""
    found = resolve_format(format, columns, sample.columns, sample.source)
    return Layout(found, dict(columns), named=format != "auto")


def format_of(columns: Mapping[str, str], format: Format | Literal["auto"] = "auto") -> Format:
    """The format whose fields `columns` names, for rows that cannot be looked at. Raises DataError if there is none."""
    wanted = _wanted(format)
    fitting = [name for name in wanted if set(columns) <= {*REQUIRED[name], *OPTIONAL[name]}]
    if fitting:  # one that needs nothing else first: text alone is no half of a text and its label
        return next((name for name in fitting if set(REQUIRED[name]) <= set(columns)), fitting[0])
    fields = "; ".join(f"{name}: {', '.join((*REQUIRED[name], *OPTIONAL[name]))}" for name in wanted)
    raise DataError(f"expected fields of one format ({fields}), got {', '.join(columns)}.")


def token_bound(sample: Sample, layout: Layout) -> int:
    """Tokens that the longest row should stay below with any tokenizer. Raises DataError for a malformed row."""
    return max(_bound(read_row(row, layout.format, layout.columns, where=where)) for where, row in sample.rows)


def enough_tokens(bound: int) -> int:
    """A `max_length` for rows of at most `bound` tokens: a power of two, as people write it."""
    return 1 << (bound - 1).bit_length()


def _wanted(format: Format | Literal["auto"]) -> tuple[Format, ...]:
    return (format,) if format != "auto" else get_args(Format)


def _rows(paths: list[Path]) -> Generator[tuple[str, Row], None, None]:
    for path in paths:
        shown = shown_path(path)
        unit = "line" if data_kind(path) == ".jsonl" else "row"
        for number, row in read_file(path, shown):
            if isinstance(row, BadRow):
                raise DataError(row.problem)
            yield f"{shown}, {unit} {number}", row


def _layout(sample: Sample, format: Format, columns: Mapping[str, str]) -> Layout:
    renamed = {name: column for name, column in columns.items() if name != column}
    try:
        found = chosen_layout(sample, renamed)
    except DataError:
        return Layout(format, renamed, named=True)  # auto would find several
    return Layout(format, renamed, named=found.format != format)


def _likely_columns(sample: Sample, format: Format, known: dict[str, str]) -> list[dict[str, str]]:
    """`dataset.columns`, in full, for the columns that are `known` by their lower-case names."""
    if format in _TURN_KEYS:
        names = [known[name] for name in _CONVERSATIONS if name in known]
        return [{format: name} for name in names if _holds_turns(sample, name, *_TURN_KEYS[format])]
    texts = {name: column for name, column in known.items() if _holds_text(sample, column)}
    pairs = [(p, c) for p, answers in _PAIRS.items() for c in answers if p in texts and c in texts]
    instructed = [(p, c, x) for p, c in pairs for x in _CONTEXTS if p in _INSTRUCTIONS and x in texts]
    if format == "alpaca":
        return [{"instruction": texts[p], "input": texts[x], "output": texts[c]} for p, c, x in instructed]
    if format == "prompt_completion":
        return [{"prompt": texts[p], "completion": texts[c]} for p, c in pairs]
    if format == "classification":
        labels = [known[name] for name in _LABELS if name in known and _holds_labels(sample, known[name])]
        return [{"text": texts[name], "label": label} for name in _JUDGED if name in texts for label in labels]
    passages = [texts[name] for name in _PASSAGES if name in texts]
    if not passages and len(known) == 1:  # a word, and not the first row of a file that has no header
        passages = [column for name, column in texts.items() if re.fullmatch(r"\w{1,30}", name)]
    return [{"text": passages[0]}] if len(passages) == 1 else []


def _holds_text(sample: Sample, column: str) -> bool:
    return all(isinstance(row.get(column), str | None) for _, row in sample.rows[:100])


def _holds_labels(sample: Sample, column: str) -> bool:
    return all(isinstance(row.get(column), str | int | None) for _, row in sample.rows[:100])


def _holds_turns(sample: Sample, column: str, *keys: str) -> bool:
    values = [row[column] for _, row in sample.rows[:100] if row.get(column)]
    turns = [turn for value in values if isinstance(value, list) for turn in value]
    return bool(turns) and all(isinstance(turn, dict) and turn.keys() >= set(keys) for turn in turns)


def _bound(example: Example) -> int:
    match example:
        case Conversation(messages, tools):
            told = 0 if tools is None else _text_bound(json.dumps(tools, ensure_ascii=False, indent=4))
            return _TEMPLATE + told + sum(_TURN + _turn_bound(message) for message in messages)
        case Passage(completion=completion, bare_prompt=prompt):
            return _TEMPLATE + 2 * _TURN + _text_bound(prompt) + _text_bound(completion)
        case Text(text):
            return _TEMPLATE + _text_bound(text)


def _turn_bound(message: Mapping[str, Any]) -> int:
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return _text_bound(message["content"]) + (_text_bound(json.dumps(more, ensure_ascii=False)) if more else 0)


def _text_bound(text: str) -> int:
    data = text.encode("utf-8", errors="surrogatepass")
    words = _NO_WORDS.sub(b"", data)
    others = len(words.translate(None, _LETTERS))
    return len(data) - len(words) + others + (len(words) - others + 1) // 2
