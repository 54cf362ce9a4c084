# ruff: noqa: RUF001  (DeepSeek's tokens are written with fullwidth bars)
"""Text and masks of well-known chat templates against what is written here by hand, token for token.

⟦ ⟧ stand around what is learned.
"""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from qlora_cli.data.chat import Renderer
from qlora_cli.errors import DataError
from tests.support.masks import (
    DAY,
    assistant,
    conversation,
    encode,
    ids_and_labels,
    render_marked,
    system,
    user,
)
from tests.support.templates import FAMILIES, family_tokenizer

ONE = [user("How many?"), assistant("Four.")]
SEVERAL = [*ONE, user("And now?"), assistant("Five apples.")]
SYSTEM = [system("Be brief."), *SEVERAL]
REFUSED: list[str] = []

# One exchange, two, and two after a system prompt; the sequences that each of them makes.
_CHATML_ONE = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n⟦Four.<|im_end|>⟧\n"
_CHATML_MORE = "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n⟦Five apples.<|im_end|>⟧\n"
_CHATML_SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
_CHATML = ([_CHATML_ONE], [_CHATML_ONE + _CHATML_MORE], [_CHATML_SYSTEM + _CHATML_ONE + _CHATML_MORE])
_QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen.<|im_end|>\n"
_SMOL_SYSTEM = "<|im_start|>system\nYou are SmolLM.<|im_end|>\n"
_LLAMA3_ONE = (
    "<|start_header_id|>user<|end_header_id|>\n\nHow many?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Four.<|eot_id|>⟧"
)
_LLAMA3_MORE = (
    "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Five apples.<|eot_id|>⟧"
)
_LLAMA3_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
_LLAMA3_PROMPT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_DATE = "<|start_header_id|>system<|end_header_id|>\n\nToday Date: 02 Jan 2026<|eot_id|>"
_TEXT = "<|begin_of_text|>"
_GEMMA_MORE = "<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n⟦Five apples.<end_of_turn>⟧\n"
_GEMMA_ONE = "<start_of_turn>user\nHow many?<end_of_turn>\n<start_of_turn>model\n⟦Four.<end_of_turn>⟧\n"
_TAGGED_NEWLINE_ONE = _CHATML_ONE + "\n"

