"""The model answers as lm-eval's `hf` backend does, asks nothing twice, and says what was cut."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.events import Asking, Remark
from qlora_cli.evaluation.scoring import AnsweringModel
from qlora_cli.evaluation.store import AnswerStore
from tests.support.models import FAMILIES, tiny_model
from tests.support.small_tasks import phrase, request
from tests.support.tokenizers import BOS, tiny_tokenizer


def made(family: str = "llama", **tokenizer: Any) -> tuple[Any, Any]:
    """A tiny model that stops at its tokenizer's end."""
    words = tiny_tokenizer(**tokenizer)
    model = tiny_model(family, vocab_size=len(words))
    model.generation_config.eos_token_id = words.eos_token_id
    return model, words


def heard(model: Any, tokenizer: Any, **options: Any) -> tuple[AnsweringModel, list[Asking | Remark]]:
    told: list[Asking | Remark] = []
    return AnsweringModel(model, tokenizer, report=told.append, **options), told


def remarks(told: list[Asking | Remark]) -> list[str]:
    return [event.text for event in told if isinstance(event, Remark)]


def choices(seed: int, documents: int = 8) -> list[Instance]:
    """Multiple-choice questions: shared beginnings, empty and overlong contexts, choices of one token and of more."""
    draw = random.Random(seed)
    contexts = ["", phrase(1, 3), phrase(2, 300), phrase(3, 40) + "  ", BOS + phrase(4), phrase(5, 40) + phrase(6, 9)]
    return [
        request("loglikelihood", context, " " + phrase(draw.randrange(99), draw.randint(1, 3)), document=document)
        for document in range(documents)
        for context in [draw.choice(contexts)]
        for _ in range(3)
    ]


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_the_hf_backend(family: str, add_bos: bool) -> None:
    """Log-likelihoods of continuations and of whole texts within 1e-4, the same greedy flags, the same writing."""
    model, tokenizer = made(family, add_bos=add_bos)
    oracle = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    lm, _ = heard(model, tokenizer)

    asked = choices(seed=len(family))
    expected, found = oracle.loglikelihood(asked, disable_tqdm=True), lm.loglikelihood(asked)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]

    texts = [request("loglikelihood_rolling", text) for text in (phrase(1, 2), phrase(2, 300), "", phrase(3, 700))]
    rolling = oracle.loglikelihood_rolling(texts, disable_tqdm=True)
    # In windows: one bound for each.
    assert lm.loglikelihood_rolling(texts) == pytest.approx(rolling, abs=4e-4)

    prompts = [
        request("generate_until", text, {"until": until, "max_gen_toks": most, **more})
        for text, until, most, more in (
            (phrase(1, 2), ["the", " of"], 10, {}),
            (phrase(2, 300), [" a", "\n\n"], 50, {"do_sample": False, "temperature": 0.0}),
            (BOS + phrase(3, 9), "\n", 20, {"temperature": 0.7, "do_sample": False}),
            (phrase(4, 9), [], 5, {}),
        )
    ]
    assert lm.generate_until(prompts) == oracle.generate_until(prompts, disable_tqdm=True)


def test_arguments_of_generate_are_followed() -> None:
    """What lm-eval passes on to transformers' `generate` counts, beams and penalties among it."""
    model, tokenizer = made()
    oracle = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    lm, _ = heard(model, tokenizer)
    for more in ({"num_beams": 3}, {"repetition_penalty": 1.5}, {"num_beams": 1}, {"max_length": 40}):
        asked = [request("generate_until", phrase(n, 4), {"until": [], "max_gen_toks": 8, **more}) for n in range(3)]
        assert lm.generate_until(asked) == oracle.generate_until(asked, disable_tqdm=True), more


class Counting:
    """Counts the tokens that a model reads."""

    def __init__(self, model: Any) -> None:
        self.tokens = 0
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens += kwargs["input_ids"].numel()


def everything(lm: AnsweringModel) -> list[Any]:
    """All kinds of questions."""
    texts = [request("loglikelihood_rolling", phrase(number, 300)) for number in range(3)]
    prompts = [request("generate_until", phrase(n, 6), {"until": [" the"], "max_gen_toks": 9}) for n in range(5)]
    return [lm.loglikelihood(choices(3)), lm.loglikelihood_rolling(texts), lm.generate_until(prompts)]


def test_kept_answers_are_not_asked_again(tmp_path: Path) -> None:
    """A second start computes nothing, gives the same bits, and says that they were kept."""
    model, tokenizer = made()
    lm, _ = heard(model, tokenizer, store=AnswerStore(tmp_path, "model"))
    first = everything(lm)
    assert lm.kept == 0
    counting = Counting(model)
    again, told = heard(model, tokenizer, store=AnswerStore(tmp_path, "model"))
    assert everything(again) == first
    assert counting.tokens == 0
    assert again.kept == again.asked == lm.asked
    progress = [event for event in told if isinstance(event, Asking)]
    assert {event.kind for event in progress} == {"loglikelihood", "loglikelihood_rolling", "generate_until"}
    assert all(event.kept == event.answered == event.questions for event in progress)


