"""Models that padding confuses are found out on themselves, and answer rows of one length together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from qlora_cli.evaluation.answering.generation import Generator
from qlora_cli.evaluation.answering.questions import Continuation, Prompt
from qlora_cli.evaluation.answering.scorer import choose_scorer
from qlora_cli.evaluation.answering.together import read_together, written_together
from tests.support.continuations import assert_as_alone, passes
from tests.support.models import FAMILIES, tiny_model
from tests.support.tokenizers import tiny_tokenizer

_WORDS = len(tiny_tokenizer())
_KINDS: dict[str, Callable[[], Any]] = {
    "rwkv": lambda: transformers.RwkvConfig(vocab_size=_WORDS, hidden_size=64, num_hidden_layers=2, context_length=256),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(
        vocab_size=_WORDS,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        lru_width=64,
        attention_window_size=64,
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=_WORDS, hidden_size=64, num_hidden_layers=2, state_size=8),
    "cpmant": lambda: transformers.CpmAntConfig(
        vocab_size=_WORDS, hidden_size=64, num_attention_heads=4, dim_head=16, dim_ff=128, num_hidden_layers=2
    ),
}


def _model(kind: str) -> PreTrainedModel:
    """Weights larger than at the start of training: what is seen is to matter."""
    if kind in FAMILIES:
        return tiny_model(kind, vocab_size=_WORDS)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(_KINDS[kind](), dtype=torch.float32).eval()
        for name, parameter in made.named_parameters():
            if parameter.ndim >= 2 and "conv" not in name:
                parameter.mul_(4)
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "together"), [("rwkv", "none"), ("recurrent_gemma", "one length"), ("mamba", "any"), ("llama", "any")]
)
def test_written_together(kind: str, together: str) -> None:
    """Where a batch of `generate` gives other answers than each row alone, that is seen; nothing is drawn."""
    model = _model(kind)
    before = torch.random.get_rng_state()
    assert written_together(model) == together
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("kind", "together"), [("cpmant", "one length"), ("mamba", "any"), ("gpt2", "any")])
def test_read_together(kind: str, together: str) -> None:
    """The same of a forward pass."""
    assert read_together(_model(kind)) == together


def test_a_model_that_cannot_be_tried_answers_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its code raises; but a lack of memory is told."""
    model = _model("llama")

    def failing(**_: Any) -> Any:
        raise KeyError("attention_mask")

    monkeypatch.setattr(model, "forward", failing)
    assert read_together(model) == written_together(model) == "none"

    def lacking(**_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", lacking)
    with pytest.raises(torch.OutOfMemoryError):
        read_together(model)


@pytest.mark.parametrize(
    ("kind", "which", "rows"), [("rwkv", "only one prompt", 1), ("recurrent_gemma", "only prompts of one length", 3)]
)
def test_answers_are_those_of_each_prompt_alone(kind: str, which: str, rows: int) -> None:
    """Prompts of several lengths, some of them alike: as many share a batch as may, which is told."""
    model = _model(kind)
    prompts = [Prompt(tuple(range(20 + row, 24 + row + row % 3 * 5)), (), 8) for row in range(7)]
    remarks: list[str] = []
    generator = Generator(model, tiny_tokenizer(), stop_ids=(), remark=remarks.append)
    together = dict(generator.generate(prompts, _quiet))
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt.tokens])
        alone = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert together[number] == tiny_tokenizer().decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
    assert remarks[1:] == [
        f"Answers are written to {which} at a time, which takes longer: in a trial the model did not go on from "
        "prompts of several lengths together as it does from each alone"
    ]
    with passes(model) as seen:
        dict(generator.generate(prompts, _quiet))
    assert max(ids.shape[0] for ids in seen) == rows


def test_likelihoods_are_those_of_each_row_alone() -> None:
    """Row by row, and only rows of one length together."""
    model = _model("cpmant")
    remarks: list[str] = []
    scorer = choose_scorer(model, batch_size=None, remark=remarks.append)
    asked = [Continuation(tuple(range(20 + row, 26 + row + row % 3)), 2) for row in range(6)]
    assert_as_alone(model, scorer, asked, tolerance=1e-4)
    assert remarks == [
        f"CpmAntForCausalLM is scored row by row, what rows begin with alike computed again for each: {scorer.why}",
        "CpmAntForCausalLM is asked about only rows of one length at a time: in a trial it did not answer rows of "
        "several lengths together as it does alone",
    ]
    with passes(model) as seen:
        dict(scorer.score(asked, _quiet))
    assert [tuple(ids.shape) for ids in seen] == [(2, 7), (2, 6), (2, 5)]


def _quiet(_done: int, _all: int) -> None:
    pass
