"""What a model can be asked, in token ids, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

# What is called with the tokens that have been computed, and those that are to be.
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class Continuation:
    """How likely are the last `scored` of these tokens, given those before them?

    Attributes:
        tokens: context and continuation, no longer than the model's context and one more, since the last is not read.
        scored: how many of them are the continuation: at least 1, and fewer than there are tokens.
    """

    tokens: tuple[int, ...]
    scored: int


class Likelihood(NamedTuple):
    """The natural logarithm of a continuation's probability, and whether greedy decoding would have written it."""

    log_probability: float
    greedy: bool


@dataclass(frozen=True)
class Prompt:
    """What follows these tokens?

    Attributes:
        tokens: what is read, at least one; with `max_new_tokens` no longer than the model's context.
        until: texts at the first of which the answer ends; they are no part of it.
        max_new_tokens: the longest answer.
        sampling: further arguments of transformers' `generate`, such as `do_sample` and `temperature`; empty is greedy.
    """

    tokens: tuple[int, ...]
    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Mapping[str, Any] = field(default_factory=dict)
