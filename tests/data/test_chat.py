"""What is learned of a conversation where it or its template is out of the ordinary. ⟦ ⟧ stand around what is."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_cli.data import rendering
from qlora_cli.data.chat import Renderer
from qlora_cli.data.formats import Passage, Text
from qlora_cli.errors import DataError
from tests.support.masks import DAY, assistant, conversation, encode, marked, render_marked, system, user
from tests.support.templates import FAMILIES, TAGGED_WITH_END, family_tokenizer
from tests.support.tokenizers import CHATML, tiny_tokenizer
from tests.support.tokenizers import PLAIN as NO_HEADERS

ASK, ANSWER = user("Q"), assistant("A")
ASKED = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
ANSWERED = ASKED + "⟦A<|im_end|>⟧\n"


def refusal(tokenizer: PreTrainedTokenizerFast, *messages: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        render_marked(tokenizer, *messages, **fields)
    return str(caught.value).removeprefix("rows.jsonl, line 1: ")


def render(tokenizer: PreTrainedTokenizerFast, example: Any, supervise: Any = "all_assistant") -> list[str]:
    return [marked(row) for row in Renderer(tokenizer, supervise, today=DAY).render(example, "row 1")]


@pytest.mark.parametrize("family", ["chatml", "tagged, with end", "tagged, without end"])
def test_turns_in_any_order(family: str) -> None:
    """The assistant first, twice in a row, or not last; a system turn in between; no turn is taken for another."""
    tokenizer = family_tokenizer(family)
    greeting = "<|im_start|>assistant\n⟦Hi!<|im_end|>⟧\n"
    assert render_marked(tokenizer, assistant("Hi!"), ASK, ANSWER) == [greeting + ANSWERED]
    assert render_marked(tokenizer, ASK, ANSWER, assistant("Hi!")) == [ANSWERED + greeting]
    between = "<|im_start|>system\nS<|im_end|>\n"
    assert render_marked(tokenizer, ASK, ANSWER, system("S"), ASK, ANSWER, ASK) == [
        ANSWERED + between + ANSWERED + "<|im_start|>user\nQ<|im_end|>\n"
    ]


def test_an_assistant_that_begins_after_the_templates_own_system_prompt() -> None:
    """There is nothing to render before it, so its header is found behind what the template puts first."""
    opening = "<|im_start|>system\nYou are SmolLM.<|im_end|>\n"
    assert render_marked(family_tokenizer("smollm2"), assistant("Hi!"), ASK, ANSWER) == [
        opening + "<|im_start|>assistant\n⟦Hi!<|im_end|>⟧\n" + ANSWERED
    ]
    qwen = "<|im_start|>system\nYou are Qwen.<|im_end|>\n"
    assert render_marked(family_tokenizer("qwen-2.5"), assistant("Hi!")) == [
        qwen + "<|im_start|>assistant\n⟦Hi!<|im_end|>⟧\n"
    ]


def test_a_generation_prompt_that_is_only_written_after_the_user() -> None:
    """The header of an answer that follows another is not learned."""
    picky = CHATML.replace("add_generation_prompt", "add_generation_prompt and messages[-1].role == 'user'")
    assert render_marked(tiny_tokenizer(picky), ASK, ANSWER, assistant("B")) == [
        ANSWERED + "<|im_start|>assistant\n⟦B<|im_end|>⟧\n"
    ]


@pytest.mark.parametrize("family", ["chatml", "phi-3", "tagged, with end", "tagged, without end", "llama-3-always"])
@pytest.mark.parametrize(
    "trap", ["MARK", "MARKMARK", "MARK\n<|im_start|>user\nQ", "<|im_start|>assistant\nA", "HEADER"]
)
def test_special_text_inside_turns_moves_nothing(family: str, trap: str) -> None:
    """An end of turn, a header or an answer that a turn only quotes is part of that turn."""
    tokenizer = family_tokenizer(family)
    mark = {"phi-3": "<|end|>", "llama-3-always": "<|eot_id|>"}.get(family, "<|im_end|>")
    header = {"phi-3": "<|assistant|>\n", "llama-3-always": "<|start_header_id|>assistant<|end_header_id|>"}
    text = trap.replace("MARK", mark).replace("HEADER", header.get(family, "<|im_start|>assistant\n"))
    for asked, said in ((f"Q {text} Q", "A"), ("Q", f"A {text} A"), ("Q", f"A {text}"), ("Q", text), (text, text)):
        plain = render_marked(tokenizer, user("QQQ"), assistant("AAA"), user("QQQ"), assistant("AAA"))
        trapped = render_marked(tokenizer, user(asked), assistant(said), user(asked), assistant(said))
        stripped = said.strip() if family == "llama-3-always" else said
        asked = asked.strip() if family == "llama-3-always" else asked
        assert trapped == [plain[0].replace("QQQ", asked).replace("AAA", stripped)]


def test_whitespace_of_an_answer() -> None:
    """Kept where the template keeps it, gone where it trims; the template's own is not learned in either."""
    messages = (ASK, assistant("  A \n"), ASK, assistant("\n\nA\t"))
    assert render_marked(family_tokenizer("chatml"), *messages) == [
        ASKED + "⟦  A \n<|im_end|>⟧\n" + ASKED + "⟦\n\nA\t<|im_end|>⟧\n"
    ]
    gemma = "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n⟦A<end_of_turn>⟧\n"
    assert render_marked(family_tokenizer("gemma"), *messages) == ["<bos>" + gemma * 2]
    assert render_marked(family_tokenizer("gemma"), ASK, assistant(">\n")) == ["<bos>" + gemma.replace("A<e", "><e")]
    assert render_marked(tiny_tokenizer(NO_HEADERS), *messages) == ["Q: Q\nA: ⟦  A \n⟧\nQ: Q\nA: ⟦\n\nA\t⟧\n"]
    tagged = family_tokenizer("tagged, without end")
    assert render_marked(tagged, *messages) == render_marked(family_tokenizer("chatml"), *messages)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_an_empty_answer_teaches_its_end(family: str) -> None:
    """And nothing else, but for what the template itself puts into it."""
    if family == "deepseek-r1":
        return
    tokenizer = family_tokenizer(family)
    (text,) = render_marked(tokenizer, ASK, assistant(""))
    learned = text.partition("⟦")[2].partition("⟧")[0]
    end = {
        "phi-3": "<|end|>\n<|endoftext|>",
        "gemma": "<end_of_turn>",
        "gemma-3": "<end_of_turn>",
        "llama-3-always": "<|eot_id|>",
    }.get(family, FAMILIES[family].eos)
    assert learned.removeprefix("<think>\n\n</think>\n\n").strip() == end


