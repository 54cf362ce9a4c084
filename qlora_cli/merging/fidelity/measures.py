"""Is the merged model the one that was trained? Both read the same rows, one after the other, never both in memory.

`record` keeps what the trained model says, and what its base says without the adapter; `compare` sets another model
against that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from qlora_cli.errors import MergeError, NonFiniteError
from qlora_cli.merging.fidelity.divergence import divergence, move
from qlora_cli.merging.fidelity.estimates import RowMove, mean_of, paired_difference, row_move, share_kept
from qlora_cli.merging.fidelity.held_out import CheckRow
from qlora_cli.merging.fidelity.outputs import Outputs, outputs
from qlora_cli.merging.fidelity.trained import adapter_off, adapter_stronger

BUDGET = 512 * 2**20
_CHUNK_VALUES = 4_000_000  # of scores that are made float32 at once: 16 MB
# By this share more of the adapter says nearly the same, rounded otherwise.
_MORE = 2.0**-6

Advanced = Callable[[int], None]


class RowReference(NamedTuple):
    """What is kept of one row, on the CPU.

    Attributes:
        scores, base_scores: of the trained model and its base, [kept, classes] in their own dtype: the row's first
            positions that count, as many as there was room for.
        blocks: what the trained model's blocks gave at as many positions, [kept, width].
        losses, base_losses: float64 [positions], all that count; None where there are no targets.
        noise: the squared distance of the trained model's scores from the same, rounded otherwise; summed over those
            that are kept.
    """

    scores: Tensor
    base_scores: Tensor
    blocks: dict[str, Tensor]
    losses: Tensor | None
    base_losses: Tensor | None
    noise: float = 0.0


@dataclass(frozen=True, eq=False)
class Reference:
    """What the trained model says about some rows, and how far its base is from that.

    Attributes:
        rows: of each what is kept.
        positions: how many positions count, in all rows.
        compared: at how many of them what was said is kept.
        effect, max_effect: KL(trained ‖ base) there, mean and maximum: what the adapter does.
        noise: mean KL there of the trained model from the same, rounded otherwise: what rounding of activations does by
            itself, and of `effect`, too.
        trained_loss, base_loss: over all positions that count; None without targets.
        are_logits: False for a model without a head, where the squared relative distance stands for KL.
    """

    rows: tuple[RowReference, ...]
    positions: int
    compared: int
    effect: float
    max_effect: float
    trained_loss: float | None
    base_loss: float | None
    are_logits: bool
    noise: float = 0.0


@dataclass(frozen=True)
class Fidelity:
    """How close a model is to the trained one.

    Attributes:
        rows, tokens: what both read, and how many positions counted.
        compared_tokens: at how many of these all that was said was compared.
        measure: `kl`, KL(trained ‖ this) in nats; `squared_distance`, relative, for a model without a head.
        mean_kl, max_kl: over the compared tokens.
        top1_agreement: share of them where both hold the same token for the most probable; None without a head.
        effect_kept: how much of what the adapter changed about the trained model's base this model has: 1 all, 0 none.
            None if the adapter changed nothing that could be told from rounding.
        effect_kept_error: its standard error, the rows being what was drawn.
        loss, trained_loss, loss_difference: mean over all tokens, in nats; None without targets.
        loss_difference_error: the standard error of the difference, the rows being what was drawn.
        worst_layer, worst_layer_error: where ‖h - h_trained‖ / ‖h_trained‖, mean over compared tokens, is largest.
    """

    rows: int
    tokens: int
    compared_tokens: int
    measure: str
    mean_kl: float
    max_kl: float
    top1_agreement: float | None
    effect_kept: float | None
    effect_kept_error: float | None
    loss: float | None
    trained_loss: float | None
    loss_difference: float | None
    loss_difference_error: float | None
    worst_layer: str | None
    worst_layer_error: float | None
    row_losses: tuple[tuple[float, int], ...] = field(default=(), repr=False)  # summed over a row's tokens, and those
    row_moves: tuple[RowMove, ...] = field(default=(), repr=False)

    def record(self) -> dict[str, Any]:
        """What is written to a report: all but the rows one by one."""
        return {name: value for name, value in asdict(self).items() if name not in ("row_losses", "row_moves")}


def record(
    model: PreTrainedModel,
    rows: Sequence[CheckRow],
    *,
    budget: int = BUDGET,
    advanced: Advanced = lambda _: None,
) -> Reference:
    """Have the trained model read the rows, with its adapter and without.

    Args:
        model: the base as it was stored in training with the adapter beside it, from `trained_model`.
        rows: at least one, each with a token that counts.
        budget: bytes to keep; the first rows are kept whole, a row that does not fit in part.
        advanced: told of the number of rows done.

    Raises:
        NonFiniteError: if the trained model says NaN or infinity.
    """
    model.eval()
    kept: list[RowReference] = []
    effects: list[Tensor] = []
    noises: list[Tensor] = []
    positions, are_logits = 0, True
    for number, row in enumerate(rows, start=1):
        trained = outputs(model, row)
        with adapter_off(model):
            base = outputs(model, row, with_blocks=False)
        _check_finite(trained, NonFiniteError, f"the trained model, on row {number} of {len(rows)}")
        are_logits = trained.are_logits
        size = max(_positions_within(budget, trained, base), int(number == 1))  # something has to be compared
        reference = _keep(trained, base, size)
        budget -= _size_of(reference)
        if size:
            effect, noise, squared = _measure(model, row, trained.scores[:size], base.scores[:size], are_logits)
            effects.append(effect)
            noises.append(noise)
            reference = reference._replace(noise=squared)
        kept.append(reference)
        positions += len(trained.scores)
        advanced(number)
    effect = torch.cat(effects)
    return Reference(
        rows=tuple(kept),
        positions=positions,
        compared=len(effect),
        effect=_at_least_zero(effect.mean()),
        max_effect=_at_least_zero(effect.max()),
        trained_loss=mean_of([row.losses for row in kept]),
        base_loss=mean_of([row.base_losses for row in kept]),
        are_logits=are_logits,
        noise=_at_least_zero(torch.cat(noises).mean()),
    )


def _measure(
    model: PreTrainedModel, row: CheckRow, trained: Tensor, base: Tensor, are_logits: bool
) -> tuple[Tensor, Tensor, float]:
    """What the adapter does at a row's first positions, and what rounding does: both as a divergence for each position,
    the latter as a squared distance, too."""
    with adapter_stronger(model, _MORE):
        again = outputs(model, row, with_blocks=False).scores[: len(trained)]
    effect = divergence(trained, base, are_logits=are_logits).cpu()
    noise = divergence(trained, again, are_logits=are_logits).cpu() - _MORE**2 * effect
    whole, more = (move(trained, other, other, are_logits=are_logits).length.sum() for other in (base, again))
    squared = more - _MORE**2 * whole
    return effect, noise, _at_least_zero(squared)


def compare(
    reference: Reference,
    model: PreTrainedModel,
    rows: Sequence[CheckRow],
    *,
    advanced: Advanced = lambda _: None,
) -> Fidelity:
    """Have another model read the same rows, and set what it says against the trained model.

    Raises:
        MergeError: if it says NaN or infinity, or has other classes than the trained model.
    """
    model.eval()
    sums = _Sums()
    for number, (row, known) in enumerate(zip(rows, reference.rows, strict=True), start=1):
        said = outputs(model, row, with_blocks=len(known.scores) > 0)
        _check_finite(said, MergeError, f"the merged model, on row {number} of {len(rows)}")
        if said.scores.shape[-1] != known.scores.shape[-1]:
            raise MergeError(
                f"the merged model tells {said.scores.shape[-1]:,} classes apart, the trained one "
                f"{known.scores.shape[-1]:,}: the merged weights are not all that was trained"
            )
        sums.add(known, said, reference.are_logits)
        advanced(number)
    return sums.fidelity(reference)


class _Sums:
    """What `compare` gathers, row by row."""

    def __init__(self) -> None:
        self.divergences: list[Tensor] = []
        self.agreements: list[Tensor] = []
        self.moves: list[RowMove] = []
        self.losses: list[Tensor | None] = []
        self.layers: dict[str, list[Tensor]] = {}

    def add(self, known: RowReference, said: Outputs, are_logits: bool) -> None:
        self.losses.append(_losses(said))
        size = len(known.scores)
        if not size:
            return
        device, scores = said.scores.device, said.scores[:size]
        trained, base = known.scores.to(device), known.base_scores.to(device)
        self.divergences.append(divergence(trained, scores, are_logits=are_logits).cpu())
        self.agreements.append((trained.argmax(-1) == scores.argmax(-1)).cpu())
        self.moves.append(row_move(move(trained, base, scores, are_logits=are_logits), known.noise))
        for path, hidden in known.blocks.items():
            if path in said.blocks:
                error = _relative_error(said.blocks[path][: len(hidden)].cpu(), hidden)
                self.layers.setdefault(path, []).append(error)

    def fidelity(self, reference: Reference) -> Fidelity:
        kl = torch.cat(self.divergences)
        kept, kept_error = share_kept(self.moves)
        loss = mean_of(self.losses)
        difference, difference_error = paired_difference([row.losses for row in reference.rows], self.losses)
        layers = {path: float(torch.cat(errors).mean()) for path, errors in self.layers.items()}
        worst = max(layers, key=lambda path: layers[path], default=None)
        return Fidelity(
            rows=len(reference.rows),
            tokens=reference.positions,
            compared_tokens=reference.compared,
            measure="kl" if reference.are_logits else "squared_distance",
            mean_kl=_at_least_zero(kl.mean()),
            max_kl=_at_least_zero(kl.max()),
            top1_agreement=float(torch.cat(self.agreements).double().mean()) if reference.are_logits else None,
            effect_kept=kept,
            effect_kept_error=kept_error,
            loss=loss,
            trained_loss=reference.trained_loss,
            loss_difference=difference,
            loss_difference_error=difference_error,
            worst_layer=worst,
            worst_layer_error=None if worst is None else layers[worst],
            row_losses=tuple((float(row.sum()), len(row)) for row in self.losses if row is not None),
            row_moves=tuple(self.moves),
        )


def _losses(said: Outputs) -> Tensor | None:
    """The cross entropy at each position as training takes it, in float32; float64 [positions] on the CPU."""
    if said.targets is None:
        return None
    # A few positions at a time: in float32, a long row's scores are larger than the rest of the work together.
    size = max(1, _CHUNK_VALUES // said.scores.shape[-1])
    targets = said.targets.to(said.scores.device)
    parts = zip(torch.split(said.scores, size), torch.split(targets, size), strict=True)
    losses = [F.cross_entropy(scores.float(), wanted, reduction="none") for scores, wanted in parts]
    return torch.cat(losses).double().cpu()


def _keep(trained: Outputs, base: Outputs, size: int) -> RowReference:
    """The first `size` positions, in memory of their own, and of the blocks' as large a share."""
    share = size / len(trained.scores)
    blocks = {
        path: hidden[: round(share * len(hidden))].to("cpu", copy=True) for path, hidden in trained.blocks.items()
    }
    scores, base_scores = (said.scores[:size].to("cpu", copy=True) for said in (trained, base))
    return RowReference(scores, base_scores, blocks, _losses(trained), _losses(base))


