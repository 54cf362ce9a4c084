"""Is the difference between two models more than luck? Both were asked the same, so documents are compared in pairs.

Sources: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", sections 13 and 16 (percentile intervals, strata
drawn one by one); McNemar 1947, in its exact form: of the documents on which the two differ, heads or tails.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qlora_cli.errors import EvaluationError

Floats: TypeAlias = NDArray[np.float64]
# From the items of two models for the same documents to two numbers: lm-eval's aggregation of a metric, applied twice.
Aggregate: TypeAlias = Callable[[Sequence[Any]], float]

RESAMPLES = 10_000
SEED = 1234  # lm-eval's
_CONFIDENCE = 0.95
_DRAWN_AT_ONCE = 1 << 21  # indices, 16 MB
_AGGREGATED = 8_000_000  # items, in all draws of a metric that is no mean
_DEFINED = 0.9  # of those draws, how many must have a value
_FEW_VALUES = 64  # distinct differences whose numbers are drawn in place of documents


@dataclass(frozen=True)
class Comparison:
    """A target set against its base on the same documents.

    Attributes:
        difference: the target's value minus the base's.
        low, high: the 95 % interval of that; None for a single document, which tells nothing of others.
        p: that of McNemar's exact test, two-sided; None for a metric that is not 0 or 1.
        wins, losses, ties: documents on which the target is better, worse, and as good; None for a metric that is made
            of all documents together, of which one alone has no value.
        n: documents.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    wins: int | None
    losses: int | None
    ties: int | None
    n: int


@dataclass(frozen=True, eq=False)
class Stratum:
    """The values of one task, the same documents in the same order, float64 [n]; `weight` is the task's share in its
    group: lm-eval's is the number of documents, or 1 for each task."""

    target: Floats
    base: Floats
    weight: float = 1.0


