"""What a look at the first rows tells: which columns mean what, how long rows may become, what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.data import sample as module
from qlora_cli.data.formats import REQUIRED, resolve_format
from qlora_cli.data.sample import (
    Layout,
    Sample,
    chosen_layout,
    enough_tokens,
    format_of,
    layouts,
    take_sample,
    token_bound,
)
from qlora_cli.errors import DataError
from qlora_cli.recipe.schema import DatasetSection
from tests.data.test_sources import write
from tests.support.encoded import encode_training_rows
from tests.support.tokenizers import tiny_tokenizer

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def of(*rows: dict[str, Any]) -> Sample:
    columns = dict.fromkeys(name for row in rows for name in row)
    return Sample("rows", [(f"rows, row {n}", row) for n, row in enumerate(rows, 1)], tuple(columns), complete=True)


def with_columns(names: str) -> Sample:
    return of(dict.fromkeys(names.split(), "text"))


# ------------------------------------------------------------------------------------------- Rows


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_the_first_rows_of_every_kind_of_file(suffix: str) -> None:
    rows = [{"prompt": "a, b", "completion": "1"}, {"prompt": "é\nü", "completion": "007"}]
    found = take_sample(str(write(Path(f"rows{suffix}"), rows)))
    assert [row for _, row in found.rows] == rows
    assert (found.source, found.columns, found.complete) == (f"rows{suffix}", ("prompt", "completion"), True)
    assert found.rows[1][0] == f"rows{suffix}, {'line' if suffix == '.jsonl' else 'row'} 2"


def test_several_files() -> None:
    """Of a folder or a glob; a row is told by its file."""
    Path("d").mkdir()
    for name in "ab":
        write(Path(f"d/{name}.jsonl"), [{"text": name}, {"text": name, "more": 1}])
    for name in ("d", "d/*.jsonl"):
        found = take_sample(name)
        assert [where for where, _ in found.rows] == [
            f"d/{name}.jsonl, line {line}" for name in "ab" for line in (1, 2)
        ]
        assert (found.source, found.columns) == (name, ("text", "more"))


def test_no_more_than_the_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """By number and by size; a mistake in a later row is for `check` to find."""
    Path("rows.jsonl").write_text('{"text": "aaaa"}\n' * 3 + "no JSON\n" * 2)
    monkeypatch.setattr(module, "_ROWS", 2)
    found = take_sample("rows.jsonl")
    assert (len(found.rows), found.complete) == (2, False)
    monkeypatch.setattr(module, "_CHARACTERS", 3)
    assert len(take_sample("rows.jsonl").rows) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "", "rows.jsonl: the file is empty."),
        ("rows.jsonl", "\n", "rows.jsonl: there are no rows."),
        ("rows.csv", "a,b\n", "rows.csv: there are no rows."),
        (
            "rows.jsonl",
            '{"text": 1}\n[2]\n',
            "rows.jsonl, line 2: expected one JSON object, got a list of 1.",
        ),
        ("rows.csv", "a,b\n1\n", "rows.csv, line 2: expected 2 cells (a, b), got 1."),
        ("rows.txt", "a", "rows.txt: expected a .jsonl, .json, .csv, .tsv or .parquet file, got rows.txt."),
        ("other.csv", "a", "rows.csv: there is no such file or folder"),
        ("rows.parquet", "no", "rows.parquet: not readable as Parquet ("),
    ],
)
def test_rows_that_cannot_be_read(name: str, content: str, message: str) -> None:
    Path(name).write_text(content)
    with pytest.raises(DataError) as caught:
        take_sample(name.replace("other", "rows"))
    assert str(caught.value).startswith(message)


# ------------------------------------------------------------------------------------------- Layouts


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ("prompt completion", "prompt_completion"),
        ("id text", "text"),
        ("instruction input output", "alpaca"),
        ("instruction output", "alpaca"),
        ("messages source", "messages"),
        ("conversations id", "conversations"),
        ("text label", "classification"),
        ("text text_pair label", "classification"),
    ],
)
def test_columns_with_the_formats_own_names(columns: str, format: str) -> None:
    """Nothing need be said of them."""
    assert layouts(with_columns(columns)) == [Layout(format)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "format", "mapping"),
    [
        ("question answer", "prompt_completion", "prompt=question completion=answer"),
        ("id Question Answer", "prompt_completion", "prompt=Question completion=Answer"),
        ("input output", "prompt_completion", "prompt=input completion=output"),
        ("instruction response", "prompt_completion", "prompt=instruction completion=response"),
        ("query response", "prompt_completion", "prompt=query completion=response"),
        ("prompt response", "prompt_completion", "completion=response"),
        ("problem solution", "prompt_completion", "prompt=problem completion=solution"),
        ("article summary id", "prompt_completion", "prompt=article completion=summary"),
        ("mr ref", "prompt_completion", "prompt=mr completion=ref"),
        ("source target", "prompt_completion", "prompt=source completion=target"),
        ("dialogue summary", "prompt_completion", "prompt=dialogue completion=summary"),
        ("instruction context response category", "alpaca", "input=context output=response"),
        ("question context answer", "alpaca", "instruction=question input=context output=answer"),
        ("instruction input response", "alpaca", "output=response"),
        ("content url", "text", "text=content"),
        ("title document", "text", "text=document"),
        ("sentence", "text", "text=sentence"),
        ("sentence label idx", "classification", "text=sentence"),
        ("review sentiment", "classification", "text=review label=sentiment"),
    ],
)
def test_columns_with_well_known_names(columns: str, format: str, mapping: str) -> None:
    """Mapped; and `auto` takes the mapping for the same format."""
    expected = dict(pair.split("=") for pair in mapping.split())
    found = with_columns(columns)
    assert layouts(found) == [Layout(format, expected)]  # type: ignore[arg-type]
    assert resolve_format("auto", expected, found.columns, "x") == format


def test_columns_that_fit_several_formats() -> None:
    """The richer one is taken, and has to be named."""
    assert layouts(with_columns("instruction input output text")) == [Layout("alpaca", named=True)]
    assert layouts(with_columns("messages prompt completion")) == [Layout("messages", named=True)]


def test_several_well_known_pairs() -> None:
    """All of them, the likeliest first."""
    found = layouts(with_columns("question answer solution problem"))
    assert [layout.columns["completion"] for layout in found] == ["answer", "solution", "answer"]


@pytest.mark.parametrize("columns", ["title category", "a b", "question choices", "content document"])
def test_columns_that_do_not_tell(columns: str) -> None:
    assert layouts(with_columns(columns)) == []


def test_only_text_is_an_answer() -> None:
    """SQuAD's answers are objects, others' are numbers; nulls say nothing."""
    assert layouts(of({"question": "a", "answer": {"text": ["b"]}})) == []
    assert layouts(of({"question": "a", "answer": 1})) == []
    assert layouts(of({"question": None, "answer": "b"}, {"question": "a", "answer": "b"})) != []


def test_conversations() -> None:
    """By whatever well-known name, if the turns have role and content, or from and value, as ShareGPT's."""
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert layouts(of({"id": "1", "conversations": TURNS})) == [Layout("conversations")]
    assert layouts(of({"id": "1", "conversations": shared})) == [Layout("conversations")]
    assert layouts(of({"id": "1", "dialog": TURNS})) == [Layout("messages", {"messages": "dialog"})]
    assert layouts(of({"id": "1", "dialog": shared})) == [Layout("conversations", {"conversations": "dialog"})]
    assert layouts(of({"messages": shared})) == [Layout("conversations", {"conversations": "messages"})]
    assert layouts(of({"dialog": "a talk", "x": "y"})) == []


