"""What an evaluation tells as it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]


@dataclass(frozen=True)
class Asking:
    """How far one kind of questions has come.

    Attributes:
        kind: lm-eval's word for the kind of question.
        answered: questions that have an answer, those `kept` from an earlier start among them.
        questions: how many there are.
        tokens: tokens that have been computed, of `all_tokens`; both 0 where that is not known.
        seconds: since the first of them was asked.
    """

    kind: Kind
    answered: int
    questions: int
    kept: int
    tokens: int
    all_tokens: int
    seconds: float


@dataclass(frozen=True)
class Remark:
    """Something a person should know beside the scores, in a whole sentence."""

    text: str


Report: TypeAlias = Callable[[Asking | Remark], None]