def test_texts_are_not_kept_for_a_tokenizer_that_reads_them_otherwise(tmp_path: Path) -> None:
    """Which tokens are special, and are left out of an answer, is no matter of the vocabulary's files."""
    model, tokenizer = made()
    asked = [request("generate_until", phrase(n, 6), {"until": [], "max_gen_toks": 12}) for n in range(3)]
    first = heard(model, tokenizer, store=AnswerStore(tmp_path, "model"))[0].generate_until(asked)
    token = tokenizer.encode(first[0], add_special_tokens=False)[0]
    tokenizer.add_special_tokens({"extra_special_tokens": [tokenizer.convert_ids_to_tokens(token)]})
    again, _ = heard(model, tokenizer, store=AnswerStore(tmp_path, "model"))
    fresh, _ = heard(model, tokenizer)
    assert again.generate_until(asked) == fresh.generate_until(asked) != first
    assert again.kept == 0


def test_what_a_kill_left_is_gone_on_with(tmp_path: Path) -> None:
    """An evaluation that dies in the middle: what had been answered is there, the rest is asked, nothing is lost."""
    model, tokenizer = made()
    whole = everything(heard(model, tokenizer)[0])
    half = AnsweringModel(model, tokenizer, batch_size=1, store=AnswerStore(tmp_path, "model"), report=lambda _: None)
    prompts = [request("generate_until", phrase(n, 6), {"until": [" the"], "max_gen_toks": 9}) for n in range(5)]
    half.loglikelihood(choices(3)[:7])
    half.generate_until(prompts[:2])
    lm, told = heard(model, tokenizer, store=AnswerStore(tmp_path, "model"))
    found = everything(lm)
    assert [value for value, _ in found[0]] == pytest.approx([value for value, _ in whole[0]], abs=1e-5)
    assert found[2] == whole[2]
    assert lm.kept >= 9
    last = {event.kind: event for event in told if isinstance(event, Asking)}
    assert last["generate_until"].kept == 2
    assert all(event.answered == event.questions for event in last.values())


def test_an_error_in_the_middle_keeps_what_was_answered(tmp_path: Path) -> None:
    """Ctrl-C, or a report that fails: answers that were there before are on disk."""
    model, tokenizer = made()

    def stop(event: Asking | Remark) -> None:
        if isinstance(event, Asking) and event.answered:
            raise KeyboardInterrupt

    lm = AnsweringModel(model, tokenizer, batch_size=1, store=AnswerStore(tmp_path, "model"), report=stop)
    with pytest.raises(KeyboardInterrupt):
        lm.loglikelihood(choices(3, documents=40))
    again, _ = heard(model, tokenizer, store=AnswerStore(tmp_path, "model"))
    again.loglikelihood(choices(3, documents=40))
    assert again.kept > 0