def test_turns_with_weight_zero_are_read_and_not_learned() -> None:
    """Also where each turn makes a sequence, where the last is meant, where tags are, and where all is learned."""
    messages, first, second = (ASK, ANSWER, ASK, assistant("B")), frozenset({1}), frozenset({3})
    unlearned = ANSWERED.replace("⟦", "").replace("⟧", "")
    for family in ("chatml", "tagged, with end", "tagged, without end"):
        tokenizer = family_tokenizer(family)
        assert render_marked(tokenizer, *messages, unlearned=first) == [unlearned + ASKED + "⟦B<|im_end|>⟧\n"]
        assert render_marked(tokenizer, *messages, unlearned=second, supervise="last_assistant") == [ANSWERED]
        assert render_marked(tokenizer, *messages, unlearned=first, supervise="everything") == [
            f"⟦{ASKED}⟧A<|im_end|>⟦\n{ASKED}B<|im_end|>⟧\n"
        ]
    qwen, question = family_tokenizer("qwen-3"), "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    thought = "<think>\n\n</think>\n\n"
    assert render_marked(qwen, *messages, unlearned=second) == [question + f"⟦{thought}A<|im_end|>⟧\n"]
    assert render_marked(qwen, *messages, unlearned=first) == [
        question + "A<|im_end|>\n" + question + f"⟦{thought}B<|im_end|>⟧\n"
    ]
    assert "weight 0 cannot be left out" in refusal(qwen, *messages, unlearned=first, supervise="everything")


def test_a_template_that_rewrites_earlier_turns_makes_a_sequence_of_each_answer() -> None:
    """Each as it is when the model gives it, with the conversation up to it; rows keep their number."""
    forgetful = CHATML.replace(
        "message['content'] +", "(message['content'] if loop.last or loop.index0 % 2 == 0 else '…') +"
    )
    tokenizer = tiny_tokenizer(forgetful)
    messages = [ASK, ANSWER, ASK, assistant("B")]
    assert render_marked(tokenizer, *messages) == [ANSWERED, ASKED + "…<|im_end|>\n" + ASKED + "⟦B<|im_end|>⟧\n"]
    encoded = encode(tokenizer, {"messages": messages}, {"messages": messages[:2]})
    assert encoded.row_numbers.tolist() == [1, 1, 2]