BY_HAND: dict[str, tuple[list[str], list[str], list[str]]] = {
    "chatml": _CHATML,
    "llama-2": (
        ["<s>[INST] How many? [/INST]⟦ Four. </s>⟧"],
        ["<s>[INST] How many? [/INST]⟦ Four. </s>⟧<s>[INST] And now? [/INST]⟦ Five apples. </s>⟧"],
        [
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHow many? [/INST]⟦ Four. </s>⟧"
            "<s>[INST] And now? [/INST]⟦ Five apples. </s>⟧"
        ],
    ),
    "llama-3": (
        [_TEXT + _LLAMA3_ONE],
        [_TEXT + _LLAMA3_ONE + _LLAMA3_MORE],
        [_TEXT + _LLAMA3_SYSTEM + _LLAMA3_ONE + _LLAMA3_MORE],
    ),
    "llama-3-always": (
        [_TEXT + _LLAMA3_ONE + _LLAMA3_PROMPT],
        [_TEXT + _LLAMA3_ONE + _LLAMA3_MORE + _LLAMA3_PROMPT],
        [_TEXT + _LLAMA3_SYSTEM + _LLAMA3_ONE + _LLAMA3_MORE + _LLAMA3_PROMPT],
    ),
    "llama-3-dated": (
        [_TEXT + _DATE + _LLAMA3_ONE],
        [_TEXT + _DATE + _LLAMA3_ONE + _LLAMA3_MORE],
        [_TEXT + _DATE + _LLAMA3_SYSTEM + _LLAMA3_ONE + _LLAMA3_MORE],
    ),
    "mistral": (
        ["<s>[INST] How many? [/INST]⟦ Four.</s>⟧"],
        ["<s>[INST] How many? [/INST]⟦ Four.</s>⟧[INST] And now? [/INST]⟦ Five apples.</s>⟧"],
        REFUSED,
    ),
    # The system prompt moves on to the last turn of the user: a sequence for each answer.
    "mistral-v3": (
        ["<s>[INST] How many?[/INST]⟦ Four.</s>⟧"],
        ["<s>[INST] How many?[/INST]⟦ Four.</s>⟧[INST] And now?[/INST]⟦ Five apples.</s>⟧"],
        [
            "<s>[INST] Be brief.\n\nHow many?[/INST]⟦ Four.</s>⟧",
            "<s>[INST] How many?[/INST] Four.</s>[INST] Be brief.\n\nAnd now?[/INST]⟦ Five apples.</s>⟧",
        ],
    ),
    "gemma": (["<bos>" + _GEMMA_ONE], ["<bos>" + _GEMMA_ONE + _GEMMA_MORE], REFUSED),
    "gemma-3": (
        ["<bos>" + _GEMMA_ONE],
        ["<bos>" + _GEMMA_ONE + _GEMMA_MORE],
        [
            "<bos><start_of_turn>user\nBe brief.\n\nHow many?<end_of_turn>\n"
            "<start_of_turn>model\n⟦Four.<end_of_turn>⟧\n" + _GEMMA_MORE
        ],
    ),
    # The end of sequence, which stands at the very end alone, is learned there; an earlier turn ends without it.
    "phi-3": (
        ["<|user|>\nHow many?<|end|>\n<|assistant|>\n⟦Four.<|end|>\n<|endoftext|>⟧"],
        [
            "<|user|>\nHow many?<|end|>\n<|assistant|>\n⟦Four.<|end|>⟧\n"
            "<|user|>\nAnd now?<|end|>\n<|assistant|>\n⟦Five apples.<|end|>\n<|endoftext|>⟧"
        ],
        [
            "<|system|>\nBe brief.<|end|>\n<|user|>\nHow many?<|end|>\n<|assistant|>\n⟦Four.<|end|>⟧\n"
            "<|user|>\nAnd now?<|end|>\n<|assistant|>\n⟦Five apples.<|end|>\n<|endoftext|>⟧"
        ],
    ),
    "qwen-2.5": ([_QWEN_SYSTEM + _CHATML_ONE], [_QWEN_SYSTEM + _CHATML_ONE + _CHATML_MORE], _CHATML[2]),
    # Only the last answer has the empty block of reasoning that the model writes: a sequence for each answer.
    "qwen-3": (
        ["<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nFour.<|im_end|>⟧\n"],
        [
            "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nFour.<|im_end|>⟧\n",
            "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
            "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\n\n</think>\n\nFive apples.<|im_end|>⟧\n",
        ],
        [
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\n\n</think>\n\nFour.<|im_end|>⟧\n",
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
            "Four.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\n\n</think>\n\nFive apples.<|im_end|>⟧\n",
        ],
    ),
    "zephyr": (
        ["<|user|>\nHow many?</s>\n<|assistant|>\n⟦Four.</s>⟧\n"],
        [
            "<|user|>\nHow many?</s>\n<|assistant|>\n⟦Four.</s>⟧\n"
            "<|user|>\nAnd now?</s>\n<|assistant|>\n⟦Five apples.</s>⟧\n"
        ],
        [
            "<|system|>\nBe brief.</s>\n<|user|>\nHow many?</s>\n<|assistant|>\n⟦Four.</s>⟧\n"
            "<|user|>\nAnd now?</s>\n<|assistant|>\n⟦Five apples.</s>⟧\n"
        ],
    ),
    "deepseek-v2": (
        ["<｜begin▁of▁sentence｜>User: How many?\n\nAssistant:⟦ Four.<｜end▁of▁sentence｜>⟧"],
        [
            "<｜begin▁of▁sentence｜>User: How many?\n\nAssistant:⟦ Four.<｜end▁of▁sentence｜>⟧"
            "User: And now?\n\nAssistant:⟦ Five apples.<｜end▁of▁sentence｜>⟧"
        ],
        [
            "<｜begin▁of▁sentence｜>Be brief.\n\nUser: How many?\n\nAssistant:⟦ Four.<｜end▁of▁sentence｜>⟧"
            "User: And now?\n\nAssistant:⟦ Five apples.<｜end▁of▁sentence｜>⟧"
        ],
    ),
    "deepseek-v3": (
        ["<｜begin▁of▁sentence｜><｜User｜>How many?<｜Assistant｜>⟦Four.<｜end▁of▁sentence｜>⟧"],
        [
            "<｜begin▁of▁sentence｜><｜User｜>How many?<｜Assistant｜>⟦Four.<｜end▁of▁sentence｜>⟧"
            "<｜User｜>And now?<｜Assistant｜>⟦Five apples.<｜end▁of▁sentence｜>⟧"
        ],
        [
            "<｜begin▁of▁sentence｜>Be brief.<｜User｜>How many?<｜Assistant｜>⟦Four.<｜end▁of▁sentence｜>⟧"
            "<｜User｜>And now?<｜Assistant｜>⟦Five apples.<｜end▁of▁sentence｜>⟧"
        ],
    ),
    "deepseek-r1": (REFUSED, REFUSED, REFUSED),
    "smollm2": ([_SMOL_SYSTEM + _CHATML_ONE], [_SMOL_SYSTEM + _CHATML_ONE + _CHATML_MORE], _CHATML[2]),
    "tagged, with end": _CHATML,
    "tagged, without end": _CHATML,
    "tagged, with newline": (
        [_CHATML_ONE + "\n"],
        [_CHATML_ONE + "\n" + _CHATML_MORE + "\n"],
        ["<|im_start|>system\nBe brief.<|im_end|>\n" + _CHATML_ONE + "\n" + _CHATML_MORE + "\n"],
    ),
}


