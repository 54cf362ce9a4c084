"""What is written, set beside lm-eval's own `hf` backend: the same texts, letter for letter."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.evaluation.answering.generation import Generator
from qlora_cli.evaluation.answering.questions import Prompt
from tests.support.models import FAMILIES, tiny_model
from tests.support.tokenizers import END, tiny_tokenizer

_WORDS = [
    "what",
    "is",
    "the",
    "answer",
    "to",
    "a",
    "number",
    "plus",
    "another",
    "has",
    "three",
    "apples",
    "in",
    "of",
    "it",
]
_UNTIL = ["\n\n", ".", "Q:", " the", "er", "a", " is"]


def _texts(count: int, *, seed: int = 0) -> list[str]:
    """Questions that share their beginning, and some that do not."""
    draw = random.Random(seed)
    shared = "Question: " + " ".join(draw.choices(_WORDS, k=20)) + ". Answer: four.\n"
    own = [" ".join(draw.choices(_WORDS, k=draw.randrange(1, 16))) for _ in range(count)]
    return [(shared if index % 3 else "") + text for index, text in enumerate(own)]


def _backend(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 1) -> HFLM:
    return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, max_length=256)


def _theirs(backend: HFLM, texts: list[str], arguments: list[dict[str, Any]]) -> list[str]:
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(text, given), idx=index)
        for index, (text, given) in enumerate(zip(texts, arguments, strict=True))
    ]
    return backend.generate_until(requests, disable_tqdm=True)


def _ours(
    generator: Generator, tokenizer: PreTrainedTokenizerBase, texts: list[str], arguments: list[Any]
) -> list[str]:
    eos = tokenizer.decode(tokenizer.eos_token_id)
    prompts = [
        Prompt(tuple(tokenizer(text).input_ids), (*given["until"], eos), given["max_gen_toks"])
        for text, given in zip(texts, arguments, strict=True)
    ]
    answers = dict(generator.generate(prompts, lambda _done, _all: None))
    assert sorted(answers) == list(range(len(texts)))
    return [answers[index] for index in range(len(texts))]


def _model(family: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """With a head that prefers words, so that answers are text, have stop texts in them, and end."""
    model = tiny_model(family, vocab_size=len(tokenizer), seed=seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = None
    with torch.no_grad():
        # Far larger than a random model's: it would write one word forever.
        model.get_input_embeddings().weight.mul_(12)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_the_hf_backend(family: str) -> None:
    """Every family, answers of different lengths, stop texts of one and of several tokens, float32."""
    tokenizer = tiny_tokenizer()
    model = _model(family, tokenizer, seed=1)
    texts = _texts(24)
    draw = random.Random(2)
    arguments = [
        {"until": draw.sample(_UNTIL, draw.randrange(0, 3)), "max_gen_toks": draw.choice([1, 7, 40])} for _ in texts
    ]
    generator = Generator(model, tokenizer)
    assert generator.why is None
    ours = _ours(generator, tokenizer, texts, arguments)
    assert ours == _theirs(_backend(model, tokenizer), texts, arguments)
    assert len(set(ours)) > 8, "the models say too little for this to mean anything"


def test_a_models_own_repetition_penalty_holds_for_greedy_answers() -> None:
    """Chat models bring one in their generation configuration, which `generate` heeds in the hf backend, too."""
    tokenizer = tiny_tokenizer()
    model = _model("llama", tokenizer, seed=1)
    texts = _texts(12)
    arguments = [{"until": [], "max_gen_toks": 30} for _ in texts]
    without = _ours(Generator(model, tokenizer), tokenizer, texts, arguments)
    model.generation_config.repetition_penalty = 1.3
    generator = Generator(model, tokenizer)
    assert generator.why is None
    penalised = _ours(generator, tokenizer, texts, arguments)
    assert penalised == _theirs(_backend(model, tokenizer), texts, arguments)
    assert penalised != without


@pytest.mark.parametrize("setting", [{"no_repeat_ngram_size": 2}, {"suppress_tokens": [9, 40, 41]}, {"num_beams": 3}])
def test_other_settings_of_a_generation_configuration_are_left_to_generate(setting: dict[str, Any]) -> None:
    """The loop of our own steps aside, says why, and the texts are the hf backend's."""
    tokenizer = tiny_tokenizer()
    model = _model("llama", tokenizer, seed=3)
    model.generation_config.update(**setting)
    texts = _texts(6)
    arguments = [{"until": ["."], "max_gen_toks": 12} for _ in texts]
    generator = Generator(model, tokenizer)
    assert generator.why == f"the model's generation configuration sets {next(iter(setting))}"
    assert _ours(generator, tokenizer, texts, arguments) == _theirs(_backend(model, tokenizer), texts, arguments)


def test_special_tokens_are_no_part_of_an_answer() -> None:
    """A model that writes special tokens among the words: stopped at by name, skipped in the text."""
    tokenizer = tiny_tokenizer()
    model = _model("llama", tokenizer, seed=1)
    with torch.no_grad():
        model.lm_head.weight[:4] *= 1.6
    texts = _texts(24)
    arguments = [{"until": ["<|im_start|>"] if index % 2 else [], "max_gen_toks": 24} for index in range(24)]
    generator = Generator(model, tokenizer)
    ours = _ours(generator, tokenizer, texts, arguments)
    assert ours == _theirs(_backend(model, tokenizer), texts, arguments)
    assert not any("<|" in text for text in ours)
    written = [row for row in ours if row]
    assert len(written) > 8
    assert END not in "".join(ours)
