"""How a task wants its answers written, from lm-eval's generation arguments to ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

DEFAULT_NEW_TOKENS = 256  # of lm-eval's `hf` backend

# What matters only where something is drawn.
_OF_DRAWING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


@dataclass(frozen=True)
class Terms:
    """How an answer is to be written.

    Attributes:
        until: texts at the first of which it ends, the end of a text among them.
        max_new_tokens: the longest answer.
        max_length: the longest prompt and answer together, where the task says that, too.
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


def decoding_terms(arguments: Mapping[str, Any], end: str | None) -> Terms:
    """What lm-eval's `hf` backend makes of a task's arguments.

    Args:
        arguments: the task's `generation_kwargs`.
        end: the text of the token that ends texts.
    """
    told: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), DEFAULT_NEW_TOKENS))
    until = handle_stop_sequences(told.pop("until"), eos=end)
    most, length = told.pop("max_gen_toks"), told.pop("max_length", None)
    asked = bool(told.pop("do_sample", False))
    drawn = asked and float(told.get("temperature", 0.0)) > 0.0
    if not drawn:
        told = {name: value for name, value in told.items() if name not in _OF_DRAWING}
        if told.get("num_beams") == 1:
            del told["num_beams"]
    return Terms(
        until=tuple(text for text in until if text),
        max_new_tokens=int(most),
        max_length=None if length is None else int(length),
        sampling={"do_sample": drawn, **told} if drawn or told else {},
        drawn=drawn,
        contradicted=asked and not drawn,
    )
