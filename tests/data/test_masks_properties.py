# ruff: noqa: RUF001  (Greek and Cyrillic letters are meant)
"""Random conversations: what is learned is what the assistant said with its end of turn, and nothing else.

The user, the system and tools speak in capitals and Greek, the assistant in small letters and Cyrillic, so that a
single letter of theirs that is learned shows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qlora_cli.data.chat import Rendered, Renderer
from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.templates import PLAIN
from tests.support.masks import DAY, conversation, encode
from tests.support.templates import family_tokenizer
from tests.support.tokenizers import tiny_tokenizer

THEIRS = "ABCXYZΑΒΓΨΩ"
OURS = "abcxyzабвгя"
_BETWEEN = " \n\t.,-é😀0"
# What a text must not be taken for when it only quotes it.
_QUOTED = ("<|im_end|>", "<|im_start|>", "<|im_start|>user\n", "<|im_start|>assistant\n", "</s>", "<|end|>")

Message = dict[str, Any]


class Way(NamedTuple):
    """How a template writes an answer: what is learned of `said`, and whether turns have to alternate."""

    learned: Callable[[str], str]
    strict: bool = False


WAYS = {
    "chatml": Way(lambda said: said + "<|im_end|>"),
    "smollm2": Way(lambda said: said + "<|im_end|>"),
    "qwen-2.5": Way(lambda said: said + "<|im_end|>"),
    "zephyr": Way(lambda said: said + "</s>"),
    "llama-3": Way(lambda said: said.strip() + "<|eot_id|>"),
    "llama-3-always": Way(lambda said: said.strip() + "<|eot_id|>"),
    "plain": Way(lambda said: said + "<|im_end|>"),
    "tagged, with end": Way(lambda said: said + "<|im_end|>"),
    "tagged, without end": Way(lambda said: said + "<|im_end|>"),
    "tagged, with newline": Way(lambda said: said + "<|im_end|>"),
    "gemma-3": Way(lambda said: said.strip() + "<end_of_turn>", strict=True),
    "llama-2": Way(lambda said: f" {said.strip()} </s>", strict=True),
    "mistral": Way(lambda said: f" {said}</s>", strict=True),
}


@functools.cache
def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(PLAIN) if name == "plain" else family_tokenizer(name)


def text_of(alphabet: str, quoted: Sequence[str] = _QUOTED) -> st.SearchStrategy[str]:
    letters = st.text(alphabet + _BETWEEN, max_size=12)
    return st.lists(st.one_of(letters, letters, st.sampled_from([*quoted, ""])), max_size=3).map("".join)


@st.composite
def chats(draw: st.DrawFn, strict: bool, quoted: Sequence[str] = _QUOTED) -> list[Message]:
    """Turns in any order with at least one answer, or alternating from the user's on."""
    if strict:
        roles = ["user", "assistant"] * draw(st.integers(1, 3)) + draw(st.sampled_from([[], ["user"]]))
    else:
        roles = draw(st.lists(st.sampled_from(["user", "assistant", "system"]), max_size=5))
        roles.insert(draw(st.integers(0, len(roles))), "assistant")
    return [{"role": role, "content": draw(text_of(OURS if role == "assistant" else THEIRS, quoted))} for role in roles]


def learned_text(rendered: Rendered) -> str:
    return "".join(rendered.text[start:end] for start, end in rendered.spans)


def decoded(tokenizer: PreTrainedTokenizerFast, encoded: EncodedRows, index: int = 0) -> tuple[str, str]:
    """All of a row, and what is learned of it."""
    ids, labels = encoded.input_ids(index), encoded.labels(index)
    return tokenizer.decode(ids), tokenizer.decode(ids[labels != -100])


