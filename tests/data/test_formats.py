"""What rows mean, and what is said of rows that mean nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_cli.data.formats import Conversation, Passage, Text, read_row, resolve_format
from qlora_cli.errors import DataError


def resolve(names: list[str], format: Any = "auto", columns: dict[str, str] | None = None) -> str:
    return resolve_format(format, columns or {}, names, "x.jsonl")


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
        (["conversations", "id"], {}, "conversations"),
        (["dialogue", "system", "tools"], {"conversations": "dialogue"}, "conversations"),
        (["messages", "tools"], {}, "messages"),
        (["text", "label"], {}, "classification"),
        (["sentence", "label"], {"text": "sentence"}, "classification"),
        (["premise", "hypothesis", "label"], {"text": "premise", "text_pair": "hypothesis"}, "classification"),
        (["instruction", "output", "system"], {}, "alpaca"),
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
            "  messages: messages\n  conversations: conversations\n  alpaca: instruction, output\n"
            "  prompt_completion: prompt, completion\n  classification: text, label\n  text: text\n"
            "Set dataset.format, and dataset.columns as in {prompt: your_column}.",
        ),
        (
            ["instruction", "output", "text"],
            {},
            "x.jsonl: the columns instruction, output, text fit more than one format: alpaca, text. "
            "Set dataset.format to the one that is meant.",
        ),
        (
            ["text", "label", "prompt", "completion"],
            {},
            "x.jsonl: the columns text, label, prompt, completion fit more than one format: prompt_completion, "
            "classification. Set dataset.format to the one that is meant.",
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


def test_a_table_without_a_header_is_told_as_one() -> None:
    """What stands for columns is a row, of which a message shows no more than the beginning of each cell."""
    row = ["gj04", "1", "", "Our friends won't buy this analysis, let alone the next one we propose."]
    for fields in ({"format": "classification"}, {"format": "text", "columns": {"text": "sentence"}}):
        with pytest.raises(DataError) as caught:
            resolve_format(**{"columns": {}, **fields}, column_names=row, source="train.tsv.gz")
        assert (
            "The columns are gj04, 1, , Our friends won't buy this analysis, let…, by the first line; if that is a "
            "row already, put a line of names before it."
        ) in str(caught.value)


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


def messages_of(*messages: dict[str, Any], **row: Any) -> Conversation:
    example = read_row({"messages": list(messages), **row}, "messages", {}, where="")
    assert isinstance(example, Conversation)
    return example


def shared(*turns: dict[str, Any], **row: Any) -> Conversation:
    example = read_row({"conversations": list(turns), **row}, "conversations", {}, where="")
    assert isinstance(example, Conversation)
    return example


USER, SAID = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
HUMAN, GPT = {"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        *((name, "user") for name in ("human", "user")),
        *((name, "assistant") for name in ("gpt", "chatgpt", "bot", "model", "assistant", "function_call")),
        *((name, "tool") for name in ("tool", "function", "observation", "function_response", "tool_response")),
        ("system", "system"),
    ],
)
def test_sharegpt_speakers(speaker: str, role: str) -> None:
    """Every name that ShareGPT data uses for a role, from/value and role/content alike; other keys are kept."""
    expected = (*({"role": role, "content": "x", "name": "n"},), {"role": "assistant", "content": "y"})
    assert shared({"from": speaker, "value": "x", "name": "n", "tag": None}, GPT).messages == expected
    assert shared({"role": speaker, "content": "x", "name": "n"}, GPT).messages == expected


def test_a_sharegpt_turn_speaks_by_from_whatever_else_it_has() -> None:
    """A turn with from and value that has role or content as well is not taken for another speaker's."""
    turns = [
        {"from": "human", "value": "hi", "role": "assistant", "content": "ho"},
        {"from": "gpt", "value": "yes", "role": 5, "name": "x"},
    ]
    example = read_row({"conversations": turns}, "conversations", {}, where="rows.jsonl, line 1")
    assert isinstance(example, Conversation)
    assert example.messages == (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes", "name": "x"},
    )


def test_a_message_is_text_whatever_the_row_holds() -> None:
    """Half of a surrogate pair for the type of a part is told in a message that can be written."""
    message = {"role": "user", "content": [{"type": "\ud83d", "text": "x"}]}
    with pytest.raises(DataError) as caught:
        read_row({"messages": [message]}, "messages", {}, where="rows.jsonl, line 1")
    assert str(caught.value).encode().endswith(rb'got a part of type "\ud83d" as part 1.')