def test_labels_are_text_or_numbers() -> None:
    """Lists of them, as of texts with several labels, are not read."""
    assert layouts(of({"sentence": "good", "label": 1})) == [Layout("classification", {"text": "sentence"})]
    assert layouts(of({"sentence": "good", "label": [1, 2]})) == []


def test_a_format_that_is_wanted() -> None:
    """Columns are looked for that fit it, and no others."""
    found = with_columns("question answer text")
    assert layouts(found, "prompt_completion") == [
        Layout("prompt_completion", {"prompt": "question", "completion": "answer"})
    ]
    assert layouts(found, "text") == [Layout("text")]
    assert layouts(found, "messages") == []


def test_columns_that_somebody_chose() -> None:
    found = with_columns("a b text")
    assert chosen_layout(found, {"prompt": "a", "completion": "b"}).format == "prompt_completion"
    with pytest.raises(DataError) as caught:
        chosen_layout(found, {"prompt": "c", "completion": "b"})
    assert str(caught.value).startswith("rows: dataset.columns takes prompt from the column 'c', which is not there")


def test_the_format_of_fields_alone() -> None:
    assert format_of({"completion": "x"}) == "prompt_completion"
    assert format_of({"input": "x", "output": "y"}) == "alpaca"
    assert format_of({"text": "x"}) == "text"
    assert format_of({"text": "x", "label": "y"}) == "classification"
    with pytest.raises(DataError) as caught:
        format_of({"prompt": "x", "output": "y"}, "alpaca")
    assert str(caught.value) == (
        "expected fields of one format (alpaca: instruction, output, input, system), got prompt, output."
    )


