"""Masks, token for token: what the assistant said is learned with its end of turn, and nothing else is."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from qlora_cli.data.batches import collate
from qlora_cli.data.chat import Renderer
from qlora_cli.data.formats import Conversation
from qlora_cli.data.units import row_units
from qlora_cli.errors import DataError, ModelError
from tests.support.encoded import encode
from tests.support.tokenizers import CHATML, PLAIN, tiny_tokenizer

LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages and messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# As Zephyr's, the end of turn is the eos token, followed by a newline.
ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LAST_TURN_ONLY = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{{ message['content'] if loop.last or message['role'] == 'user' else '…' }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# Per template: what opens the text, a turn's opening, its end, what follows the end, and the assistant's name.
SHAPES = {
    "chatml": (CHATML, (), "", "<|im_start|>{role}\n", "<|im_end|>", "\n", "assistant"),
    "llama3": (
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|bos|>",
        "<|start_header_id|>{role}<|end_header_id|>\n\n",
        "<|eot_id|>",
        "",
        "assistant",
    ),
    "gemma": (
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        "<|bos|>",
        "<start_of_turn>{role}\n",
        "<end_of_turn>",
        "\n",
        "model",
    ),
    "zephyr": (
        ZEPHYR,
        ("<|user|>", "<|assistant|>", "<|system|>"),
        "",
        "<|{role}|>\n",
        "<|im_end|>",
        "\n",
        "assistant",
    ),
}

Messages = list[dict[str, str]]


def refusal(tokenizer: PreTrainedTokenizerFast, *rows: dict[str, Any], **fields: Any) -> str:
    with pytest.raises((DataError, ModelError)) as caught:
        encode(tokenizer, *rows, **fields)
    return str(caught.value)


def reference(tokenizer: PreTrainedTokenizerFast, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Ids and labels of text written by hand in pieces, each learned or not, tokenised piece by piece."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in pieces:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if learned else [-100] * len(piece)
    return ids, labels


def chat(*turns: str, system: str | None = None) -> Messages:
    """Alternating turns, the user's first."""
    roles = ("user", "assistant")
    opening = [{"role": "system", "content": system}] if system else []
    return opening + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def by_hand(shape: str, messages: Messages) -> list[tuple[str, bool]]:
    _, _, opening, header, end, after, assistant = SHAPES[shape]
    pieces = [(opening, False)]
    for message in messages:
        learned = message["role"] == "assistant"
        pieces.append((header.format(role=assistant if learned else message["role"]), False))
        pieces.append((message["content"] + end, learned))
        pieces.append((after, False))
    return pieces


def tokenizer_for(shape: str, **options: Any) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(SHAPES[shape][0], extra_special=SHAPES[shape][1], **options)


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize(
    "messages",
    [
        chat("What is it?", "It is four."),
        chat("One?", "Two.", "Three, and four?", "Yes.\n\nAnd five."),
        chat("é😀", "😀é", "again", "é"),
        chat("Hi.", "Hello.", "The last word is the user's."),
        [*chat("Twice?", "Once."), {"role": "assistant", "content": "Twice."}],
    ],
    ids=["single", "multi", "unicode", "user-last", "assistant-twice"],
)
def test_masks_match_what_is_written_by_hand(shape: str, messages: Messages, pad_is_eos: bool, add_bos: bool) -> None:
    """For each template, ids and labels equal the hand-written ones; pad == eos loses no token, bos is not doubled."""
    tokenizer = tokenizer_for(shape, pad_is_eos=pad_is_eos, add_bos=add_bos)
    encoded = encode(tokenizer, {"messages": messages})
    ids, labels = reference(tokenizer, by_hand(shape, messages))
    assert encoded.input_ids(0).tolist() == ids
    assert encoded.labels(0).tolist() == labels
    assert encoded.format == "messages"
    assert encoded.input_ids(0).dtype == encoded.labels(0).dtype == np.int64


def test_a_system_turn_is_not_learned() -> None:
    """What the system says is read and not learned."""
    tokenizer = tiny_tokenizer()
    messages = chat("What?", "That.", system="Be brief.")
    assert (
        encode(tokenizer, {"messages": messages}).labels(0).tolist()
        == reference(tokenizer, by_hand("chatml", messages))[1]
    )


CONTENT = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=40)