def _positions_within(budget: int, trained: Outputs, base: Outputs) -> int:
    """How many positions of a row can be kept."""
    positions = len(trained.scores)
    whole = sum(x.numel() * x.element_size() for x in (trained.scores, base.scores, *trained.blocks.values()))
    return min(positions, max(0, budget) * positions // whole)


def _size_of(row: RowReference) -> int:
    tensors = [row.scores, row.base_scores, *row.blocks.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _relative_error(hidden: Tensor, trained: Tensor) -> Tensor:
    """‖h - h_trained‖ / ‖h_trained‖ of each position, float64."""
    length = torch.linalg.vector_norm(trained.double(), dim=-1)
    error: Tensor = torch.linalg.vector_norm(hidden.double() - trained, dim=-1)
    relative: Tensor = error / length.clamp_min(torch.finfo(torch.float64).tiny)
    return relative


def _check_finite(said: Outputs, error: type[MergeError] | type[NonFiniteError], who: str) -> None:
    scores = said.scores
    # Minus infinity is how some models rule a token out.
    if bool((scores.isnan() | (scores == torch.inf)).any()):
        raise error(
            f"{who}, gives NaN or infinity. Weights or activations are beyond what {scores.dtype} holds: "
            "use another --dtype, or look at the adapter"
        )


def _at_least_zero(value: Tensor) -> float:
    """KL is never negative; a sum of rounded terms may be, by less than 1e-15."""
    return max(0.0, float(value))
