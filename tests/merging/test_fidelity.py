"""What is said of a merged model against a plain computation: all logits, all positions, no budget, no chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from qlora_cli.errors import MergeError, NonFiniteError
from qlora_cli.merging.fidelity.divergence import move
from qlora_cli.merging.fidelity.estimates import row_move, share_kept
from qlora_cli.merging.fidelity.held_out import CheckRow
from qlora_cli.merging.fidelity.measures import compare, record
from qlora_cli.merging.fidelity.trained import adapter_off
from qlora_cli.model.inject import inject
from qlora_cli.model.lora import lora_layers
from qlora_cli.recipe.schema import LoraSection
from tests.support.models import tiny_model


def _rows(number: int = 5, seed: int = 0) -> list[CheckRow]:
    """Rows of different lengths of which the second half counts."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(number):
        ids = torch.randint(5, 500, (8 + 3 * index,), generator=generator)
        rows.append(CheckRow(ids, torch.arange(len(ids)) >= len(ids) // 2))
    return rows


def _trained(family: str = "llama", std: float = 0.3) -> PreTrainedModel:
    model = tiny_model(family)
    inject(model, LoraSection(rank=4, alpha=8), compute_dtype=torch.float32, seed=0)
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=std)
    return model.eval()


def _merged(model: PreTrainedModel, share: float = 1.0, family: str = "llama") -> PreTrainedModel:
    """A plain model that has the given share of the adapter in its weights."""
    merged = tiny_model(family)
    for path, layer in lora_layers(model).items():
        weight = merged.get_submodule(path).weight.data
        weight += share * (layer.update() if family != "gpt2" else layer.update().t())  # Conv1D: [in, out]
    return merged


def _plain(model: PreTrainedModel, row: CheckRow) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities before each token that counts, those tokens, and the hidden states after each block there."""
    with torch.no_grad():
        logits = model(input_ids=row.ids[None]).logits[0, :-1]
        hidden: list[torch.Tensor] = []
        state = []
        for block in model.model.layers:
            state.append(
                block.register_forward_hook(lambda _, __, out: hidden.append(out[0] if out.ndim == 3 else out))
            )
        model(input_ids=row.ids[None])
        for handle in state:
            handle.remove()
    counts = row.learned[1:]
    return F.log_softmax(logits[counts].double(), -1), row.ids[1:][counts], [h[:-1][counts] for h in hidden]


def test_all_of_it_is_the_plain_computation() -> None:
    """KL, agreement, losses, their errors and the worst layer are those of a computation without any economy."""
    rows, trained = _rows(), _trained()
    merged = _merged(trained, 0.8)
    reference = record(trained, rows)
    found = compare(reference, merged, rows)

    kls, effects, agree, ours, theirs, errors = [], [], [], [], [], [[], []]
    for row in rows:
        log_t, targets, hidden_t = _plain(trained, row)
        log_m, _, hidden_m = _plain(merged, row)
        with adapter_off(trained):
            log_b, _, _ = _plain(trained, row)
        kls.append((log_t.exp() * (log_t - log_m)).sum(-1))
        effects.append((log_t.exp() * (log_t - log_b)).sum(-1))
        agree.append((log_t.argmax(-1) == log_m.argmax(-1)).double())
        ours.append(-log_m.gather(1, targets[:, None])[:, 0])
        theirs.append(-log_t.gather(1, targets[:, None])[:, 0])
        for number in range(2):
            errors[number].append((hidden_m[number] - hidden_t[number]).norm(dim=-1) / hidden_t[number].norm(dim=-1))
    kl, effect = torch.cat(kls), torch.cat(effects)
    layers = [torch.cat(error).mean().item() for error in errors]
    worst = max(range(2), key=lambda number: layers[number])
    assert (found.rows, found.tokens, found.compared_tokens, found.measure) == (5, len(kl), len(kl), "kl")
    assert found.mean_kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.max_kl == pytest.approx(kl.max().item(), rel=1e-4)
    assert reference.effect == pytest.approx(effect.mean().item(), rel=1e-4)
    assert reference.max_effect == pytest.approx(effect.max().item(), rel=1e-4)
    assert found.top1_agreement == pytest.approx(torch.cat(agree).mean().item())
    assert found.loss == pytest.approx(torch.cat(ours).mean().item(), rel=1e-5)
    assert found.trained_loss == pytest.approx(torch.cat(theirs).mean().item(), rel=1e-5)
    assert found.loss_difference == pytest.approx((torch.cat(ours) - torch.cat(theirs)).mean().item(), rel=1e-3)
    # The error of a mean of which whole rows are drawn.
    sums = torch.stack([(o - t).sum() for o, t in zip(ours, theirs, strict=True)])
    tokens = torch.tensor([len(o) for o in ours])
    spread = (sums - found.loss_difference * tokens).square().sum() * 5 / 4
    assert found.loss_difference_error == pytest.approx((spread.sqrt() / tokens.sum()).item(), rel=1e-3)
    assert found.worst_layer == f"model.layers.{worst}"
    assert found.worst_layer_error == pytest.approx(layers[worst], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_a_right_merge_is_the_trained_model(family: str) -> None:
    """Merged in float32, it has all of the effect, agrees at every token, and is off by no more than rounding."""
    rows, trained = _rows(), _trained(family)
    reference = record(trained, rows)
    found = compare(reference, _merged(trained, family=family), rows)
    assert reference.effect > 0.01
    assert found.mean_kl < 1e-9
    assert found.top1_agreement == 1
    assert found.effect_kept == pytest.approx(1, abs=1e-4)
    assert found.worst_layer_error is not None
    assert found.worst_layer_error < 1e-4


def test_a_base_without_the_adapter_has_none_of_it() -> None:
    """The plain base is as far from the trained model as the effect says, and has 0 of the effect."""
    rows, trained = _rows(), _trained()
    reference = record(trained, rows)
    found = compare(reference, tiny_model("llama"), rows)
    assert found.mean_kl == pytest.approx(reference.effect, rel=1e-6)
    assert found.effect_kept == pytest.approx(0, abs=1e-4)
    assert found.loss == pytest.approx(reference.base_loss)


def test_an_adapter_that_does_nothing_has_no_effect() -> None:
    """B = 0: the effect is 0 to the last bit, and there is no share to be kept of it."""
    rows, trained = _rows(), _trained(std=0)
    reference = record(trained, rows)
    found = compare(reference, tiny_model("llama"), rows)
    assert (reference.effect, found.effect_kept, found.effect_kept_error) == (0, None, None)


def test_rounding_is_measured() -> None:
    """What rounding of activations does by itself: next to nothing in float32, a part of a weak effect in bfloat16."""
    rows, trained = _rows(8), _trained(std=0.002)
    exact = record(trained, rows)
    assert exact.noise < 1e-4 * exact.effect
    for layer in lora_layers(trained.to(torch.bfloat16)).values():
        layer.compute_dtype = torch.bfloat16
    rounded = record(trained, rows)
    assert 0.01 * rounded.effect < rounded.noise < rounded.effect
    assert sum(row.noise for row in rounded.rows) > 0
    assert all(layer.scale == 2 for layer in lora_layers(trained).values())  # as it was


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rounding_is_not_taken_for_the_effect(share: float) -> None:
    """The effect, and what another model has of it, seen through rounding that is as large: the share comes out, where
    without a correction any model would have half of it."""
    generator = torch.Generator().manual_seed(0)
    base, effect, *noises = (0.001 * torch.randn(400, 256, generator=generator) for _ in range(6))
    trained = base + effect + noises[0]
    given, other = base + noises[1], base + share * effect + noises[2]
    noise = move(trained, base + effect + noises[3], base + effect + noises[3], are_logits=True).length.sum().item()
    moved = move(trained, given, other, are_logits=True)
    assert share_kept([row_move(moved, noise)])[0] == pytest.approx(share, abs=0.03)
    assert share_kept([row_move(moved, 0.0)])[0] == pytest.approx((1 + share) / 3, abs=0.03)


def test_a_budget_limits_what_is_compared_and_not_the_loss() -> None:
    """With room for 9 positions, 9 are compared; every loss is there all the same."""
    rows, trained = _rows(), _trained()
    whole = compare(record(trained, rows), _merged(trained, 0.5), rows)
    each = 2 * 512 * 4 + 2 * 64 * 4  # two models' logits and two blocks' states, float32
    reference = record(trained, rows, budget=9 * each + 7)
    found = compare(reference, _merged(trained, 0.5), rows)
    assert (reference.compared, found.compared_tokens, found.tokens) == (9, 9, whole.tokens)
    assert sum(len(row.scores) for row in reference.rows) == 9
    assert (found.loss, found.loss_difference) == (whole.loss, whole.loss_difference)
    assert found.mean_kl != whole.mean_kl


def test_rows_done_are_told() -> None:
    """Both passes tell how far they are."""
    rows, trained, told = _rows(3), _trained(), []
    compare(record(trained, rows, advanced=told.append), trained, rows, advanced=told.append)
    assert told == [1, 2, 3, 1, 2, 3]


def test_what_is_not_finite_is_refused() -> None:
    """NaN in the trained model and NaN in the merged one are told apart, with the row."""
    rows, trained = _rows(3), _trained()
    reference = record(trained, rows)
    broken = tiny_model("llama")
    broken.model.norm.weight.data[3] = torch.nan
    with pytest.raises(MergeError, match="the merged model, on row 1 of 3, gives NaN or infinity"):
        compare(reference, broken, rows)
    trained.model.norm.weight.data[3] = torch.nan
    with pytest.raises(NonFiniteError, match="the trained model, on row 1 of 3, gives NaN or infinity"):
        record(trained, rows)


def test_another_vocabulary_is_refused() -> None:
    """A merge that lost the rows of new tokens is not compared as if it had them."""
    rows, trained = _rows(2), _trained()
    reference = record(trained, rows)
    with pytest.raises(MergeError, match="the merged model tells 400 classes apart, the trained one 512"):
        compare(reference, tiny_model("llama", vocab_size=400), [CheckRow(row.ids % 400, row.learned) for row in rows])


def test_the_report_leaves_out_single_rows(tmp_path: Path) -> None:
    """What goes into a report is plain numbers and names."""
    rows, trained = _rows(2), _trained()
    data = compare(record(trained, rows), trained, rows).record()
    assert not {"row_losses", "row_moves"} & data.keys()
    assert all(isinstance(value, int | float | str) for value in data.values())
