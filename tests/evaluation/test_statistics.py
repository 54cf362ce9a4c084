"""Differences of two models on the same documents: against scipy and brute force, and where there is little to say."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.statistics import (
    Comparison,
    align,
    compare,
    compare_aggregated,
    compare_group,
    compare_ratios,
    mcnemar,
    ratio_standard_error,
    stratum,
)

GENERATOR = np.random.default_rng(0)


@given(wins=st.integers(0, 400), losses=st.integers(0, 400))
def test_mcnemar_is_the_two_sided_binomial_test(wins: int, losses: int) -> None:
    """scipy's binomtest, which adds up every outcome that is no likelier."""
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_mcnemar_of_many_documents() -> None:
    """Where probabilities of single outcomes are less than a float holds."""
    assert mcnemar(7100, 6900) == pytest.approx(stats.binomtest(7100, 14_000).pvalue, rel=1e-8)
    assert mcnemar(14_000, 0) == 0.0
    assert mcnemar(0, 0) == 1.0


def test_one_value_has_no_standard_error() -> None:
    assert ratio_standard_error([0.5], [3]) is None


def test_the_interval_is_that_of_every_possible_resample() -> None:
    """Of four documents there are 4^4 resamples: the percentiles are theirs, within what 10,000 of them can tell."""
    target, base = [1.0, 0.25, 0.5, 2.0], [0.0, 0.5, 0.5, 0.125]
    gaps = np.subtract(target, base)
    means = np.array([gaps[list(chosen)].mean() for chosen in itertools.product(range(4), repeat=4)])
    low, high = np.quantile(means, (0.025, 0.975))
    found = compare(target, base, resamples=100_000)
    assert found.difference == pytest.approx(gaps.mean())
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert (found.wins, found.losses, found.ties, found.n) == (2, 1, 1, 4)
    assert found.p is None


@pytest.mark.parametrize("values", ["binary", "continuous"])
def test_the_interval_is_scipys(values: str) -> None:
    """scipy's paired percentile bootstrap over documents, for both ways of drawing."""
    if values == "binary":
        base = GENERATOR.integers(0, 2, 300).astype(float)
        target = np.where(GENERATOR.random(300) < 0.3, 1.0, base)
    else:
        base = GENERATOR.normal(size=300)
        target = base + GENERATOR.normal(0.1, 0.5, 300)
    theirs = stats.bootstrap((target - base,), np.mean, method="percentile", n_resamples=10_000, random_state=1)
    found = compare(target, base)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=width * 0.04)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=width * 0.04)
    assert found.difference == pytest.approx((target - base).mean())
    assert (found.p is None) == (values == "continuous")


def test_both_ways_of_drawing_agree() -> None:
    """A metric of many distinct values is drawn by document, one of few by value: the same interval either way."""
    gaps = GENERATOR.integers(0, 2, 500).astype(float)
    by_value = compare(gaps, np.zeros(500))
    by_document = compare(gaps + GENERATOR.random(500) * 1e-9, np.zeros(500))
    assert by_value.low == pytest.approx(by_document.low, abs=0.004)
    assert by_value.high == pytest.approx(by_document.high, abs=0.004)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = GENERATOR.random(100)
    assert compare(values, np.zeros(100)) == compare(values, np.zeros(100))
    assert compare(values, np.zeros(100)) != compare(values, np.zeros(100), seed=2)


def test_all_alike_is_no_difference() -> None:
    """Two models that answer alike: nothing between them, and no chance that it is anything else."""
    assert compare([1, 0, 1], [1, 0, 1]) == Comparison(0.0, 0.0, 0.0, 1.0, 0, 0, 3, 3)


def test_always_the_same_difference() -> None:
    assert compare([1, 1, 1], [0, 0, 0]) == Comparison(1.0, 1.0, 1.0, 0.25, 3, 0, 0, 3)