@pytest.mark.parametrize("name", WAYS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_what_is_learned_is_what_the_assistant_said(name: str, data: st.DataObject) -> None:
    """Each answer with its end, one after the other; nobody else's letter among it; the text as transformers has it."""
    messages = data.draw(chats(WAYS[name].strict))
    tokenizer = tokenizer_for(name)
    (rendered,) = Renderer(tokenizer, today=DAY).render(conversation(*messages), "row 1")
    answers = [WAYS[name].learned(message["content"]) for message in messages if message["role"] == "assistant"]
    assert [rendered.text[start:end] for start, end in rendered.spans] == answers
    assert not set(learned_text(rendered)) & set(THEIRS)
    assert rendered.text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert list(rendered.spans) == sorted(rendered.spans)


@pytest.mark.parametrize("name", WAYS)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_encoded_rows_hold_the_text_and_learn_the_answers(name: str, data: st.DataObject) -> None:
    """Decoded, a row is its text, and its labels are the answers, for answers that no token runs into."""
    messages = data.draw(chats(WAYS[name].strict, quoted=()))
    for message in messages:
        message["content"] = f"x{message['content']}x" if message["role"] == "assistant" else message["content"]
    tokenizer = tokenizer_for(name)
    whole, learned = decoded(tokenizer, encode(tokenizer, {"messages": messages}))
    assert whole == tokenizer.apply_chat_template(messages, tokenize=False)
    assert learned == "".join(
        WAYS[name].learned(message["content"]) for message in messages if message["role"] == "assistant"
    )


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_rewritten_turns_are_learned_as_they_are_given(data: st.DataObject) -> None:
    """Qwen 3 with reasoning: a row or a sequence for each answer, each learned with its reasoning and its end."""
    messages = data.draw(chats(strict=data.draw(st.booleans()), quoted=()))
    # Of two answers in a row, the template writes the first differently once the second follows.
    assume(not any(a["role"] == b["role"] == "assistant" for a, b in itertools.pairwise(messages)))
    for message in messages:
        if message["role"] == "assistant" and data.draw(st.booleans()):
            message["reasoning_content"] = data.draw(st.text(OURS, min_size=1, max_size=5))
    tokenizer = tokenizer_for("qwen-3")
    sequences = Renderer(tokenizer, today=DAY).render(conversation(*messages), "row 1")
    said = [message for message in messages if message["role"] == "assistant"]
    spans = [(row, row.text[start:end]) for row in sequences for start, end in row.spans]
    answers = [
        f"<think>\n{message.get('reasoning_content', '')}\n</think>\n\n{message['content']}<|im_end|>"
        for message in said
    ]
    assert [text for _, text in spans] == answers
    assert len(sequences) in (1, len(said))
    for row, _ in spans:
        assert not set(learned_text(row)) & set(THEIRS)


@given(messages=chats(strict=True), name=st.sampled_from(["phi-3", "mistral-v3"]), opening=st.booleans())
@settings(max_examples=60, deadline=None)
def test_ends_that_differ_and_prompts_that_move(messages: list[Message], name: str, opening: bool) -> None:
    """Phi-3's last turn ends in more, and Mistral's system prompt moves on: the answers are learned all the same."""
    tokenizer = tokenizer_for(name)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    told = [{"role": "system", "content": "S"}] if opening else []
    sequences = Renderer(tokenizer, today=DAY).render(conversation(*told, *messages), "row 1")
    spans = [row.text[start:end] for row in sequences for start, end in row.spans]
    if name == "phi-3":
        assert len(sequences) == 1
        ends = ["<|end|>"] * len(answers)
        if messages[-1]["role"] == "assistant":
            ends[-1] = "<|end|>\n<|endoftext|>"
        assert spans == [answer + end for answer, end in zip(answers, ends, strict=True)]
    else:
        assert spans == [f" {answer}</s>" for answer in answers]
        if opening and len(answers) > 1:
            assert len(sequences) == len(answers)


@given(data=st.data(), name=st.sampled_from(["chatml", "tagged, without end", "llama-3", "qwen-2.5"]))
@settings(max_examples=50, deadline=None)
def test_some_turns_only(data: st.DataObject, name: str) -> None:
    """Turns of weight 0, and all but the last where that alone is meant, are never learned."""
    messages = data.draw(chats(strict=False))
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    unlearned = frozenset(data.draw(st.sets(st.sampled_from(said), max_size=len(said) - 1)))
    left = [i for i in said if i not in unlearned]
    tokenizer = tokenizer_for(name)
    example = conversation(*messages, unlearned=unlearned)
    for supervise, turns in (("all_assistant", left), ("last_assistant", left[-1:])):
        (rendered,) = Renderer(tokenizer, supervise, today=DAY).render(example, "row 1")
        spans = [rendered.text[start:end] for start, end in rendered.spans]
        assert spans == [WAYS[name].learned(messages[i]["content"]) for i in turns]
    (everything,) = Renderer(tokenizer, "everything", today=DAY).render(example, "row 1")
    kept = [everything.text[start:end] for start, end in everything.spans]
    assert len("".join(kept)) == len(everything.text.rstrip()) - sum(
        len(WAYS[name].learned(messages[i]["content"])) for i in unlearned
    )
