"""How far apart two models' outputs are, against plain computations in double precision."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qlora_cli.merging.fidelity.divergence import divergence, move


def _scores(seed: int, positions: int = 7, classes: int = 50, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(positions, classes, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [7, 5001], ids=["one chunk", "several"])
def test_kl_is_torchs(dtype: torch.dtype, positions: int) -> None:
    """KL(trained || other) of each position is what torch's own kl_div gives in float64, however it is cut up."""
    trained, other = _scores(0, positions, 900, dtype), _scores(1, positions, 900, dtype)
    logs = [F.log_softmax(x.double(), dim=-1) for x in (other, trained)]
    expected = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence(trained, other, are_logits=True), expected, rtol=1e-12, atol=1e-14)


def test_kl_of_the_same_is_nothing() -> None:
    """Equal logits are 0 apart exactly, and so are those that both rule a token out."""
    scores = _scores(0)
    scores[:, 3] = -torch.inf
    assert not divergence(scores, scores.clone(), are_logits=True).any()


def test_hidden_states_are_compared_as_vectors() -> None:
    """Without a head, what counts is the squared distance against the trained model's own length."""
    trained, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]])
    assert divergence(trained, other, are_logits=False).item() == pytest.approx(1 / 25)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0, 2.0])
@pytest.mark.parametrize("are_logits", [True, False])
def test_a_share_of_the_change_is_found(share: float, are_logits: bool) -> None:
    """A model that went a share of the way from the base to the trained model is told to have that share, exactly."""
    trained, base = _scores(0).double(), _scores(1).double()
    found = move(trained, base, base + share * (trained - base), are_logits=are_logits)
    torch.testing.assert_close(found.along, share * found.length, rtol=1e-9, atol=1e-9)


def test_a_change_in_another_direction_is_no_share() -> None:
    """Noise that has nothing to do with what was trained adds next to nothing, though it is ten times as large."""
    base = _scores(0, 4000)
    trained = base + 0.01 * _scores(1, 4000)
    found = move(trained, base, base + 0.1 * _scores(2, 4000), are_logits=True)
    assert abs(found.along.sum() / found.length.sum()) < 0.2


def test_half_the_length_of_a_small_change_is_its_kl() -> None:
    """The measure of the change is that of KL, to first order."""
    trained = _scores(0).double()
    base = trained + 1e-4 * _scores(1)
    half = move(trained, base, trained, are_logits=True).length / 2
    torch.testing.assert_close(half, divergence(trained, base, are_logits=True), rtol=1e-2, atol=1e-12)