def test_a_single_document_tells_nothing_of_others() -> None:
    """It would be drawn again and again, and seem certain."""
    assert compare([1], [0]) == Comparison(1.0, None, None, 1.0, 1, 0, 0, 1)
    assert compare_ratios([2.0], [1.0], [4]) == Comparison(0.25, None, None, None, 0, 1, 0, 1)
    assert compare_aggregated([(1, 1)], [(1, 0)], _accuracy) == Comparison(1.0, None, None, None, None, None, None, 1)


def test_where_lower_is_better() -> None:
    """The difference is the target's less the base's all the same; who wins is the other way round."""
    found = compare([1.0, 2.0, 3.0], [2.0, 4.0, 3.0], higher_is_better=False)
    assert found.difference == -1.0
    assert (found.wins, found.losses, found.ties) == (2, 0, 1)


def test_a_group_is_weighted_as_lm_eval_weights_it() -> None:
    """By documents: the mean over all of them. Equally: the mean of the tasks' means."""
    one, two = ([1, 1, 0, 0], [0, 0, 0, 0]), ([0, 1], [1, 1])
    by_size = compare_group([stratum(*one, weight=4), stratum(*two, weight=2)])
    equal = compare_group([stratum(*one), stratum(*two)])
    assert by_size.difference == pytest.approx((2 - 1) / 6)
    assert equal.difference == pytest.approx((0.5 - 0.5) / 2)
    for found in (by_size, equal):
        assert (found.wins, found.losses, found.ties, found.n) == (2, 1, 3, 6)
        assert found.p == 1.0


def test_documents_are_drawn_within_their_task() -> None:
    """Two tasks that each differ by the same everywhere, one up, one down: that there are so many of each is no luck,
    so that nothing varies. Drawn from one pot, the interval would be wide."""
    up, down = stratum(np.ones(50), np.zeros(50)), stratum(np.zeros(50), np.ones(50))
    found = compare_group([up, down])
    assert (found.low, found.difference, found.high) == (0.0, 0.0, 0.0)
    pot = compare(np.repeat([1.0, 0.0], 50), np.repeat([0.0, 1.0], 50))
    assert pot.low is not None
    assert pot.low < -0.1


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Over 300 made-up evaluations of 200 documents, about 95 in 100 intervals contain the true difference."""
    inside = 0
    for number in range(300):
        generator = np.random.default_rng([7, number])
        base = generator.random(200) < 0.5
        target = np.where(generator.random(200) < 0.2, generator.random(200) < 0.8, base)
        found = compare(target, base, resamples=1000, seed=number)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 0.2 * (0.8 - 0.5) <= found.high
    assert 0.91 <= inside / 300 <= 0.98


def test_memory_is_bounded() -> None:
    """14,000 documents of continuous values, 10,000 resamples: 1.1 GB of indices if they were drawn at once."""
    target, base = GENERATOR.random(14_000), GENERATOR.random(14_000)
    tracemalloc.start()
    compare(target, base, resamples=600)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.integers(1, 50)), min_size=2, max_size=20))
def test_losses_per_token(rows: list[tuple[float, float, int]]) -> None:
    """The difference is that of the two losses over all tokens, and lies within its interval's reach."""
    target, base, sizes = map(np.array, zip(*rows, strict=True))
    found = compare_ratios(target, base, sizes, resamples=200)
    assert found.difference == pytest.approx(target.sum() / sizes.sum() - base.sum() / sizes.sum(), abs=1e-9)
    assert found.low is not None
    assert found.high is not None
    gaps = (target - base) / sizes
    assert gaps.min() - 1e-9 <= found.low <= found.high <= gaps.max() + 1e-9
    assert found.wins == int((target < base).sum())


def test_rows_of_one_loss_per_token_differ_in_nothing() -> None:
    """Long rows and short ones of the same loss per token: the ratio is the same however rows are drawn, so that
    neither an interval nor an error is left. Sums alone would vary."""
    sizes = np.array([1, 10, 100, 1000])
    found = compare_ratios(sizes * 2.0, sizes * 1.5, sizes)
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)
    assert ratio_standard_error(sizes * 2.0, sizes) == pytest.approx(0.0, abs=1e-12)


