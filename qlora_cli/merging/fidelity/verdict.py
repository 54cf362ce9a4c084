"""Whether the adapter's effect is in the merged model, and which of two merges is the better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from qlora_cli.errors import MergeError
from qlora_cli.merging.fidelity.estimates import share_kept, standard_error
from qlora_cli.merging.fidelity.measures import Fidelity, Reference

# Of the effect, what must be there for it to have survived, and what may be there of it.
LEAST_KEPT, MOST_KEPT = 0.5, 1.5
# Merged into the original weights, what must be there beyond what the original base alone has. A part of what an
# adapter learns makes up for what 4 bits had cost, and that the original base has without it: over a third on
# SmolLM2-135M after five steps.
LEAST_ADDED = 0.1
# How far beyond what rounding does by itself an adapter's effect, and an excess of it, have to be to be any.
LEAST_EFFECT, MUCH = 1.5, 3.0
# How many standard errors the share kept must be away from nothing.
CERTAIN = 3.0
# A merge is close to the trained model where it is off by less than this share of the effect.
CLOSE = 0.5
# Of the weights that were trained over, nothing but rounding may be the matter: that is less than this share of the
# effect, or than so many nats per token.
ROUNDED, BEYOND_ROUNDING = 0.1, 0.05


def check_effect(reference: Reference) -> None:
    """Refuse an adapter that does nothing: no merge of it could be told from its base.

    Raises:
        MergeError: if the trained model says the same as its base, or is no farther from it than rounding goes.
    """
    if reference.effect == 0:
        raise MergeError(
            f"the trained model says exactly what its base says, at all {reference.compared:,} tokens compared: the "
            "adapter does nothing, so that no merge of it would differ from the base. Is it the adapter that was "
            "meant, and was it trained?"
        )
    if reference.effect < LEAST_EFFECT * reference.noise:
        raise MergeError(
            f"the trained model is {_nats(reference.effect)} from its base, and rounding alone makes "
            f"{_nats(reference.noise)}: the adapter's effect cannot be told from that, so that no merge of it can be "
            "shown to have it. It needs to be trained for longer; --allow-unchanged merges it all the same"
        )


def needs_plain_base(reference: Reference, merged: Fidelity, *, exact: bool) -> bool:
    """Whether `judge` has to know how far the plain original base is from the trained model.

    Args:
        exact: whether the weights merged into are those that the adapter was trained over.
    """
    return not exact and merged.mean_kl >= CLOSE * reference.effect


def judge(reference: Reference, merged: Fidelity, plain: Fidelity | None = None, *, exact: bool) -> str:
    """Tell why the effect has survived, in a sentence; refuse a merge that cannot be told from its base.

    Merged into the weights that it was trained over, all of the effect has to be there but for rounding. Merged into
    the original weights, the model differs from the trained one by what 4 bits had cost as well, which may be more than
    the effect itself. Then what counts is how much nearer to the trained model the merge is than `plain`, the original
    base alone.

    Args:
        reference: what the trained model says.
        merged: the merged model against that.
        plain: the original base without the adapter against that, on the same rows; needed if `needs_plain_base`.
        exact: whether the weights merged into are those that the adapter was trained over.

    Raises:
        MergeError: if the effect is lost, in part or whole, or overshot.
    """
    if merged.effect_kept is None:
        check_effect(reference)
    kept, error = merged.effect_kept or 0.0, merged.effect_kept_error or 0.0
    told = f"it has {_share(kept, merged.effect_kept_error)} of what the adapter changed"
    least = LEAST_KEPT
    if not exact:
        if not needs_plain_base(reference, merged, exact=exact):
            return _told(reference, merged, told)
        least = LEAST_ADDED
        if plain is not None:
            more, uncertain = share_kept(merged.row_moves, plain.row_moves)
            kept, error = more or 0.0, uncertain or 0.0
            told += f", {_share(kept, uncertain)} more than the original base alone"
    distances = f"{_nats(merged.mean_kl)} from the trained model, where its base without the adapter is "
    distances += _nats(reference.effect)
    if kept < least or kept < CERTAIN * error:
        raise MergeError(
            f"the merged model cannot be told from its base: {told}, and is {distances}. "
            f"{'Rounding may have lost it: try --dtype float32' if kept < least else 'More --verify-rows may tell'}. "
            "Or the adapter needs to be trained for longer"
        )
    if kept - MOST_KEPT > error and merged.mean_kl > MUCH * reference.noise:
        raise MergeError(f"the merged model is not the trained one: {told}, and is {distances}")
    if exact and merged.mean_kl > max(BEYOND_ROUNDING, ROUNDED * reference.effect):
        raise MergeError(
            f"the merged model is not the trained one: {told}, but is {distances}: farther from it "
            "than rounding explains"
        )
    return _told(reference, merged, told)


def judge_quantized(reference: Reference, rounded: Fidelity, quant_type: str) -> str:
    """Tell how much of the effect is left in a merged model that was rounded to 4 bits again.

    Weights that were dequantised are on the grid of 4 bits; an update smaller than half a step of it is rounded away.

    Raises:
        MergeError: if so little is left that it cannot be told from the base.
    """
    kept, error = rounded.effect_kept or 0.0, rounded.effect_kept_error or 0.0
    told = f"in {quant_type.upper()} it has {_share(kept, rounded.effect_kept_error)} of what the adapter changed"
    if kept < LEAST_KEPT or kept < CERTAIN * error:
        raise MergeError(
            f"{told}, and is {_nats(rounded.mean_kl)} from the trained model, where its base without the adapter is "
            f"{_nats(reference.effect)}: rounding to 4 bits again takes the adapter away. Merge onto the original "
            "weights, or leave the adapter beside the 4-bit base"
        )
    return _told(reference, rounded, told)


class Choice(NamedTuple):
    """Which merge won, and why, in a sentence."""

    winner: str
    reason: str


def choose(merges: Mapping[str, Fidelity], *, by_loss: bool) -> Choice:
    """The better one of several merges of one adapter.

    Args:
        merges: by what they are called, in order of preference where nothing tells them apart; at least one.
        by_loss: whether the rows are the run's held-out ones. Then the lower loss wins; else, and for models whose rows
            have no targets, the one that is nearer to the trained model.
    """
    if by_loss and all(merge.loss is not None for merge in merges.values()):
        values = {name: merge.loss or 0.0 for name, merge in merges.items()}
        what, unit, form = "held-out loss", "", ".4f"
    else:
        values = {name: merge.mean_kl for name, merge in merges.items()}
        what, unit, form = "mean KL from the trained model", " nats", ".3g"
    winner = min(values, key=lambda name: values[name])  # the first of equals
    others = [name for name in values if name != winner]
    if not others:
        return Choice(winner, f"{winner} is the only one to choose from: {what} {values[winner]:{form}}{unit}")
    second = min(others, key=lambda name: values[name])
    reason = f"{winner} has the lower {what}: {values[winner]:{form}}{unit} against {values[second]:{form}}{unit}"
    if values[winner] == values[second]:
        reason = f"{winner} and {second} have the same {what}, {values[winner]:{form}}{unit}"
    elif what == "held-out loss":
        error = _error_between(merges[winner], merges[second])
        difference = values[second] - values[winner]
        if difference < 2 * error:
            uncertain = f" ± {error:.4f}" if math.isfinite(error) else ", one row"
            reason += f"; on these rows that is no certain difference ({difference:.4f}{uncertain})"
    return Choice(winner, reason)


def _error_between(one: Fidelity, other: Fidelity) -> float:
    """The standard error of the difference of two losses on the same rows."""
    rows = list(zip(one.row_losses, other.row_losses, strict=True))
    return standard_error([b[0] - a[0] for a, b in rows], [a[1] for a, _ in rows])


def _told(reference: Reference, merged: Fidelity, share: str) -> str:
    return (
        f"the merged model is {_nats(merged.mean_kl)} from the trained model, where its base without the adapter is "
        f"{_nats(reference.effect)}; {share}"
    )


def _share(value: float, error: float | None) -> str:
    return f"{value:.0%}" if error is None else f"{value:.0%} (± {error:.0%})"


def _nats(value: float) -> str:
    return f"{value:.3g} nats per token"
