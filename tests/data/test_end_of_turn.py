"""Which token ends an answer, in how many rows it is learned, and what is said where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_cli.data.end_of_turn import EndOfTurn, doubts_about_the_end, find_end_of_turn, missing_end
from qlora_cli.recipe.schema import DatasetSection
from tests.support.encoded import fit
from tests.support.tokenizers import CHATML, PLAIN, tiny_tokenizer

TURN = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + END }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def ending(end: str) -> str:
    """A chat template that writes the Jinja expression `end` after every turn."""
    return TURN.replace("END", end)


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


ANSWERS = (chat("Q", "The answer is four."), chat("One?", "Two.", "Three?", "Four.", "Five?"), chat("Hush", ""))


def look(tokenizer: Any, *rows: dict[str, Any], **section: Any) -> tuple[EndOfTurn, list[str], list[str]]:
    """The end, what is wrong with it, and the doubts about it."""
    fields = DatasetSection(train="rows.jsonl", **section)
    fitted = fit(tokenizer, *rows, **section)
    end, kept = find_end_of_turn(fitted, tokenizer), fitted.kept
    limit = fields.max_length
    return end, list(missing_end(end, kept, limit)), list(doubts_about_the_end(end, kept, limit))


@pytest.mark.parametrize(
    ("template", "extra", "text"),
    [
        (CHATML, (), "<|im_end|>"),
        (ending("eos_token"), (), "<|im_end|>"),
        (ending("'<|eot_id|>'"), ("<|eot_id|>",), "<|eot_id|>"),
        (ending("'<end_of_turn>\\n'"), ("<end_of_turn>",), "<end_of_turn>"),
        (ending("'<|end|>' + eos_token"), ("<|end|>",), "<|im_end|>"),
    ],
)
def test_the_end_is_what_the_template_learns_last(template: str, extra: tuple[str, ...], text: str) -> None:
    """Special or eos, alone or followed by a newline or by another: the last learned token of every row."""
    tokenizer = tiny_tokenizer(template, extra_special=extra)
    end, wrong, doubts = look(tokenizer, *ANSWERS)
    assert end == EndOfTurn(tokenizer.convert_tokens_to_ids(text), text, 3, 4)
    assert (wrong, doubts) == ([], [])


def test_the_end_where_everything_is_learned() -> None:
    """The newline that ChatML writes after the end of a turn does not hide it."""
    end, wrong, doubts = look(tiny_tokenizer(), chat("Q", "Four."), chat("Hush", ""), supervise="everything")
    assert (end.text, end.rows, end.turns) == ("<|im_end|>", 2, 2)
    assert (wrong, doubts) == ([], [])


def test_an_added_token_that_is_not_special() -> None:
    """It ends every turn, so it is the end; the same token inside some answers would not be."""
    tokenizer = tiny_tokenizer(ending("'<eot>'"))
    tokenizer.add_tokens(["<eot>"])
    assert look(tokenizer, *ANSWERS)[0] == EndOfTurn(tokenizer.convert_tokens_to_ids("<eot>"), "<eot>", 3, 4)
    plain = tiny_tokenizer(PLAIN)
    plain.add_tokens(["<eot>"])
    assert look(plain, chat("Q", "A <eot>"), chat("Q", "B"))[0] == EndOfTurn(None, "")


def test_passages_and_text_end_in_eos() -> None:
    """Without a chat template the end is the tokenizer's eos."""
    for row in ({"text": "the end"}, {"prompt": "a", "completion": "b"}):
        assert look(tiny_tokenizer(None), row)[0] == EndOfTurn(2, "<|im_end|>", 1, 1)


def test_a_template_without_an_end_is_wrong() -> None:
    """Nothing after an answer: one message says what that means and what to do."""
    end, wrong, doubts = look(tiny_tokenizer(PLAIN), *ANSWERS[:2])
    assert end == EndOfTurn(None, "")
    assert wrong == [
        "rows.jsonl: the chat template puts nothing after an answer, so that no row teaches the model to stop. Use a "
        "base model whose chat template ends a turn with a token, or set dataset.chat_template to one that has "
        "{{ eos_token }} after the assistant's content."
    ]
    assert doubts == []


def test_answers_that_bring_their_own_end() -> None:
    """The template writes none, but the rows do: the model learns to stop, so nothing is wrong."""
    end, wrong, _ = look(tiny_tokenizer(PLAIN), chat("Q", "A<|im_end|>"), chat("Q", "B<|im_end|>"))
    assert (end, wrong) == (EndOfTurn(2, "<|im_end|>", 2, 2), [])


def test_an_end_in_words_is_doubted_not_refused() -> None:
    """It is learned, and generation can be told to stop at it."""
    end, wrong, doubts = look(tiny_tokenizer(ending("'\\n### End\\n'")), *ANSWERS)
    assert (end, wrong) == (EndOfTurn(None, "### End"), [])
    assert doubts == [
        "the chat template ends an answer with the words '### End', which are no token of their own: the model learns "
        "them, but whatever generates with it has to be told to stop there"
    ]


def test_an_end_that_cannot_be_told_is_not_refused() -> None:
    """The template refuses the probe: what is not known is not wrong."""
    picky = PLAIN.replace("{% for", "{% if messages[0]['content'] != 'Q' %}{{ raise_exception('x') }}{% endif %}{% for")
    end, wrong, doubts = look(tiny_tokenizer(picky), chat("Q", "A"))
    assert (end, wrong, doubts) == (EndOfTurn(None, None), [], [])


def test_rows_that_lose_their_end_are_counted() -> None:
    """Cut rows do not teach the end; that is refused only if no answer is left whole, of several in a row either."""
    short, long, several = chat("Q", "A"), chat("Q", "the end " * 20), chat("Q", "A", "Q", "the end " * 20)
    cut: dict[str, Any] = {"max_length": 48, "overlong": "truncate"}
    end, wrong, doubts = look(tiny_tokenizer(), short, long, **cut)
    assert (end.rows, end.turns, wrong, doubts) == (1, 1, [], [])
    end, wrong, doubts = look(tiny_tokenizer(), several, long, **cut)
    assert (end.rows, end.turns, wrong, doubts) == (0, 1, [], [])
    end, wrong, doubts = look(tiny_tokenizer(), long, long, **cut)
    assert (end, doubts) == (EndOfTurn(2, "<|im_end|>", 0, 0, unended=2), [])
    assert wrong == [
        "rows.jsonl: every row is cut before its first end of turn (<|im_end|>) at dataset.max_length (48 tokens), so "
        "that no row teaches the model to stop. Raise dataset.max_length."
    ]


def test_text_that_is_cut_everywhere_is_doubted() -> None:
    """It may be meant so, of long texts."""
    _, wrong, doubts = look(tiny_tokenizer(), {"text": "the end " * 20}, max_length=24, overlong="truncate")
    assert wrong == []
    assert doubts == [
        "every row is cut before its end (<|im_end|>) at dataset.max_length (24): no row teaches the model to stop"
    ]


def test_an_unknown_token_is_no_end() -> None:
    """An answer that ends in something the vocabulary lacks does not end in an end-of-turn token."""
    tokenizer = tiny_tokenizer(PLAIN)
    tokenizer.unk_token = "."
    assert look(tokenizer, chat("Q", "It is."))[0].token is None
