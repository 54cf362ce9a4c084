"""When a merge is said to be the trained model, when it is refused, and which of two wins."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_cli.errors import MergeError
from qlora_cli.merging.fidelity.estimates import RowMove
from qlora_cli.merging.fidelity.measures import Fidelity, Reference, RowReference
from qlora_cli.merging.fidelity.verdict import check_effect, choose, judge, judge_quantized, needs_plain_base


def _reference(effect: float = 0.02, noise: float = 0.0) -> Reference:
    row = RowReference(torch.zeros(0, 4), torch.zeros(0, 4), {}, None, None)
    return Reference((row,), 1000, 1000, effect, 10 * effect, 2.0, 2.1, True, noise)


def _moves(*kept: float) -> tuple[RowMove, ...]:
    """Rows that have so much of the effect."""
    return tuple(RowMove(1.0, share) for share in kept)


def _fidelity(**changes: Any) -> Fidelity:
    facts: dict[str, Any] = {
        "rows": 4,
        "tokens": 1000,
        "compared_tokens": 1000,
        "measure": "kl",
        "mean_kl": 0.001,
        "max_kl": 0.1,
        "top1_agreement": 0.99,
        "effect_kept": 0.98,
        "effect_kept_error": 0.01,
        "loss": 2.0,
        "trained_loss": 2.0,
        "loss_difference": 0.0,
        "loss_difference_error": 0.001,
        "worst_layer": "model.layers.1",
        "worst_layer_error": 0.01,
    }
    return Fidelity(**facts | changes)


def test_an_adapter_without_effect_is_refused() -> None:
    """Not a bit of difference between the trained model and its base: there is nothing to merge."""
    with pytest.raises(MergeError) as caught:
        check_effect(_reference(0.0))
    assert str(caught.value) == (
        "the trained model says exactly what its base says, at all 1,000 tokens compared: the adapter does nothing, so "
        "that no merge of it would differ from the base. Is it the adapter that was meant, and was it trained?"
    )
    check_effect(_reference(1e-12))


def test_an_effect_that_may_be_rounding_is_refused() -> None:
    """A trained model that is no farther from its base than from itself, rounded otherwise, shows no effect."""
    with pytest.raises(MergeError) as caught:
        check_effect(_reference(0.0022, noise=0.002))
    assert str(caught.value) == (
        "the trained model is 0.0022 nats per token from its base, and rounding alone makes 0.002 nats per token: the "
        "adapter's effect cannot be told from that, so that no merge of it can be shown to have it. It needs to be "
        "trained for longer; --allow-unchanged merges it all the same"
    )
    check_effect(_reference(0.0032, noise=0.002))


def test_all_of_the_effect_is_told() -> None:
    """A good merge is told with what it has and how far it is, beside how far the base is."""
    said = judge(_reference(), _fidelity(), exact=True)
    assert said == (
        "the merged model is 0.001 nats per token from the trained model, where its base without the adapter is "
        "0.02 nats per token; it has 98% (± 1%) of what the adapter changed"
    )


def test_a_weak_adapter_under_much_rounding_survives() -> None:
    """Rounding may be more than the effect, as long as the effect is there with certainty."""
    found = _fidelity(mean_kl=0.03, effect_kept=0.9, effect_kept_error=0.1)
    assert judge(_reference(), found, exact=True).endswith("it has 90% (± 10%) of what the adapter changed")


def test_of_one_row_nothing_is_certain() -> None:
    """No error can be told then, and none is."""
    assert judge(_reference(), _fidelity(effect_kept_error=None), exact=True).endswith(
        "it has 98% of what the adapter changed"
    )


def test_an_uncertain_effect_is_refused() -> None:
    """No more than chance gives: other rows may tell."""
    with pytest.raises(MergeError, match=r"cannot be told from its base: it has 90% \(± 40%\) .* More --verify-rows"):
        judge(_reference(), _fidelity(effect_kept=0.9, effect_kept_error=0.4), exact=True)


@pytest.mark.parametrize(("kept", "error"), [(0.0, 0.01), (0.3, 0.01), (-1.0, 0.1)], ids=["none", "part", "reverse"])
def test_a_lost_effect_is_refused(kept: float, error: float) -> None:
    """Less than half of the effect: refused, with what to do."""
    with pytest.raises(MergeError, match=r"cannot be told from its base: .* try --dtype float32") as caught:
        judge(_reference(), _fidelity(effect_kept=kept, effect_kept_error=error), exact=True)
    assert f"it has {kept:.0%} (± {error:.0%})" in str(caught.value)


def test_too_much_of_it_is_refused() -> None:
    """An update scaled twice over is not the trained model, though it differs from the base."""
    with pytest.raises(MergeError, match=r"is not the trained one: it has 200% \(± 2%\) of what the adapter changed"):
        judge(_reference(), _fidelity(effect_kept=2.0, effect_kept_error=0.02, mean_kl=0.02), exact=True)


def test_too_much_within_rounding_is_none() -> None:
    """Where rounding took a part of a weak effect from the trained model itself, a finer merge has more of it."""
    found = _fidelity(effect_kept=2.3, effect_kept_error=0.3, mean_kl=0.004)
    assert "230%" in judge(_reference(0.0038, noise=0.0024), found, exact=True)


@pytest.mark.parametrize(("effect", "distance"), [(0.02, 0.06), (0.8, 0.1)], ids=["weak", "strong"])
def test_damage_beside_the_effect_is_refused(effect: float, distance: float) -> None:
    """Most of the effect on weights that are otherwise wrong, or of half of its size, is not the trained model."""
    with pytest.raises(MergeError, match=r"not the trained one: it has 65% .* farther from it than rounding explains"):
        judge(_reference(effect), _fidelity(mean_kl=distance, effect_kept=0.65), exact=True)


def test_near_the_trained_model_no_other_base_is_needed() -> None:
    """Into the original weights: within half of the effect of the trained model is proof enough."""
    reference, found = _reference(), _fidelity(mean_kl=0.009, effect_kept=0.4)
    assert not needs_plain_base(reference, found, exact=False)
    judge(reference, found, exact=False)
    assert needs_plain_base(reference, _fidelity(mean_kl=0.01), exact=False)
    assert not needs_plain_base(reference, _fidelity(mean_kl=0.01), exact=True)


def test_original_weights_are_measured_from_the_original_base() -> None:
    """What 4 bits cost may be more than the effect: what counts is what the merge has beyond the plain base."""
    plain = _fidelity(mean_kl=0.09, effect_kept=0.3, effect_kept_error=0.2, row_moves=_moves(-0.2, 0.3, 0.8))

    def found(*kept: float) -> Fidelity:
        return _fidelity(mean_kl=0.07, effect_kept=sum(kept) / 3, effect_kept_error=0.2, row_moves=_moves(*kept))

    # Far from certain by itself, but on every row it is the same that is added.
    told = judge(_reference(), found(0.47, 0.97, 1.47), plain, exact=False)
    assert told.endswith("it has 97% (± 20%) of what the adapter changed, 67% (± 0%) more than the original base alone")
    for lost in (found(-0.18, 0.32, 0.82), found(-0.4, 0.45, 1.3)):  # none, and no more than chance gives
        with pytest.raises(MergeError, match=r"cannot be told from its base: .* more than the original base alone"):
            judge(_reference(), lost, plain, exact=False)
    with pytest.raises(MergeError, match="is not the trained one: it has 230%"):
        judge(_reference(), found(1.8, 2.3, 2.8), plain, exact=False)


def test_the_lower_held_out_loss_wins() -> None:
    """On the run's own rows the loss decides, even against the divergence."""
    merges = {
        "original": _fidelity(loss=1.90, mean_kl=0.2, row_losses=((19.0, 10), (19.1, 10), (18.9, 10))),
        "dequantized": _fidelity(loss=2.00, mean_kl=0.01, row_losses=((20.0, 10), (20.1, 10), (19.9, 10))),
    }
    choice = choose(merges, by_loss=True)
    assert choice == ("original", "original has the lower held-out loss: 1.9000 against 2.0000")
    assert choose(merges, by_loss=False) == (
        "dequantized",
        "dequantized has the lower mean KL from the trained model: 0.01 nats against 0.2 nats",
    )