def test_every_family_is_written_by_hand() -> None:
    """None is left out below."""
    assert list(BY_HAND) == list(FAMILIES)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama-3-dated"])
@pytest.mark.parametrize(("case", "messages"), enumerate([ONE, SEVERAL, SYSTEM]), ids=["one", "several", "system"])
def test_ids_and_labels_are_those_written_by_hand(family: str, case: int, messages: list[dict[str, Any]]) -> None:
    """Through the whole of encoding, for one exchange, for two, and after a system prompt."""
    tokenizer = family_tokenizer(family)
    expected = BY_HAND[family][case]
    if not expected:
        with pytest.raises(DataError):
            encode(tokenizer, {"messages": messages})
        return
    encoded = encode(tokenizer, {"messages": messages})
    assert encoded.row_numbers.tolist() == [1] * len(expected)
    for i, text in enumerate(expected):
        ids, labels = ids_and_labels(tokenizer, text)
        assert encoded.input_ids(i).tolist() == ids
        assert encoded.labels(i).tolist() == labels


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(("case", "messages"), enumerate([ONE, SEVERAL, SYSTEM]), ids=["one", "several", "system"])
def test_texts_and_spans_are_those_written_by_hand(family: str, case: int, messages: list[dict[str, Any]]) -> None:
    """As rendered, before tokens."""
    expected = BY_HAND[family][case]
    if expected:
        assert render_marked(family_tokenizer(family), *messages) == expected


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama-3-dated"])
def test_the_text_is_the_tokenizers_own(family: str) -> None:
    """A row that is not split is what `apply_chat_template` writes; a split one ends in it."""
    tokenizer = family_tokenizer(family)
    for messages, expected in zip((ONE, SEVERAL, SYSTEM), BY_HAND[family], strict=True):
        if expected:
            last = Renderer(tokenizer, today=DAY).render(conversation(*messages), "")[-1]
            assert last.text == tokenizer.apply_chat_template(messages, tokenize=False)


def test_the_date_is_the_callers() -> None:
    """A template that writes today's date writes the day it is given, and what transformers writes on that day."""
    tokenizer = family_tokenizer("llama-3-dated")
    texts = {
        day: Renderer(tokenizer, today=datetime.date(2026, 1, day)).render(conversation(*ONE), "")[0].text
        for day in (2, 3)
    }
    assert "Today Date: 02 Jan 2026<" in texts[2]
    assert texts[3] == texts[2].replace("02 Jan", "03 Jan")
    for _ in range(2):  # midnight may pass between the two
        today = Renderer(tokenizer, today=datetime.date.today()).render(conversation(*ONE), "")[0].text
        if today == tokenizer.apply_chat_template(ONE, tokenize=False):
            break
    else:
        pytest.fail("transformers writes another text")
    assert Renderer(tokenizer, today=DAY).template().dated
    assert not Renderer(family_tokenizer("llama-3"), today=DAY).template().dated