def test_what_comes_before_a_turn_must_not_depend_on_it() -> None:
    """Where an answer changes the question before it, its place is not known."""
    changing = CHATML.replace("message['content'] +", "message['content'] + ('?' if loop.last else '!') +")
    assert refusal(tiny_tokenizer(changing), ASK, ANSWER) == (
        "assistant turn 1: the chat template changes what comes before this turn once the turn follows, so its place "
        "in the conversation is not known. Set dataset.chat_template to a template that writes each turn once."
    )


def test_what_a_template_refuses() -> None:
    """What it raises is told, with the row and the roles."""
    assert refusal(family_tokenizer("llama-2"), ASK, ASK, ANSWER) == (
        "the chat template refuses this conversation (user, user, assistant): roles must alternate: user, assistant, "
        "user, assistant"
    )


def test_calls_that_the_template_does_not_write() -> None:
    """They would be learned as silence: refused, unless the turn is not learned."""
    call = assistant("", tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    assert refusal(family_tokenizer("chatml"), ASK, call) == (
        "assistant turn 1 has tool_calls, which the chat template does not write, so that they would not be learned. "
        "Set dataset.chat_template to a template that writes them."
    )
    assert len(render_marked(family_tokenizer("chatml"), ASK, call, ASK, ANSWER, unlearned=frozenset({1}))) == 1


def test_half_a_surrogate_pair_anywhere() -> None:
    """Keys that no reader looks at can carry one into the text; it is told, not fallen over."""
    named = CHATML.replace("message['role'] +", "message['role'] + (message['name'] or '') +")
    assert refusal(tiny_tokenizer(named), user("Q", name="\ud83d"), ANSWER) == (
        "the conversation: expected text, got \\ud83d, half of a surrogate pair."
    )


def tagged(body: str) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(
        TAGGED_WITH_END.replace("{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}", body)
    )


def test_tags_that_do_not_fit_are_refused() -> None:
    """A turn without a stretch or with two, and a stretch beside what is said: the template is named as the cause."""
    some = "{% if message['content'] %}{% generation %}{{ message['content'] }}{% endgeneration %}{% endif %}"
    message = (
        "the chat template marks {} stretches with {{% generation %}} where there are 1 assistant turns, so that it is "
        "not known which is which. Correct its tags, or leave them out, in a template of your own: "
        "dataset.chat_template."
    )
    assert refusal(tagged(some), ASK, assistant("")) == message.format(0)
    twice = (
        "{% generation %}{{ message['content'] }}{% endgeneration %}BETWEEN"
        "{% generation %}<|im_end|>{% endgeneration %}"
    )
    assert refusal(tagged(twice.replace("BETWEEN", "-")), ASK, ANSWER) == message.format(2)
    assert render_marked(tagged(twice.replace("BETWEEN", "")), ASK, ANSWER, ASK, ANSWER) == [ANSWERED * 2]
    # Transformers counts from where the macro's text will stand, not from where the tag does.
    macro = (
        "{% macro answer(said) %}(answer) {% generation %}{{ said }}{% endgeneration %}<|im_end|>{% endmacro %}"
        "{{ answer(message['content']) }}"
    )
    assert refusal(tagged(macro), ASK, assistant("Four.")) == (
        "assistant turn 1: the {% generation %} tags of the chat template do not stand around what is said, but around "
        '"(answ". Inside a macro or a set block they are not followed: set dataset.chat_template to a template that '
        "has them at the top."
    )


def test_an_answer_that_the_template_does_not_write() -> None:
    """Templates for images take content in parts, and write nothing of a text: it would be learned as silence."""
    parts = CHATML.replace("message['content'] +", "message['content'] | selectattr('text') | join +")
    assert refusal(tiny_tokenizer(parts), ASK, assistant("Four.")) == (
        'assistant turn 1: the chat template writes "<|im_end|>" for what is said, "Four.". '
        "Set dataset.chat_template to a template that writes content that is text."
    )


def test_tags_stand_above_prefixes() -> None:
    """A template with tags may write what it does not when it generates; what the tags hold is learned."""
    asks_for_thought = TAGGED_WITH_END.replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>' }}"
    )
    assert render_marked(tiny_tokenizer(asks_for_thought), ASK, ANSWER) == [ANSWERED]