def test_an_uncertain_win_is_told() -> None:
    """A difference within twice its error is said to be none for certain; it wins all the same."""
    merges = {
        "original": _fidelity(loss=2.00, row_losses=((18.0, 10), (22.0, 10))),
        "dequantized": _fidelity(loss=1.99, row_losses=((19.8, 10), (20.0, 10))),
    }
    assert choose(merges, by_loss=True) == (
        "dequantized",
        "dequantized has the lower held-out loss: 1.9900 against 2.0000; on these rows that is no certain difference "
        "(0.0100 ± 0.1900)",
    )
    one = {
        "original": _fidelity(loss=1.9, row_losses=((19.0, 10),)),
        "dequantized": _fidelity(row_losses=((20.0, 10),)),
    }
    assert choose(one, by_loss=True).reason.endswith("on these rows that is no certain difference (0.1000, one row)")


def test_equals_and_rows_without_targets() -> None:
    """Of equals the first is taken; where there is no loss the divergence decides; one alone wins."""
    same = {"original": _fidelity(), "dequantized": _fidelity()}
    assert choose(same, by_loss=True) == ("original", "original and dequantized have the same held-out loss, 2.0000")
    lossless = {"original": _fidelity(loss=None, mean_kl=0.2), "dequantized": _fidelity(loss=None, mean_kl=0.1)}
    assert choose(lossless, by_loss=True).winner == "dequantized"
    assert choose({"original": _fidelity()}, by_loss=True).winner == "original"


def test_what_rounding_again_takes_away_is_refused() -> None:
    """A merge on dequantised weights that snapped back to the grid of 4 bits is its base, and is not shipped."""
    rounded = _fidelity(mean_kl=0.019, effect_kept=0.03, effect_kept_error=0.01)
    with pytest.raises(MergeError) as caught:
        judge_quantized(_reference(), rounded, "nf4")
    assert str(caught.value) == (
        "in NF4 it has 3% (± 1%) of what the adapter changed, and is 0.019 nats per token from the trained model, "
        "where its base without the adapter is 0.02 nats per token: rounding to 4 bits again takes the adapter away. "
        "Merge onto the original weights, or leave the adapter beside the 4-bit base"
    )
    kept = judge_quantized(_reference(), _fidelity(mean_kl=0.01, effect_kept=1.03), "nf4")
    assert kept.endswith("in NF4 it has 103% (± 1%) of what the adapter changed")