@given(turns=st.lists(CONTENT, min_size=2, max_size=7), shape=st.sampled_from(["chatml", "zephyr"]))
@settings(max_examples=120, deadline=None)
def test_what_is_learned_is_what_the_assistant_said(turns: list[str], shape: str) -> None:
    """Decoded, the supervised tokens are the assistant's turns each with its end, whatever was said around them."""
    tokenizer = tokenizer_for(shape, pad_is_eos=True)
    encoded = encode(tokenizer, {"messages": chat(*turns)})
    ids, labels = encoded.input_ids(0), encoded.labels(0)
    said = "".join(turn + "<|im_end|>" for turn in turns[1::2])
    assert tokenizer.decode(ids[labels != -100]) == said
    whole = tokenizer.apply_chat_template(chat(*turns), tokenize=False)
    assert tokenizer.decode(ids) == whole
    assert encoded.supervised_tokens == (labels != -100).sum()


@given(said=st.text("ab \n\t", min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_whitespace_of_an_answer_is_the_answers_own(said: str) -> None:
    """An answer's span holds all its whitespace and none of the template's, with an end marker or without."""
    for template, end in ((CHATML, "<|im_end|>"), (PLAIN, "")):
        messages = tuple(chat("Q", said, "Q", said))
        renderer = Renderer(tiny_tokenizer(template), today=datetime.date(2026, 1, 2))
        text, spans, _ = renderer.render(Conversation(messages), "row 1")[0]
        assert [text[start:stop] for start, stop in spans] == [said + end] * 2


def test_a_template_without_end_of_turn() -> None:
    """Where the template marks no end, the answer alone is learned."""
    tokenizer = tiny_tokenizer(PLAIN)
    encoded = encode(tokenizer, {"messages": chat("One?", "Two.", "Three?", "Four.")})
    assert tokenizer.decode(encoded.input_ids(0)) == "Q: One?\nA: Two.\nQ: Three?\nA: Four.\n"
    assert tokenizer.decode(encoded.input_ids(0)[encoded.labels(0) != -100]) == "Two.Four."


def test_an_empty_answer_teaches_its_end() -> None:
    """An assistant that says nothing is learned to say nothing, and the newline after it is not learned."""
    tokenizer = tiny_tokenizer()
    encoded = encode(tokenizer, {"messages": chat("Hush", "")})
    assert encoded.labels(0)[encoded.labels(0) != -100].tolist() == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "completion": "So."},
        {"instruction": "Why?", "output": "So."},
        {"instruction": "Why?", "input": "", "output": "So."},
    ],
)
def test_passages_become_chats(row: dict[str, str]) -> None:
    """With a chat template, a prompt and its completion are a user turn and the answer."""
    tokenizer = tiny_tokenizer()
    encoded = encode(tokenizer, row)
    ids, labels = reference(tokenizer, by_hand("chatml", chat("Why?", "So.")))
    assert encoded.input_ids(0).tolist() == ids
    assert encoded.labels(0).tolist() == labels


@pytest.mark.parametrize("add_bos", [False, True])
def test_passages_without_a_template(add_bos: bool) -> None:
    """Without a template, prompt and completion are joined as they are, and the completion is learned to its end."""
    tokenizer = tiny_tokenizer(None, add_bos=add_bos)
    encoded = encode(tokenizer, {"prompt": "Q:", "completion": " four"})
    bos = [(tokenizer.bos_token, False)] if add_bos else []
    ids, labels = reference(tokenizer, [*bos, ("Q:", False), (" four", True), ("<|im_end|>", True)])
    assert encoded.input_ids(0).tolist() == ids
    assert encoded.labels(0).tolist() == labels


def test_alpaca_without_a_template() -> None:
    """Without a template, Alpaca rows get Alpaca's prompt, and the output is learned to its end."""
    tokenizer = tiny_tokenizer(None)
    encoded = encode(tokenizer, {"instruction": "Add.", "input": "1 1", "output": "2"})
    text = tokenizer.decode(encoded.input_ids(0))
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n2<|im_end|>")
    assert tokenizer.decode(encoded.input_ids(0)[encoded.labels(0) != -100]) == "2<|im_end|>"


def test_a_token_across_the_boundary_is_learned() -> None:
    """A token that holds the end of the prompt and the start of the completion is learned."""
    tokenizer = tiny_tokenizer(None)
    joint = tokenizer("the answer", add_special_tokens=False)["input_ids"]
    encoded = encode(tokenizer, {"prompt": "the an", "completion": "swer"})
    assert encoded.input_ids(0).tolist() == [*joint, tokenizer.eos_token_id]
    learned = tokenizer.decode(encoded.input_ids(0)[encoded.labels(0) != -100])
    assert learned.endswith("swer<|im_end|>")
    assert len(learned) > len("swer<|im_end|>")