def stratum(target: ArrayLike, base: ArrayLike, weight: float = 1.0) -> Stratum:
    """A task's values as arrays.

    Raises:
        EvaluationError: if there are none, or not as many of the one as of the other, or the weight is not above 0.
    """
    ours, theirs = np.asarray(target, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if ours.ndim != 1 or ours.shape != theirs.shape or not len(ours):
        raise EvaluationError(
            f"two models can be compared on the same documents alone: expected as many values of each, at least one, "
            f"got {ours.size} and {theirs.size}"
        )
    if not (math.isfinite(weight) and weight > 0):
        raise EvaluationError(f"a task's weight in its group: expected a number above 0, got {weight}")
    return Stratum(ours, theirs, weight)


def align(
    target: Sequence[tuple[Hashable, Any]], base: Sequence[tuple[Hashable, Any]], what: str
) -> tuple[list[Any], list[Any]]:
    """The values of two models brought into one order, by document.

    Args:
        target, base: (document, value), each document once.
        what: whose values they are, for messages.

    Raises:
        EvaluationError: if the documents are not the same ones.
    """
    ours, theirs = dict(target), dict(base)
    if len(ours) != len(target) or len(theirs) != len(base) or ours.keys() != theirs.keys():
        only = [str(document) for document in [*(ours.keys() ^ theirs.keys())][:3]]
        named = f" (document {', '.join(only)} of one alone)" if only else " (a document twice)"
        raise EvaluationError(
            f"{what}: target and base did not answer the same documents, {len(target)} and {len(base)}{named}: they "
            "cannot be compared"
        )
    return list(ours.values()), [theirs[document] for document in ours]


def compare(
    target: ArrayLike,
    base: ArrayLike,
    *,
    higher_is_better: bool = True,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """The means of one metric, over the same documents in the same order.

    Args:
        higher_is_better: what a win is.

    Raises:
        EvaluationError: as `stratum` does.
    """
    return compare_group([stratum(target, base)], higher_is_better=higher_is_better, resamples=resamples, seed=seed)


def compare_group(
    strata: Sequence[Stratum], *, higher_is_better: bool = True, resamples: int = RESAMPLES, seed: int = SEED
) -> Comparison:
    """The weighted mean of several tasks' means. Documents are drawn within their task: that there are so many of each
    is no luck.

    Raises:
        EvaluationError: if there is no task.
    """
    if not strata:
        raise EvaluationError("a group without tasks has nothing to compare")
    generator = np.random.default_rng(seed)
    total = sum(each.weight for each in strata)
    difference, drawn = 0.0, np.zeros(resamples)
    for each in strata:
        share, gaps = each.weight / total, each.target - each.base
        difference += share * float(gaps.mean())
        drawn += share * _resampled_means(gaps, resamples, generator)
    number = sum(len(each.target) for each in strata)
    gaps = np.concatenate([each.target - each.base for each in strata])
    low, high = _interval(drawn) if number > 1 else (None, None)
    wins, losses = _outcomes(gaps, higher_is_better=higher_is_better)
    binary = all(bool(np.isin(values, (0.0, 1.0)).all()) for each in strata for values in (each.target, each.base))
    p = mcnemar(wins, losses) if binary else None
    return Comparison(difference, low, high, p, wins, losses, number - wins - losses, number)


def compare_ratios(
    target: ArrayLike, base: ArrayLike, sizes: ArrayLike, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Comparison:
    """Two sums over rows, each divided by the rows' sizes: losses per token. Rows are drawn whole. Lower is better.

    Args:
        target, base: the sum of each row, of the same rows in the same order, [rows].
        sizes: what each row counts, above 0, [rows].

    Raises:
        EvaluationError: as `stratum` does.
    """
    pair, counts = stratum(target, base), stratum(sizes, sizes).target
    if counts.shape != pair.target.shape or not (counts > 0).all():
        raise EvaluationError(f"expected a size above 0 for each of {len(pair.target)} rows, got {len(counts)}")
    gaps = pair.target - pair.base
    sums = _resampled_sums(np.stack([gaps, counts], axis=1), resamples, np.random.default_rng(seed))
    low, high = _interval(sums[:, 0] / sums[:, 1]) if len(gaps) > 1 else (None, None)
    wins, losses = _outcomes(gaps, higher_is_better=False)
    difference = float(gaps.sum() / counts.sum())
    return Comparison(difference, low, high, None, wins, losses, len(gaps) - wins - losses, len(gaps))


def compare_aggregated(
    target: Sequence[Any],
    base: Sequence[Any],
    aggregate: Aggregate,
    *,
    resamples: int | None = None,
    seed: int = SEED,
) -> Comparison:
    """A metric that is no mean of the documents' values, such as F1 or Matthews' correlation.

    Wins and losses are not told: a document has no value of its own. Draws for which the metric is not defined, such as
    of one class alone, are left out; where they are many, there is no interval.

    Args:
        target, base: what the aggregation takes, of the same documents in the same order.
        resamples: by default fewer than for means, since each is aggregated by itself: lm-eval's 1000, down to 200 of
            many documents.

    Raises:
        EvaluationError: if there are none, or not as many of the one as of the other.
    """
    number = len(target)
    stratum(np.zeros(number), np.zeros(len(base)))
    generator = np.random.default_rng(seed)
    wanted = resamples or min(1000, max(200, _AGGREGATED // number))
    drawn = []
    with warnings.catch_warnings(action="ignore"):  # of draws that the metric is not defined for
        for _ in range(wanted if number > 1 else 0):
            chosen = generator.integers(0, number, number).tolist()
            with suppress(ValueError, ZeroDivisionError):
                drawn.append(aggregate([target[i] for i in chosen]) - aggregate([base[i] for i in chosen]))
    defined = np.array([value for value in drawn if math.isfinite(value)])
    low, high = _interval(defined) if number > 1 and len(defined) >= _DEFINED * wanted else (None, None)
    return Comparison(float(aggregate(target) - aggregate(base)), low, high, None, None, None, None, number)


def mcnemar(wins: int, losses: int) -> float:
    """The chance of an outcome as uneven as this one, either way, if each of both were as likely.

    Twice the smaller tail of Binomial(wins + losses, 1/2), at most 1; 1 where the two differ nowhere.
    """
    number = wins + losses
    # Whole numbers, as long as they get: exact.
    ways = tail = 1
    for k in range(1, min(wins, losses) + 1):
        ways = ways * (number - k + 1) // k
        tail += ways
    return min(1.0, 2 * tail / (1 << number))


def ratio_standard_error(sums: ArrayLike, sizes: ArrayLike) -> float | None:
    """Of Σ sums / Σ sizes over rows that are drawn whole, by linearisation; None for fewer than 2 rows.

    Source: Cochran 1977, "Sampling Techniques", equation 6.13: tokens of one row are no independent draws.
    """
    values, counts = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    number = len(values)
    if number < 2:
        return None
    residuals = values - values.sum() / counts.sum() * counts
    return float(math.sqrt(number / (number - 1) * (residuals**2).sum()) / counts.sum())


def _outcomes(gaps: Floats, *, higher_is_better: bool) -> tuple[int, int]:
    above, below = int((gaps > 0).sum()), int((gaps < 0).sum())
    return (above, below) if higher_is_better else (below, above)


def _interval(drawn: Floats) -> tuple[float, float]:
    rest = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(drawn, (rest, 1 - rest))
    return float(low), float(high)


def _resampled_means(values: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Means of `resamples` draws of as many values as there are, with replacement, [resamples]."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW_VALUES and np.isfinite(distinct).all():
        # How often each value is drawn says all; for a metric of 0 or 1 there are three of them.
        times = generator.multinomial(len(values), counts / len(values), size=resamples)
        means: Floats = times @ distinct / len(values)
        return means
    return _resampled_sums(values[:, None], resamples, generator)[:, 0] / len(values)


def _resampled_sums(columns: Floats, resamples: int, generator: np.random.Generator) -> Floats:
    """Sums over draws of as many rows [rows, columns] as there are, with replacement, [resamples, columns]."""
    return np.concatenate([columns[chosen].sum(axis=1) for chosen in _draws(len(columns), resamples, generator)])


def _draws(number: int, resamples: int, generator: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices of `resamples` draws of `number` of `number` rows, some draws at a time, [draws, number]."""
    at_once = max(1, _DRAWN_AT_ONCE // number)
    for start in range(0, resamples, at_once):
        yield generator.integers(0, number, (min(at_once, resamples - start), number))
