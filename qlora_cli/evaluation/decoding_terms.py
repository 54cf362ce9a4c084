"""How a task wants its answers written, from lm-eval's generation arguments to ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

DEFAULT_NEW_TOKENS = 256  # of lm-eval's `hf` backend

# What leaves greedy decoding as it is.
_OF_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# What a model's own generation configuration may hold that changes greedy decoding, and the value that does not.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "penalty_alpha": None,
}


@dataclass(frozen=True)
class Terms:
    """How an answer is to be written.

    Attributes:
        until: texts at the first of which it ends, the end of a text among them.
        max_new_tokens: the longest answer.
        max_length: the longest prompt and answer together, where the task says that in place of the other.
        sampling: arguments of transformers' `generate`; empty is greedy.
        drawn: whether it is drawn at random, so that asked again it would be another.
        contradicted: whether the task asks to draw, but at a temperature of 0: it is answered greedily.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    max_length: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    drawn: bool = False
    contradicted: bool = False


def decoding_terms(arguments: Mapping[str, Any], end: str | None, own: Any = None) -> Terms:
    """What lm-eval's `hf` backend makes of a task's arguments.

    Args:
        arguments: the task's `generation_kwargs`.
        end: the text of the token that ends texts.
        own: the model's generation configuration, which counts where the task does not say otherwise.
    """
    told: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), DEFAULT_NEW_TOKENS))
    until = handle_stop_sequences(told.pop("until"), eos=end)
    most, length = told.pop("max_gen_toks"), told.pop("max_length", None)
    temperature, drawn = float(told.get("temperature", 0.0)), bool(told.pop("do_sample", False))
    contradicted = drawn and temperature == 0.0
    drawn = drawn and not contradicted
    if not drawn:
        told = {name: value for name, value in told.items() if name not in _OF_DRAWING}
    for name, neutral in _NEUTRAL.items():
        value = getattr(own, name, None)
        if name not in told and value is not None and value != neutral:
            told[name] = value
        elif name in told and told[name] == neutral and getattr(own, name, None) in (None, neutral):
            del told[name]
    sampling = {"do_sample": drawn, **told} if drawn or told else {}
    stops = tuple(text for text in until if text)
    return Terms(stops, int(most), None if length is None else int(length), sampling, drawn, contradicted)