def test_a_system_column_stands_before_a_conversation() -> None:
    """Unless it is empty; weights stay with their turns; two system prompts are one too many."""
    example = shared(HUMAN, {**GPT, "weight": 0}, HUMAN, GPT, system="S")
    assert example.messages[0] == {"role": "system", "content": "S"}
    assert len(example.messages) == 5
    assert example.unlearned == {2}
    for nothing in (None, ""):
        assert shared(HUMAN, GPT, system=nothing) == shared(HUMAN, GPT)
    row = {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT], "system": "S"}
    assert refusal(row, "conversations") == (
        "system: there is a system turn in the conversation as well: leave out one of them."
    )


def test_the_system_of_alpaca() -> None:
    """It is the system prompt where there is a template, and opens the bare prompt where there is none."""
    example = read_row({"instruction": "I", "output": "O", "system": "S"}, "alpaca", {}, where="")
    assert isinstance(example, Passage)
    assert (example.prompt, example.completion, example.system) == ("I", "O", "S")
    assert example.bare_prompt.startswith("S\n\nBelow is an instruction")
    plain = read_row({"instruction": "I", "output": "O", "system": ""}, "alpaca", {}, where="")
    assert plain == read_row({"instruction": "I", "output": "O"}, "alpaca", {}, where="")


@pytest.mark.parametrize(
    ("label", "text"),
    [("good", "good"), (3, "3"), (-1, "-1"), (0, "0"), (2.0, "2"), (True, "true"), (False, "false")],
)
def test_classification(label: object, text: str) -> None:
    """The text is the prompt and the label its completion, on a line of its own where there is no template."""
    assert read_row({"text": "T", "label": label}, "classification", {}, where="") == Passage("T", text, "T\n")
    pair = {"premise": "T", "hypothesis": "U", "label": label}
    columns = {"text": "premise", "text_pair": "hypothesis"}
    assert read_row(pair, "classification", columns, where="") == Passage("T\nU", text, "T\nU\n")


def test_arguments_of_calls_become_objects() -> None:
    """OpenAI writes them as JSON text, and templates want objects; what is no JSON object stays as it is."""
    given = ['{"a": {"b": [1, null]}}', {"a": 1}, "a=1", "[1]"]
    calls = [{"id": "1", "type": None, "function": {"name": "f", "arguments": value}} for value in given]
    message = messages_of(USER, {"role": "assistant", "content": None, "tool_calls": calls}).messages[1]
    assert message["content"] == ""
    assert [call["function"]["arguments"] for call in message["tool_calls"]] == [
        {"a": {"b": [1, None]}},
        {"a": 1},
        "a=1",
        "[1]",
    ]
    assert message["tool_calls"][0].keys() == {"id", "function"}
    assert calls[0]["function"]["arguments"] == given[0]


def test_tools() -> None:
    """A list of objects, or JSON text of one; nothing where there are none."""
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        assert messages_of(USER, SAID, tools=tools).tools == shared(HUMAN, GPT, tools=tools).tools == ({"name": "f"},)
    for nothing in (None, [], "", " ", "[]", "null"):
        assert messages_of(USER, SAID, tools=nothing).tools is None


def test_content_in_parts_and_newer_roles() -> None:
    """Parts of text are joined, and developer is system."""
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}]
    example = messages_of({"role": "developer", "content": parts}, SAID)
    assert example.messages[0] == {"role": "system", "content": "a b"}


def test_turns_with_weight_zero_are_not_learned() -> None:
    """As OpenAI has it; the weight itself is not shown to the template."""
    example = messages_of({**USER, "weight": 0}, {**SAID, "weight": 0}, USER, {**SAID, "weight": 1.0}, SAID)
    assert example == Conversation((USER, SAID, USER, SAID, SAID), unlearned=frozenset({1}))