def test_a_template_that_generates_what_it_does_not_write_is_refused_by_name() -> None:
    """DeepSeek-R1's opens a block of reasoning when it generates, and leaves it out of the conversation."""
    tokenizer = family_tokenizer("deepseek-r1")
    with pytest.raises(DataError) as caught:
        render_marked(tokenizer, *ONE)
    assert str(caught.value) == (
        "rows.jsonl, line 1: assistant turn 1: the chat template writes '<｜Assistant｜><think>\\n' when the model is "
        "to answer, and '<｜Assistant｜>Four.' in the conversation, so that an answer would be learned where the model "
        "never gives one. Set dataset.chat_template to a template that writes both alike, or has {% generation %}."
    )


TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}},)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}


def test_tools_calls_and_their_answers() -> None:
    """A call is learned as the assistant's, with what was said before it; tools and what they answer are not."""
    messages = (
        user("2+2?"),
        assistant("", tool_calls=[CALL, CALL]),
        {"role": "tool", "content": "4"},
        {"role": "tool", "content": "four"},
        assistant("It is 4."),
    )
    assert render_marked(family_tokenizer("qwen-2.5"), *messages, tools=TOOLS) == [
        "<|im_start|>system\nYou are Qwen.\n\n# Tools\n<tools>\n"
        '{"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}\n</tools><|im_end|>\n'
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>user\n<tool_response>\n4\n</tool_response>\n<tool_response>\nfour\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧\n"
    ]


def test_reasoning_is_learned_where_it_is_written() -> None:
    """Given apart or in the content, the reasoning of each answer is learned in the sequence that ends with it."""
    reasoned = [
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\nFour.<|im_end|>⟧\n",
        "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nwell\n</think>\n\nFive.<|im_end|>⟧\n",
    ]
    apart = (
        user("How many?"),
        assistant("Four.", reasoning_content="hm"),
        user("And now?"),
        assistant("Five.", reasoning_content="well"),
    )
    inside = (
        user("How many?"),
        assistant("<think>\nhm\n</think>\n\nFour."),
        user("And now?"),
        assistant("<think>\nwell\n</think>\n\nFive."),
    )
    assert render_marked(family_tokenizer("qwen-3"), *apart) == reasoned
    assert render_marked(family_tokenizer("qwen-3"), *inside) == reasoned


def test_reasoning_between_calls_needs_no_split() -> None:
    """Qwen 3 keeps the reasoning after the user's last turn, so that one sequence has every turn as it was written."""
    messages = (
        user("Q"),
        assistant("One.", reasoning_content="a"),
        {"role": "tool", "content": "T"},
        assistant("Two.", reasoning_content="b"),
    )
    assert render_marked(family_tokenizer("qwen-3"), *messages) == [
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦<think>\na\n</think>\n\nOne.<|im_end|>⟧\n"
        "<|im_start|>tool\nT<|im_end|>\n<|im_start|>assistant\n⟦<think>\nb\n</think>\n\nTwo.<|im_end|>⟧\n"
    ]


def test_only_the_last_answer() -> None:
    """`last_assistant` learns one turn, in one sequence that ends with it, however the template writes the others."""
    more = (*SYSTEM, user("Bye."))
    for family, system_row in (("chatml", _CHATML_SYSTEM), ("qwen-3", _CHATML_SYSTEM)):
        (text,) = render_marked(family_tokenizer(family), *more, supervise="last_assistant")
        think = "<think>\n\n</think>\n\n" if family == "qwen-3" else ""
        assert text == (
            system_row + "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
            f"<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n⟦{think}Five apples.<|im_end|>⟧\n"
        )


def test_everything_is_learned() -> None:
    """`everything` learns the whole text to its last end of turn, but no generation prompt that nothing follows."""
    (text,) = render_marked(family_tokenizer("chatml"), *ONE, supervise="everything")
    assert text == "⟦<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>⟧\n"
    (text,) = render_marked(family_tokenizer("llama-3-always"), *ONE, supervise="everything")
    assert text.startswith("⟦<|begin_of_text|>")
    assert text.endswith("Four.<|eot_id|>⟧" + _LLAMA3_PROMPT)
