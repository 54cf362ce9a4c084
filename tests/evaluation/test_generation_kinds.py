"""Architectures whose caches, positions or configurations are unusual write what they write alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from qlora_cli.evaluation.answering.generation import Generator
from qlora_cli.evaluation.answering.questions import Prompt
from tests.support.tokenizers import tiny_tokenizer

_SHAPE: dict[str, Any] = {
    "vocab_size": len(tiny_tokenizer()),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_ROPE: dict[str, Any] = {"rope_theta": 10000.0}


def _model(config: Any) -> PreTrainedModel:
    """Weights larger than at the start of training: what is seen is to matter."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in made.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return made  # type: ignore[no-any-return]


def _assert_as_alone(model: PreTrainedModel, prompts: list[Prompt], generator: Generator) -> None:
    """Each answer is transformers' own to that prompt, the longest prompts first, as in lm-eval's hf backend."""
    together = dict(generator.generate(prompts, lambda _done, _of: None))
    for number in sorted(range(len(prompts)), key=lambda place: -len(prompts[place].tokens)):
        prompt = prompts[number]
        ids = torch.tensor([prompt.tokens])
        alone = model.generate(
            ids,
            max_new_tokens=prompt.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **prompt.sampling,
        )
        assert together[number] == tiny_tokenizer().decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


def _prompts(*lengths: int, most: int = 8) -> list[Prompt]:
    return [
        Prompt(tuple(20 + (7 * row + place) % 300 for place in range(n)), (), most) for row, n in enumerate(lengths)
    ]


def test_heads_that_differ_by_layer() -> None:
    """Gemma 4: a plan of memory must not ask for the one width of all heads."""
    shape = _SHAPE | {"num_hidden_layers": 6, "num_key_value_heads": 2}
    small = {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 16}
    config = transformers.AutoConfig.for_model(
        "gemma4_text", **shape, **small, vocab_size_per_layer_input=shape["vocab_size"], max_position_embeddings=256
    )
    model = _model(config)
    _assert_as_alone(model, _prompts(4, 9, 6), Generator(model, tiny_tokenizer(), stop_ids=()))


def test_attention_that_wants_its_keys_in_one_piece_is_left_to_generate() -> None:
    """GPT-NeoX-Japanese views its keys in another shape, which a buffer with room does not allow."""
    config = transformers.GPTNeoXJapaneseConfig(
        **{name: value for name, value in _SHAPE.items() if name != "intermediate_size"}, intermediate_multiple_size=2
    )
    model = _model(config)
    remarks: list[str] = []
    generator = Generator(model, tiny_tokenizer(), stop_ids=(), remark=remarks.append)
    assert generator.why is not None
    assert generator.why.startswith("a trial fails with RuntimeError (view size is not compatible")
    _assert_as_alone(model, _prompts(4, 9, 6), generator)
    assert remarks == [f"Greedy answers are written by transformers' generate, which takes longer: {generator.why}"]


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_the_longest_row_does_not_turn_the_positions_of_others(kind: str) -> None:
    """Rotary frequencies that go by the longest row of a batch: rows beyond their reach do not share one."""
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 60}
        config: Any = transformers.Phi3Config(
            **_SHAPE,
            num_key_value_heads=4,
            max_position_embeddings=512,
            pad_token_id=0,
            rope_parameters={"rope_type": kind, **_ROPE, **factors},
            original_max_position_embeddings=60,
        )
    else:
        rope = {"rope_type": kind, "factor": 4.0, **_ROPE}
        config = transformers.LlamaConfig(**_SHAPE, max_position_embeddings=60, rope_parameters=rope)
    model = _model(config)
    prompts = _prompts(45, 50, 52, 130, most=30)
    # Within the reach by themselves, and beyond it together: a long prompt beside a long answer.
    prompts += [Prompt(tuple(range(30, 80)), (), 6, {"num_beams": 2}), Prompt((40, 41, 42), (), 50, {"num_beams": 2})]
    _assert_as_alone(model, prompts, Generator(model, tiny_tokenizer(), stop_ids=()))


def test_what_is_drawn_does_not_depend_on_what_else_was_asked() -> None:
    """Greedy questions beside drawn ones, which a second start finds kept, do not change the luck of these."""
    model = _model(transformers.LlamaConfig(**_SHAPE))
    drawn = [Prompt((20 + row, 30), (), 8, {"do_sample": True, "temperature": 1.0}) for row in range(3)]
    greedy = _prompts(4, 9)
    generator = Generator(model, tiny_tokenizer(), stop_ids=(), seed=3)
    alone = dict(generator.generate(drawn, lambda _done, _of: None))
    beside = dict(generator.generate([*greedy, *drawn], lambda _done, _of: None))
    assert [beside[2 + row] for row in range(3)] == [alone[row] for row in range(3)]