# ------------------------------------------------------------------------------------------- Lengths


WORDS = ["the", "of", "Answer", "is", "1234", "12.5", "a+b", "{x:", "[1]}", "ünïcode", "数学", "🙂", "\n\n"]
WORDS += ["https://a.b/c?d=e", "QkFTRTY0"]


@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join), min_size=2, max_size=2), st.booleans())
def test_no_row_is_longer_than_its_bound(texts: list[str], template: bool) -> None:
    """With a byte-level tokenizer that knows few words, with and without a chat template."""
    row = {"prompt": texts[0], "completion": texts[1] + "."}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    section = DatasetSection(train="rows.jsonl", max_length=100_000)
    tokenizer = tiny_tokenizer() if template else tiny_tokenizer(None)
    encoded = encode_training_rows(section, tokenizer)
    # Ordinary words of many letters are more than half as many tokens only to a vocabulary of 384.
    letters = sum(letter.isascii() and letter.isalpha() for text in texts for letter in text)
    assert encoded.tokens <= token_bound(take_sample("rows.jsonl"), Layout("prompt_completion")) + letters


@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ("word " * 10, 64 + 25),  # letters and spaces: a token for two
        ("12345 67", 64 + 8),  # 7 digits and half a space
        ("é数", 64 + 5),  # a token for each of its bytes
        ("QUJD" * 10, 64 + 40),  # no words
    ],
)
def test_what_counts_how_much(text: str, bound: int) -> None:
    assert token_bound(of({"text": text}), Layout("text")) == bound


def test_everything_in_a_row_counts() -> None:
    """Both sides of a passage, alpaca's own words, every turn and what else it carries."""
    short = {"instruction": "ab", "output": "cd"}
    assert token_bound(of(short), Layout("alpaca")) > 64 + 32 + 50
    turns = [{"role": "user", "content": "abcd"}, {"role": "assistant", "content": "efgh"}]
    plain = token_bound(of({"messages": turns}), Layout("messages"))
    assert plain == 64 + 2 * (16 + 2)
    called = [turns[0], turns[1] | {"tool_calls": [{"name": "f" * 100}]}]
    assert token_bound(of({"messages": called}), Layout("messages")) > plain + 50
    tools = [{"name": "f" * 100}]
    assert token_bound(of({"messages": turns, "tools": tools}), Layout("messages")) > plain + 50


def test_the_longest_row_and_malformed_ones() -> None:
    assert token_bound(of({"text": "a"}, {"text": "12345678"}, {"text": "b"}), Layout("text")) == 64 + 8
    with pytest.raises(DataError) as caught:
        token_bound(of({"text": "a"}, {"text": None}), Layout("text"))
    assert str(caught.value) == "rows, row 2: text: expected text, got null."


@pytest.mark.parametrize(("bound", "length"), [(512, 512), (513, 1024), (1024, 1024), (70_000, 131_072)])
def test_a_length_is_a_power_of_two(bound: int, length: int) -> None:
    assert enough_tokens(bound) == length


def test_every_format_is_known() -> None:
    """A format that is added has its own names recognised, too."""
    for format, columns in REQUIRED.items():
        assert layouts(with_columns(" ".join(columns))) == [Layout(format)]


def test_columns_that_are_no_text() -> None:
    """Half of a surrogate pair, which JSON can carry, has no place in a recipe nor on a screen."""
    Path("rows.jsonl").write_text('{"\\ud800": "a"}\n')
    with pytest.raises(DataError) as caught:
        take_sample("rows.jsonl")
    message = "rows.jsonl, line 1: the name of a column holds half of a surrogate pair, which is no text."
    assert str(caught.value) == message