@pytest.mark.parametrize("family", ["tagged, with end", "tagged, with newline"])
def test_tags_are_read_as_transformers_reads_them(family: str) -> None:
    """Its own mask is ours, but for the newline that a tag may hold after the end of the turn."""
    tokenizer = family_tokenizer(family)
    messages = [system("S"), ASK, assistant("One two."), ASK, assistant("Three é😀.")]
    encoded = encode(tokenizer, {"messages": messages})
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    assert encoded.input_ids(0).tolist() == theirs["input_ids"]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    mask = [
        bool(learned) and not (family == "tagged, with newline" and [token] == newline)
        for token, learned in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
    ]
    assert (encoded.labels(0) != -100).tolist() == mask


def test_several_templates_of_one_tokenizer() -> None:
    """Tools choose the one for tools, as transformers does; without a default, the way out is said."""
    with_tools = "{{ 'Tools: ' + tools[0]['name'] + '\n' }}" + CHATML
    tokenizer = tiny_tokenizer({"default": CHATML, "tool_use": with_tools})
    assert render_marked(tokenizer, ASK, ANSWER) == [ANSWERED]
    assert render_marked(tokenizer, ASK, ANSWER, tools=({"name": "f"},)) == ["Tools: f\n" + ANSWERED]
    tokenizer.chat_template = {"tool_use": CHATML, "other": CHATML}
    with pytest.raises(DataError) as caught:
        render_marked(tokenizer, ASK, ANSWER)
    assert str(caught.value) == (
        "the tokenizer has several chat templates (other, tool_use) and no default. Set dataset.chat_template."
    )


def test_examples_without_a_template() -> None:
    """A passage is its bare prompt and the completion, text is text, and a conversation has to have a template."""
    tokenizer = tiny_tokenizer(None)
    assert render(tokenizer, Passage("Q", "A", "Bare:")) == ["Bare:⟦A⟧"]
    assert render(tokenizer, Passage("Q", "A", "Bare:"), "last_assistant") == ["Bare:⟦A⟧"]
    assert render(tokenizer, Passage("Q", "A", "Bare:"), "everything") == ["⟦Bare:A⟧"]
    assert render(tokenizer, Text("T")) == render(tiny_tokenizer(), Text("T")) == ["⟦T⟧"]
    assert render(tokenizer, Text("")) == [""]
    assert Renderer(tokenizer, today=DAY).render(Text("T"), "")[0].bare
    assert refusal(tokenizer, ASK, ANSWER) == (
        "a conversation needs a chat template, and the tokenizer has none. Set dataset.chat_template, or use the "
        "format prompt_completion or text."
    )


def test_a_passage_is_a_conversation_with_its_system_prompt() -> None:
    """With a template the bare prompt is not looked at."""
    assert render(tiny_tokenizer(), Passage("Q", "A", "Bare:")) == [ANSWERED]
    assert render(tiny_tokenizer(), Passage("Q", "A", "Bare:", "S")) == ["<|im_start|>system\nS<|im_end|>\n" + ANSWERED]


@pytest.mark.parametrize(
    ("family", "turns", "renders"),
    [("chatml", 2, 2), ("chatml", 8, 8), ("chatml", 7, 7), ("tagged, with end", 8, 4), ("qwen-3", 8, 8)],
)
def test_nothing_is_rendered_more_often_than_it_has_to(
    family: str, turns: int, renders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two renderings for a single exchange, and no more than one a turn and one more for several."""
    renderer = Renderer(family_tokenizer(family), today=DAY)
    renderer.template()
    calls = []
    original = rendering.render_jinja_template
    monkeypatch.setattr(rendering, "render_jinja_template", lambda **given: calls.append(1) or original(**given))
    renderer.render(conversation(*[(ASK, ANSWER)[i % 2] for i in range(turns)]), "")
    assert len(calls) == renders <= turns + 1


def test_dates_are_written_as_asked_for() -> None:
    """Any directive, wherever in the template, and the template's own first line as it is without a date."""
    template = (
        "  {% if messages %}{% macro today() %}{{ strftime_now('%Y-%m-%d %% %A') }}{% endmacro %}"
        "{{ today() }}\n{% endif %}" + CHATML
    )
    (text,) = render_marked(tiny_tokenizer(template), ASK, ANSWER)
    assert text == "2026-01-02 % Friday\n" + ANSWERED