@pytest.mark.parametrize(
    ("row", "format", "message"),
    [
        ({"prompt": "x", "completion": None}, "prompt_completion", "completion: expected text, got null."),
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
            "message 1: expected role and content, got from and value, as in ShareGPT. "
            "Set dataset.format: conversations, and dataset.columns: {conversations: messages}.",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "messages",
            "message 2: content: expected text, got null.",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]},
            "messages",
            'message 1: content: expected text, or parts of type text, got a part of type "image_url" as part 2.',
        ),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            "messages",
            'message 1: content: expected text, or parts of type text, got the text "x" as part 1.',
        ),
        (
            {"messages": [{"role": "user", "content": []}]},
            "messages",
            "message 1: content: expected text, got a list of 0.",
        ),
        (
            {"messages": [{"content": "x"}]},
            "messages",
            "message 1: role: expected system, user, assistant or tool, got nothing.",
        ),
        (
            {"messages": [{"role": ["user"], "content": "x"}]},
            "messages",
            "message 1: role: expected system, user, assistant or tool, got a list of 1.",
        ),
        ({"messages": [{"role": "user"}]}, "messages", "message 1: content: expected text, got nothing."),
        (
            {"messages": [{"role": "user", "content": {"x": 1}}]},
            "messages",
            "message 1: content: expected text, got an object.",
        ),
        (
            {"messages": [USER, {**SAID, "weight": 0.5}]},
            "messages",
            "message 2: weight: expected 0 or 1, got the number 0.5.",
        ),
        (
            {"messages": [USER, {**SAID, "weight": True}]},
            "messages",
            "message 2: weight: expected 0 or 1, got the boolean true.",
        ),
        (
            {"messages": [{**USER, "weight": 1}, SAID]},
            "messages",
            "message 1: weight: expected 0, got 1: of a conversation, only assistant turns are learned.",
        ),
        (
            {"messages": [USER, {**SAID, "weight": 0}]},
            "messages",
            "messages: every assistant turn has weight 0, so there is nothing to learn.",
        ),
        (
            {"messages": [USER, {**SAID, "tool_calls": "f()"}]},
            "messages",
            'message 2: tool_calls: expected a list of objects, got the text "f()".',
        ),
        (
            {"messages": [USER, SAID], "tools": "f()"},
            "messages",
            'tools: expected a list of objects, or JSON text of one, got the text "f()".',
        ),
        (
            {"messages": [USER, SAID], "tools": ["f"]},
            "messages",
            "tools: expected a list of objects, or JSON text of one, got a list of 1.",
        ),
        ({"text": "x"}, "messages", "messages: expected a list of messages, got nothing."),
        ({"prompt": "x"}, "prompt_completion", "completion: expected text, got nothing."),
        ({}, "conversations", "conversations: expected a list of turns, got nothing."),
        ({"conversations": []}, "conversations", "conversations: expected at least one turn, got an empty list."),
        (
            {"conversations": [HUMAN]},
            "conversations",
            "conversations: there is no assistant turn, so nothing to learn.",
        ),
        (
            {"conversations": [HUMAN, 5]},
            "conversations",
            "turn 2: expected an object with from and value, got the number 5.",
        ),
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            "conversations",
            'turn 1: from: expected system, human, gpt or tool, got the text "narrator".',
        ),
        (
            {"conversations": [{"value": "x"}]},
            "conversations",
            "turn 1: from: expected system, human, gpt or tool, got nothing.",
        ),
        (
            {"conversations": [HUMAN, {"from": "gpt", "value": None}]},
            "conversations",
            "turn 2: value: expected text, got null.",
        ),
        ({"conversations": [HUMAN, {"role": "gpt"}]}, "conversations", "turn 2: content: expected text, got nothing."),
        ({"conversations": [HUMAN, GPT], "system": 5}, "conversations", "system: expected text, got the number 5."),
        (
            {"text": "x", "label": None},
            "classification",
            "label: expected text, a whole number or a boolean, got null.",
        ),
        ({"text": "x"}, "classification", "label: expected text, a whole number or a boolean, got nothing."),
        (
            {"text": "x", "label": 0.5},
            "classification",
            "label: expected text, a whole number or a boolean, got the number 0.5.",
        ),
        (
            {"text": "x", "label": ""},
            "classification",
            'label: expected text, a whole number or a boolean, got the text "".',
        ),
        (
            {"text": "x", "label": ["a"]},
            "classification",
            "label: expected text, a whole number or a boolean, got a list of 1.",
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


def test_conversations_as_json_text() -> None:
    """Tables have no lists: a cell may hold the JSON text of one, in either shape."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    shared = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    for format, value in (("messages", turns), ("conversations", shared)):
        example = read_row({format: json.dumps(value)}, format, {}, where="x.csv, row 1")  # type: ignore[arg-type]
        assert example == Conversation(tuple(turns))


def test_prompts_and_completions_as_messages() -> None:
    """As TRL has them: what the completion's assistant says is learned, what the prompt's has said is only read."""
    few_shot = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "One."}]
    asked, answered = [{"role": "user", "content": "2?"}], [{"role": "assistant", "content": "Two."}]
    row = {"prompt": [*few_shot, *asked], "completion": answered}
    example = read_row(row, "prompt_completion", {}, where="x.jsonl, line 1")
    assert example == Conversation((*few_shot, *asked, *answered), unlearned=frozenset({1}))
    nothing = {"prompt": few_shot, "completion": asked}
    assert refusal(nothing, "prompt_completion") == ("completion: there is no assistant turn, so nothing to learn.")
    assert refusal({"prompt": "Q", "completion": answered}, "prompt_completion") == (
        "completion: expected text, got a list of 1."
    )
