"""What is said of rows before training: each thing once, of the right rows, with the right counts."""

from __future__ import annotations

from typing import Any

from qlora_cli.data.files import BadRow
from qlora_cli.recipe.schema import DatasetSection
from qlora_cli.training.checked_rows import split_facts
from qlora_cli.training.doubts import doubts
from qlora_cli.training.preparation import Split, hold_out, make_split
from tests.support.encoded import encode_whole
from tests.support.masks import assistant, user
from tests.support.templates import family_tokenizer
from tests.support.tokenizers import tiny_tokenizer

TOOL = {"name": "add", "description": "Adds two numbers."}


def section_of(**fields: Any) -> DatasetSection:
    return DatasetSection(train="rows.jsonl", **fields)


def split_of(tokenizer: Any, *rows: Any, name: str = "train", **fields: Any) -> Split:
    return make_split(name, encode_whole(tokenizer, *rows, **fields), section_of(**fields), tokenizer)


def doubts_of(tokenizer: Any, *rows: Any, **fields: Any) -> list[str]:
    return list(doubts(split_of(tokenizer, *rows, **fields), None, section_of(**fields), tokenizer))


def conversation(*contents: str, **more: Any) -> dict[str, Any]:
    return {"messages": [(user, assistant)[i % 2](text) for i, text in enumerate(contents)], **more}


def test_tools_that_a_template_does_not_write_are_told() -> None:
    """How many rows have some, or the model would learn to call what it never saw; nothing where they are written."""
    rows = [
        conversation("One?", "Two.", tools=[TOOL]),
        conversation("Two?", "Three.", tools="[]"),
        conversation("Three?", "Four.", tools=[TOOL, TOOL]),
    ]
    assert doubts_of(tiny_tokenizer(), *rows) == [
        "2 rows of rows.jsonl have tools, which the chat template does not write: the model does not see what it may "
        "call. Set dataset.chat_template to a template that writes them"
    ]
    assert doubts_of(family_tokenizer("qwen-2.5"), *rows) == []
    (one,) = doubts_of(tiny_tokenizer(), *rows[:2])
    assert one.startswith("1 row of rows.jsonl has tools, which")


def test_held_out_rows_tell_nothing_of_the_source_again() -> None:
    """Rows that could not be read, and tools that are not written, are of the source: told once, with its rows."""
    bad = BadRow("rows.jsonl, line 9: bad")
    tokenizer = tiny_tokenizer()
    rows = [conversation(f"{n}?", f"{n}.", tools=[TOOL]) for n in range(8)]
    whole = encode_whole(tokenizer, *rows, bad, on_bad_row="skip")
    section = section_of(validation_fraction=0.25, on_bad_row="skip")
    parts = hold_out(whole, 0.25, seed=1)
    train, held = (make_split(name, part, section, tokenizer) for name, part in zip(("train", "v"), parts, strict=True))
    assert (train.ready().rows, train.ready().skipped) == (6, 1)
    assert (held.ready().rows, held.ready().skipped) == (2, 0)
    told = list(doubts(train, held, section, tokenizer))
    assert [text.partition(":")[0] for text in told] == [
        "1 row of rows.jsonl could not be read and was skipped",
        "8 rows of rows.jsonl have tools, which the chat template does not write",
    ]


def test_a_row_that_is_dropped_in_part_is_told() -> None:
    """Qwen 3 makes a sequence of each answer: a row that loses the longer ones is no dropped row, and is told of."""
    tokenizer = family_tokenizer("qwen-3")
    thinking = {"reasoning_content": "Hm."}
    several = {"messages": [user("a"), assistant("b", **thinking), user("c " * 60), assistant("d", **thinking)]}
    long = conversation("e " * 60, "f")
    fields = {"overlong": "drop", "max_length": 80}
    split = split_of(tokenizer, several, long, conversation("g", "h"), conversation("i", "j"), **fields)
    ready = split.ready()
    assert (ready.rows, ready.sequences, ready.dropped) == (3, 3, 1)
    assert split_facts(split, section_of(**fields)).overlong.rows == 2
    told = list(doubts(split, None, section_of(**fields), tokenizer))
    assert told == [
        "dataset.overlong: drop leaves out some answers of 1 training row: each is a sequence by itself, and those are "
        "longer than dataset.max_length",
        "the chat template renders earlier turns differently once others follow: 1 row of several answers became a "
        "sequence for each, as the model sees it when it gives that answer",
    ]


def test_answers_that_are_cut_are_told_of_either_split() -> None:
    """A held-out loss over half of an answer is another loss."""
    tokenizer = tiny_tokenizer()
    rows = [conversation("a", "b"), conversation("a", "b " * 200)]
    fields = {"overlong": "truncate", "max_length": 60}
    train, held = (split_of(tokenizer, *rows, name=name, **fields) for name in ("train", "validation"))
    section = section_of(validation="other.jsonl", **fields)
    assert [text for text in doubts(train, held, section, tokenizer) if "lose part" in text] == [
        "1 of 2 training rows lose part of their answer at dataset.max_length",
        "1 of 2 validation rows lose part of their answer at dataset.max_length",
    ]


def test_a_row_of_several_sequences_is_named_once() -> None:
    """Two empty answers of one row are one row with empty answers."""
    rewriting = (
        "{% for message in messages %}{{ message['role'] + ': ' }}"
        "{{ message['content'] if loop.last or message['role'] == 'user' else '…' }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    split = split_of(tiny_tokenizer(rewriting), conversation("a", "", "b", ""), conversation("c", "d"))
    silent = split_facts(split, section_of()).silent
    assert (len(split.silent_rows), silent.rows, silent.first, silent.named) == (2, 1, (1,), "line 1")