def test_the_error_of_a_ratio_is_that_of_a_bootstrap() -> None:
    """Rows of very different lengths, whose tokens are alike within a row."""
    sizes = GENERATOR.integers(1, 200, 400)
    sums = sizes * GENERATOR.normal(2, 0.5, 400)
    draws = GENERATOR.integers(0, 400, (4000, 400))
    expected = (sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)).std()
    assert ratio_standard_error(sums, sizes) == pytest.approx(expected, rel=0.05)
    # With rows of one size it is the error of a mean.
    assert ratio_standard_error(sums, np.full(400, 2)) == pytest.approx(stats.sem(sums) / 2)


def _accuracy(items: object) -> float:
    pairs = list(items)  # type: ignore[call-overload]
    return sum(a == b for a, b in pairs) / len(pairs)


def test_a_metric_that_is_no_mean() -> None:
    """Through the aggregation itself; for one that is a mean after all, the interval is that of means."""
    labels = GENERATOR.integers(0, 2, 200).tolist()
    target = [(label, label if GENERATOR.random() < 0.8 else 1 - label) for label in labels]
    base = [(label, label if GENERATOR.random() < 0.6 else 1 - label) for label in labels]
    found = compare_aggregated(target, base, _accuracy)
    means = compare([a == b for a, b in target], [a == b for a, b in base])
    assert found.difference == pytest.approx(means.difference)
    assert found.low == pytest.approx(means.low, abs=0.02)
    assert found.high == pytest.approx(means.high, abs=0.02)
    assert (found.n, found.p, found.wins, found.losses, found.ties) == (200, None, None, None, None)


@pytest.mark.parametrize("undefined", [ZeroDivisionError, ValueError, None])
def test_draws_that_a_metric_is_not_defined_for(undefined: type[Exception] | None) -> None:
    """Of one class alone there is no such thing as a correlation: such draws are left out, or, where they are most of
    them, there is no interval."""

    def aggregate(items: object) -> float:
        pairs = list(items)  # type: ignore[call-overload]
        if len({gold for gold, _ in pairs}) == 1:
            if undefined is not None:
                raise undefined
            return math.nan
        return _accuracy(pairs)

    rare = [(int(number < 5), 1) for number in range(20)]
    found = compare_aggregated(rare, [(gold, 0) for gold, _ in rare], aggregate)
    assert found.difference == pytest.approx(0.25 - 0.75)
    assert found.low is not None
    assert found.high is not None
    assert -1 < found.low < -0.5 < found.high < 0
    rarer = [(int(number < 1), 1) for number in range(20)]
    assert compare_aggregated(rarer, rarer, aggregate).low is None


def test_values_are_paired_by_document() -> None:
    """Whatever the order; a document that only one answered is named."""
    assert align([(3, "a"), (1, "b")], [(1, "c"), (3, "d")], "task") == (["a", "b"], ["d", "c"])
    with pytest.raises(EvaluationError, match=r"^piqa: target and base did not .* 2 and 1 \(document 7 of one alone\)"):
        align([(1, 0.0), (7, 0.0)], [(1, 0.0)], "piqa")
    with pytest.raises(EvaluationError, match="a document twice"):
        align([(1, 0.0), (1, 0.0)], [(1, 0.0), (1, 1.0)], "piqa")


@pytest.mark.parametrize(("target", "base"), [([], []), ([1.0], []), ([1.0, 0.0], [1.0]), ([[1.0]], [[1.0]])])
def test_what_is_no_pair_is_refused(target: list[float], base: list[float]) -> None:
    with pytest.raises(EvaluationError, match="two models can be compared on the same documents alone"):
        compare(target, base)


def test_weights_and_sizes_are_above_zero() -> None:
    with pytest.raises(EvaluationError, match="weight in its group"):
        stratum([1.0], [1.0], 0.0)
    with pytest.raises(EvaluationError, match="weight in its group"):
        stratum([1.0], [1.0], math.nan)
    with pytest.raises(EvaluationError, match="a size above 0 for each of 2 rows"):
        compare_ratios([1.0, 2.0], [1.0, 2.0], [1, 0])
    with pytest.raises(EvaluationError, match="without tasks"):
        compare_group([])