def test_equal_questions_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same questions twice, each reaches the model once, and every one of them is answered."""
    model, tokenizer = made()
    once = heard(model, tokenizer)[0].loglikelihood(asked := choices(3))
    lm, _ = heard(model, tokenizer)
    reached: list[int] = []
    score = lm._scorer.score

    def counting(some: Any, progress: Any) -> Any:
        reached.append(len(some))
        return score(some, progress)

    monkeypatch.setattr(lm._scorer, "score", counting)
    assert lm.loglikelihood([*asked, *asked]) == [*once, *once]
    assert reached == [len({request.args for request in asked})]


class _Watched(AnswerStore):
    """Counts how often it is asked to keep up."""

    times = 0

    def keep_up(self) -> None:
        self.times += 1
        super().keep_up()


def test_answers_that_came_together_do_not_wait_for_the_next(tmp_path: Path) -> None:
    """The store is asked to keep up with every token, not with every answer only."""
    model, tokenizer = made()
    store = _Watched(tmp_path, "model")
    lm, _ = heard(model, tokenizer, store=store)
    asked = [request("generate_until", phrase(n, 5), {"until": [], "max_gen_toks": 20}) for n in range(4)]
    lm.generate_until(asked)
    assert store.times > 20 + len(asked)


def test_drawn_answers_are_drawn_each_time(tmp_path: Path) -> None:
    """Sampling: repeats differ, nothing of it is kept, and the seed decides it."""
    model, tokenizer = made()
    asked = [
        request("generate_until", phrase(1), {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0})
    ]
    first, _ = heard(model, tokenizer, store=AnswerStore(tmp_path, "model"))
    answers = first.generate_until(asked * 4)
    assert len(set(answers)) > 1
    same, _ = heard(model, tokenizer, store=AnswerStore(tmp_path, "model"))
    assert same.generate_until(asked * 4) == answers
    assert same.kept == 0
    other, _ = heard(model, tokenizer, seed=7)
    assert other.generate_until(asked * 4) != answers


def test_drawing_at_temperature_zero_is_greedy_and_told() -> None:
    """The hf backend fails on it; there is only one answer to choose from."""
    model, tokenizer = made()
    lm, told = heard(model, tokenizer)
    terms = {"until": [], "max_gen_toks": 6}
    asked = [request("generate_until", phrase(1), {**terms, "do_sample": True}, task="quiz")]
    greedy = [request("generate_until", phrase(1), {**terms, "do_sample": False})]
    assert lm.generate_until(asked) == lm.generate_until(greedy)
    assert remarks(told) == ["quiz wants answers drawn at random, at temperature 0: they are greedy"]


def test_what_was_cut_is_counted_and_told() -> None:
    """The hf backend logs it; here it is said once, with the tasks, and is part of the record."""
    model, tokenizer = made()
    lm, told = heard(model, tokenizer, max_length=20)
    long, short = phrase(1, 60), phrase(2, 3)
    cut = len(tokenizer.encode(long + " the")) - 21
    asked = [
        request("loglikelihood", text, " the", task=task) for text, task in ((long, "a"), (short, "b"), (long, "b"))
    ]
    lm.loglikelihood([*asked, asked[0]])
    assert lm.cut == {"a": 1, "b": 1}
    assert remarks(told) == [
        f"2 questions are longer than the model's context of 20 tokens and lost their beginning, up to {cut} "
        "tokens of it: a (1), b (1)"
    ]


def test_a_continuation_that_does_not_fit_is_refused() -> None:
    """Neither a part of an answer nor none of it is scored in its place."""
    model, tokenizer = made()
    lm, _ = heard(model, tokenizer, max_length=8)
    with pytest.raises(EvaluationError, match=r"^quiz, document 3: expected an answer to score of at least one token"):
        lm.loglikelihood([request("loglikelihood", "the", phrase(1, 30), task="quiz", document=3)])
    with pytest.raises(EvaluationError, match=r"got none: ''$"):
        lm.loglikelihood([request("loglikelihood", "the", "", task="quiz")])


def test_an_answer_longer_than_the_context_is_refused() -> None:
    """As the hf backend does, but in words that say which task and what to do."""
    model, tokenizer = made()
    lm, _ = heard(model, tokenizer)
    with pytest.raises(EvaluationError) as caught:
        lm.generate_until([request("generate_until", "the", {"until": []}, task="essay", document=2)])
    assert str(caught.value) == (
        "essay, document 2: it wants answers of up to 256 tokens, and the model's context, prompt and answer together, "
        "is 256. Leave this task out, or lower max_gen_toks in its generation_kwargs"
    )


def test_a_model_in_training_is_scored_in_eval_mode_and_left_in_training() -> None:
    """Dropout plays no part, modules that were in eval mode stay so, and no gradient is computed."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2", vocab_size=len(tokenizer))  # it has dropout
    expected = heard(model, tokenizer)[0].loglikelihood(choices(1))
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert heard(model, tokenizer)[0].loglikelihood(choices(1)) == expected
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_tells_questions_and_tokens() -> None:
    """From nothing to everything, never backwards."""
    model, tokenizer = made()
    lm, told = heard(model, tokenizer)
    everything(lm)
    for kind, questions in (("loglikelihood", 24), ("loglikelihood_rolling", 3), ("generate_until", 5)):
        events = [event for event in told if isinstance(event, Asking) and event.kind == kind]
        assert (events[0].answered, events[-1].answered) == (0, questions)
        assert {event.questions for event in events} == {questions}
        answered = [event.answered for event in events]
        assert answered == sorted(answered)
        assert events[-1].tokens == events[-1].all_tokens > 0


def test_conversations_are_rendered_as_the_hf_backend_renders_them() -> None:
    """A template that refuses a system message gets the conversation without it, which is told."""
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    model, tokenizer = made()
    plain = tokenizer.chat_template
    oracle = HFLM(pretrained=model, tokenizer=tokenizer)
    lm, told = heard(model, tokenizer)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    for generation_prompt in (True, False):
        conversation = talk if generation_prompt else [*talk, {"role": "assistant", "content": "Yes"}]
        expected = oracle.apply_chat_template(conversation, generation_prompt)
        assert lm.apply_chat_template(conversation, generation_prompt) == expected
    assert remarks(told) == []
    tokenizer.chat_template = refusing + plain
    assert lm.apply_chat_template(talk) == oracle.apply_chat_template(talk)
    assert "Be brief" not in lm.apply_chat_template(talk)
    assert remarks(told) == ["the chat template refuses a system message, which was left out: no system here"]
    assert lm.chat_template(True) == oracle.chat_template(True)
    assert lm.tokenizer_name == oracle.tokenizer_name


def test_a_store_that_cannot_keep_is_told_once(tmp_path: Path) -> None:
    """The evaluation goes on."""
    model, tokenizer = made()
    (tmp_path / "file").write_text("")
    lm, told = heard(model, tokenizer, store=AnswerStore(tmp_path / "file", "model"))
    everything(lm)
    assert len(remarks(told)) == 1
    assert remarks(told)[0].startswith(f"answers are not kept any more: {tmp_path / 'file'}")