@pytest.mark.parametrize("add_bos", [False, True])
def test_text_is_learned_whole(add_bos: bool) -> None:
    """Text is learned to its end; its very first token, which nothing precedes, has no loss."""
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    encoded = encode(tokenizer, {"text": "the farmer has three apples"}, {"text": "the end<|im_end|>"})
    for i, text in enumerate(("the farmer has three apples<|im_end|>", "the end<|im_end|>")):
        expected = tokenizer(("<|bos|>" if add_bos else "") + text, add_special_tokens=False)["input_ids"]
        assert encoded.input_ids(i).tolist() == expected
        assert encoded.labels(i).tolist() == [-100, *expected[1:]]


def test_counts_agree_with_batches() -> None:
    """Lengths, tokens and supervised tokens are those of the batches that are made of the rows."""
    tokenizer = tiny_tokenizer()
    rows = [{"messages": chat("Q" * (i % 7), "The answer " * (i % 11))} for i in range(1, 1200)]
    encoded = encode(tokenizer, *rows)
    batch = collate(row_units(encoded), range(len(encoded)), tokenizer.pad_token_id)
    assert len(encoded) == 1199
    assert encoded.lengths.sum() == encoded.tokens == batch.tokens == int(batch.attention_mask.sum())
    assert encoded.supervised_tokens == batch.supervised_tokens
    assert [row + 1 for row in batch.rows] == encoded.row_numbers.tolist() == list(range(1, 1200))
    for i in (0, 511, 512, 1198):
        assert encoded.input_ids(i).tolist() == tokenizer.apply_chat_template(rows[i]["messages"])["input_ids"]


SHORT, LONG = {"text": "the end"}, {"text": "the end " * 10}


def test_overlong_rows_are_refused_by_default() -> None:
    """By default rows that are too long are counted, the longest is named, and the way out is said."""
    longer = {"text": "the end " * 20}
    length = encode(tiny_tokenizer(), longer).tokens
    assert refusal(tiny_tokenizer(), SHORT, LONG, longer, max_length=12) == (
        f"rows.jsonl: 2 of 3 rows are longer than dataset.max_length (12 tokens). The longest has {length} tokens: "
        "rows.jsonl, line 3. Raise dataset.max_length, or set dataset.overlong to drop or truncate."
    )


def test_overlong_rows_can_be_dropped() -> None:
    """Dropped rows are counted, the rest keep their numbers, and a limit that leaves no row is refused."""
    encoded = encode(tiny_tokenizer(), LONG, SHORT, LONG, SHORT, max_length=12, overlong="drop")
    assert (encoded.dropped, encoded.truncated, encoded.row_numbers.tolist()) == (2, 0, [2, 4])
    assert refusal(tiny_tokenizer(), LONG, LONG, max_length=12, overlong="drop") == (
        "rows.jsonl: all 2 rows are longer than dataset.max_length (12 tokens), so dataset.overlong: drop leaves none. "
        "Raise dataset.max_length."
    )


def test_overlong_rows_can_be_cut() -> None:
    """Cut rows keep their first max_length tokens; a row of exactly that length is left alone."""
    whole = encode(tiny_tokenizer(), LONG)
    encoded = encode(tiny_tokenizer(), SHORT, LONG, max_length=12, overlong="truncate")
    assert (encoded.dropped, encoded.truncated, len(encoded)) == (0, 1, 2)
    assert encoded.input_ids(1).tolist() == whole.input_ids(0)[:12].tolist()
    assert encode(tiny_tokenizer(), LONG, max_length=whole.tokens).truncated == 0


def test_cutting_away_all_that_is_learned_is_refused() -> None:
    """A row whose answer would be cut off entirely is never trained on in silence."""
    rows = [{"prompt": "the end " * 20, "completion": "x"}] * 6
    assert refusal(tiny_tokenizer(), {"prompt": "a", "completion": "b"}, *rows, max_length=30, overlong="truncate") == (
        "rows.jsonl: cut at dataset.max_length (30 tokens), 6 rows (line 2, 3, 4, 5, 6, …) would keep nothing to "
        "learn. Raise dataset.max_length, or set dataset.overlong to drop."
    )


