"""What rows mean, and what is said of rows that mean nothing."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_cli.data.formats import Conversation, Passage, Text, columns_used, read_row, resolve_format
from qlora_cli.errors import DataError
from qlora_cli.recipe.schema import DatasetSection


def section(**fields: Any) -> DatasetSection:
    return DatasetSection(train="x.jsonl", **fields)


def resolve(names: list[str], **fields: Any) -> str:
    return resolve_format(section(**fields), names, "x.jsonl")


def refusal(row: dict[str, Any], format: Any, columns: dict[str, str] | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read_row(row, format, columns or {}, where="x.jsonl, line 3")
    return str(caught.value).removeprefix("x.jsonl, line 3: ")


@pytest.mark.parametrize(
    ("names", "mapping", "format"),
    [
        (["messages", "id"], {}, "messages"),
        (["chat"], {"messages": "chat"}, "messages"),
        (["instruction", "input", "output"], {}, "alpaca"),
        (["instruction", "output"], {}, "alpaca"),
        (["instruction", "context", "output"], {"input": "context"}, "alpaca"),
        (["prompt", "completion"], {}, "prompt_completion"),
        (["question", "answer"], {"prompt": "question", "completion": "answer"}, "prompt_completion"),
        (["question", "completion", "text"], {"prompt": "question"}, "prompt_completion"),
        (["text", "prompt"], {}, "text"),
        (["body"], {"text": "body"}, "text"),
    ],
)
def test_auto_recognises_the_format(names: list[str], mapping: dict[str, str], format: str) -> None:
    """`auto` finds the one format whose fields are all there, renamed columns and optional fields included."""
    assert resolve(names, columns=mapping) == format
    assert resolve(names, columns=mapping, format=format) == format


@pytest.mark.parametrize(
    ("names", "fields", "message"),
    [
        (
            ["question", "answer"],
            {},
            "x.jsonl: the columns question, answer fit no format. A format needs\n"
            "  messages: messages\n  alpaca: instruction, output\n"
            "  prompt_completion: prompt, completion\n  text: text\n"
            "Set dataset.format, and dataset.columns as in {prompt: your_column}.",
        ),
        (
            ["instruction", "output", "text"],
            {},
            "x.jsonl: the columns instruction, output, text fit more than one format: alpaca, text. "
            "Set dataset.format to the one that is meant.",
        ),
        (
            ["question", "answer"],
            {"columns": {"prompt": "qestion"}},
            "x.jsonl: dataset.columns takes prompt from the column 'qestion', which is not there; did you mean "
            "'question'? The columns are question, answer.",
        ),
        (
            ["question", "answer"],
            {"format": "prompt_completion", "columns": {"promt": "question"}},
            "dataset.columns: the format prompt_completion has no field 'promt'; did you mean `prompt`?",
        ),
        (
            ["question", "answer"],
            {"columns": {"promt": "question"}},
            "dataset.columns: no format has a field 'promt'; did you mean `prompt`?",
        ),
        (
            ["q"],
            {"format": "text"},
            "x.jsonl: the format text needs a column 'text', which is not there. "
            "The columns are q. Say which one it is with dataset.columns: {text: your_column}.",
        ),
        (
            ["message"],
            {"format": "messages"},
            "x.jsonl: the format messages needs a column 'messages', which is not there; did you mean 'message'? "
            "The columns are message. Say which one it is with dataset.columns: {messages: your_column}.",
        ),
    ],
)
def test_why_no_format_fits(names: list[str], fields: dict[str, Any], message: str) -> None:
    """A format that cannot be settled is refused with the columns there are and what to write."""
    with pytest.raises(DataError) as caught:
        resolve(names, **fields)
    assert str(caught.value) == message


def test_only_the_columns_of_the_format_are_read() -> None:
    """Other columns, however large, are left alone."""
    used = columns_used("alpaca", {"input": "context"}, ["id", "output", "context", "instruction", "input"])
    assert used == ["output", "context", "instruction"]


def test_rows_become_examples() -> None:
    """Each format gives its kind of example, from the columns that the recipe names."""
    renamed = {"prompt": "q", "completion": "a"}
    assert read_row({"q": "Q ", "a": "A"}, "prompt_completion", renamed, where="") == Passage("Q ", "A", "Q ")
    assert read_row({"text": "T"}, "text", {}, where="") == Text("T")


def test_alpaca_with_and_without_input() -> None:
    """The input follows the instruction in a chat, and has a heading of its own in plain text; empty is none."""
    row = {"instruction": "Add {x}.", "input": "1 2", "output": "3"}
    example = read_row(row, "alpaca", {}, where="")
    assert example == Passage(
        "Add {x}.\n\n1 2",
        "3",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Input:\n1 2\n\n### Response:\n",
    )
    for nothing in ({"input": ""}, {"input": None}):
        bare = read_row(row | nothing, "alpaca", {}, where="")
        assert bare == Passage(
            "Add {x}.",
            "3",
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd {x}.\n\n### Response:\n",
        )


def test_conversations_keep_what_templates_may_use() -> None:
    """Keys beside role and content are kept, nulls that Arrow filled in are not, and a bare tool call is a turn."""
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    row = {
        "messages": [
            {"role": "user", "content": "x", "name": "Ann", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": call},
            {"role": "tool", "content": "5", "name": "f"},
        ]
    }
    assert read_row(row, "messages", {}, where="") == Conversation(
        (
            {"role": "user", "content": "x", "name": "Ann"},
            {"role": "assistant", "content": "", "tool_calls": call},
            {"role": "tool", "content": "5", "name": "f"},
        )
    )


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        ({"prompt": "x"}, "prompt_completion", "completion: expected text, got null."),
        ({"prompt": 5, "completion": "x"}, "prompt_completion", "prompt: expected text, got the number 5."),
        ({"text": ["x", "y"]}, "text", "text: expected text, got a list of 2."),
        ({"text": {"x": 1}}, "text", "text: expected text, got an object."),
        ({"text": True}, "text", "text: expected text, got the boolean true."),
        ({"text": "a\ud83d"}, "text", "text: expected text, got \\ud83d, half of a surrogate pair."),
        ({"instruction": "x", "output": None}, "alpaca", "output: expected text, got null."),
        ({"instruction": "x", "output": "y", "input": 0}, "alpaca", "input: expected text, got the number 0."),
        ({"messages": None}, "messages", "messages: expected a list of messages, got null."),
        ({"messages": "hi"}, "messages", 'messages: expected a list of messages, got the text "hi".'),
        ({"messages": []}, "messages", "messages: expected at least one message, got an empty list."),
        ({"messages": [USER]}, "messages", "messages: there is no assistant turn, so nothing to learn."),
        (
            {"messages": [USER, "hi"]},
            "messages",
            'message 2: expected an object with role and content, got the text "hi".',
        ),
        (
            {"messages": [{"role": "human", "content": "x"}]},
            "messages",
            'message 1: role: expected system, user, assistant or tool, got the text "human".',
        ),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            "messages",
            "message 1: role: expected system, user, assistant or tool, got null.",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "messages",
            "message 2: content: expected text, got null.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
            "messages",
            "message 1: content: expected text, got a list of 1.",
        ),
    ],
)
def test_what_is_wrong_with_a_row(row: dict[str, Any], format: str, message: str) -> None:
    """A row that its format cannot read is refused with its place, the field, what was expected and got."""
    assert refusal(row, format) == message


def test_a_renamed_field_is_named_with_its_column() -> None:
    """Messages name the recipe's field and the column it is read from."""
    message = refusal({"q": None, "completion": "x"}, "prompt_completion", {"prompt": "q"})
    assert message == "prompt (column 'q'): expected text, got null."
