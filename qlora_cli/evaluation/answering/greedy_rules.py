"""Whether an answer is greedy, and what else a model's generation configuration wants of greedy answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from qlora_cli.errors import EvaluationError

# Settings of a generation configuration that change what greedy decoding writes, with the values that do nothing.
_INERT: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "diversity_penalty": (0,),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "bad_words_ids": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "dola_layers": (),
    "force_words_ids": (),
    "constraints": (),
    "stop_strings": (),
    "max_time": (),
}


def is_greedy(sampling: Mapping[str, Any]) -> bool:
    """Whether these arguments of `generate` ask for nothing but the likeliest token, as lm-eval reads them."""
    return sampled(sampling) is False and not set(sampling) - {"do_sample", "temperature"}


def sampled(sampling: Mapping[str, Any]) -> bool:
    """Whether tokens are drawn: where nothing is said about it, a temperature above 0 asks for it."""
    asked = sampling.get("do_sample")
    return float(sampling.get("temperature") or 0) > 0 if asked is None else bool(asked)


def repetition_penalty(model: PreTrainedModel) -> float:
    """The penalty on tokens that are there already, 1 for none: many chat models bring one, for greedy answers too."""
    return float(getattr(model.generation_config, "repetition_penalty", None) or 1)


def not_a_number() -> EvaluationError:
    """The model's logits say nothing about what comes next."""
    return EvaluationError(
        "the model's logits are NaN, so that nothing can be written. Look at its weights, or try another --bits; "
        "answers that were given are kept"
    )


def unusual_settings(model: PreTrainedModel) -> list[str]:
    """Settings of the model's generation configuration that only transformers' `generate` can follow."""
    config = model.generation_config
    given = {name: getattr(config, name, None) for name in _INERT}
    return [name for name, value in given.items() if value is not None and value not in _INERT[name]]