def test_rows_without_anything_to_learn_are_refused() -> None:
    """A row in which no token has a loss is refused with its number."""
    assert refusal(tiny_tokenizer(), SHORT, {"text": ""}) == (
        "rows.jsonl: 1 row (line 2) has nothing to learn: no token has a loss."
    )
    assert refusal(tiny_tokenizer(), *[{"text": ""}] * 7) == (
        "rows.jsonl: 7 rows (line 1, 2, 3, 4, 5, …) have nothing to learn: no token has a loss."
    )


def test_tokens_outside_the_model_are_refused() -> None:
    """A token id that the model has no embedding for is refused before it reaches the model."""
    assert refusal(tiny_tokenizer(), {"text": "é the"}, {"text": "the"}, vocab_size=3).startswith(
        "rows.jsonl, line 1: the tokenizer gives the token "
    )
    assert encode(tiny_tokenizer(), SHORT, vocab_size=384).tokens > 0


def test_turns_that_a_template_rewrites_become_rows_of_their_own() -> None:
    """Each answer with the conversation up to it, as the model sees it then; the row is counted once."""
    tokenizer = tiny_tokenizer(LAST_TURN_ONLY)
    rows = [{"messages": chat("Zero?", "No.")}, {"messages": chat("One?", "Two.", "Three?", "Four.")}]
    encoded = encode(tokenizer, *rows)
    texts = [tokenizer.decode(encoded.input_ids(i)) for i in range(len(encoded))]
    said = [tokenizer.decode(encoded.input_ids(i)[encoded.labels(i) != -100]) for i in range(len(encoded))]
    assert texts == [
        "user: Zero?<|im_end|>assistant: No.<|im_end|>",
        "user: One?<|im_end|>assistant: Two.<|im_end|>",
        "user: One?<|im_end|>assistant: …<|im_end|>user: Three?<|im_end|>assistant: Four.<|im_end|>",
    ]
    assert said == ["No.<|im_end|>", "Two.<|im_end|>", "Four.<|im_end|>"]
    assert (encoded.split, encoded.row_numbers.tolist()) == (1, [1, 2, 2])
    assert encoded.counted(np.arange(3)) == "2 rows (line 1, 2)"


def test_conversations_that_the_template_refuses() -> None:
    """What a template raises is told with the row and the roles."""
    assert refusal(tokenizer_for("gemma"), {"messages": chat("x", "y", system="z")}) == (
        "rows.jsonl, line 1: the chat template refuses this conversation (system, user, assistant): "
        "System role not supported"
    )


def test_conversations_need_a_template() -> None:
    """Conversations are refused if the tokenizer has no chat template."""
    assert refusal(tiny_tokenizer(None), {"messages": chat("x", "y")}) == (
        "rows.jsonl, line 1: a conversation needs a chat template, and the tokenizer has none. "
        "Set dataset.chat_template, or use the format prompt_completion or text."
    )


def test_tokenizers_that_cannot_serve() -> None:
    """A tokenizer without character offsets, or plain text without an end token, is refused."""

    class SlowTokenizer:
        is_fast = False

    with pytest.raises(ModelError, match=r"^SlowTokenizer does not say which characters a token covers"):
        encode(SlowTokenizer(), SHORT)
    endless = tiny_tokenizer()
    endless.eos_token = None
    assert refusal(endless, SHORT).startswith("the tokenizer has no end-of-sequence token")


def test_mistakes_name_the_row(tmp_path: Path) -> None:
    """A bad row far into the data is named by its own number."""
    rows = [{"prompt": "a", "completion": "b"}] * 700 + [{"prompt": "a", "completion": None}]
    assert refusal(tiny_tokenizer(), *rows) == (
        "rows.jsonl, line 701: completion: expected text, got null.\n"
        "Mend the data, or set dataset.on_bad_row: skip to leave such rows out."
    )


def test_a_token_that_takes_the_whitespace_beside_it_is_learned_only_for_itself() -> None:
    """Phi-3's headers take the spaces that an answer begins with; they are headers all the same."""
    tokenizer = tiny_tokenizer(ZEPHYR.replace("eos_token", "'<|end|>'"))
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    tokens = [AddedToken(name, special=True, normalized=False, rstrip=True) for name in names]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    encoded = encode(tokenizer, {"messages": chat("a", "  b ", "c", "\n")})
    learned = encoded.input_ids(0)[encoded.labels(0) != -100]
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids(0).tolist()).count("<|assistant|>") == 2
    assert tokenizer.convert_ids_to_tokens(learned.tolist()) == ["b", "Ġ", "<|end|>", "<|end|>"]
