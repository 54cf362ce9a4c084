"""The rehearsal finds what would fail hours later, and leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from qlora_cli.data.batches import Batch
from qlora_cli.recipe.schema import OptimizerName
from qlora_cli.training import gradients as gradients_module
from qlora_cli.training import rehearsal as rehearsal_module
from qlora_cli.training.checkpoint import RandomStates
from qlora_cli.training.events import Event, Rehearsed
from qlora_cli.training.loss import supervised_loss
from qlora_cli.training.run import train
from tests.support.rehearsals import REHEARSING, bits, into, with_extremes
from tests.support.runs import read_metrics, tiny_recipe

CPU = torch.device("cpu")
NAMES: tuple[str, ...] = OptimizerName.__args__


def _losses(run: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(run, "train")]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("optimizer", NAMES)
def test_a_run_ends_in_the_same_bits_with_it_and_without(optimizer: str, packing: bool, tmp_path: Path) -> None:
    """Every optimizer, rows and packs, with dropout, accumulation and an evaluation; rehearsed at the start, or at the
    start and where the run goes on: adapter, optimizer state, random states, losses and gradient norms are the same."""
    recipe = tiny_recipe(
        tmp_path,
        rows=20,
        lora={"dropout": 0.2, "rank": 64},
        dataset={"packing": packing, "max_length": 64},
        training={"optimizer": optimizer, "max_steps": 4, "gradient_accumulation_steps": 2, "eval_steps": 2}
        | {"per_device_train_batch_size": 2, "gradient_checkpointing": packing},
    )
    train(into(recipe, tmp_path / "plain"), rehearse=False)
    train(into(recipe, tmp_path / "rehearsed"))
    events: list[Event] = []
    train(into(recipe, tmp_path / "resumed", max_steps=2))
    train(into(recipe, tmp_path / "resumed"), resume=True, listeners=[events.append])
    assert [type(event) for event in events].count(Rehearsed) == 1
    for name in ("rehearsed", "resumed"):
        assert bits(tmp_path / name) == bits(tmp_path / "plain")
        assert _losses(tmp_path / name) == _losses(tmp_path / "plain")


class _Seen(NamedTuple):
    """A batch that went through the model."""

    shape: tuple[int, ...]
    supervised: int


def _seen(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[_Seen]:
    """The batches whose loss a module computes."""
    seen: list[_Seen] = []

    def note(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(_Seen(tuple(batch.input_ids.shape), batch.supervised_tokens))
        return supervised_loss(model, batch)

    monkeypatch.setattr(module, "supervised_loss", note)
    return seen


@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_tried_is_the_worst_to_come(accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First a small batch, so that the optimizer's state is there; then that with the most to learn and the longest,
    each after a small one where gradients are accumulated; then the longest held-out one. Over the epoch that follows,
    no batch is larger in either sense."""
    training = {"max_steps": 18 // accumulation, "per_device_train_batch_size": 2, "optimizer": "adamw_torch"}
    recipe = tiny_recipe(
        tmp_path, rows=30, training=training | {"gradient_accumulation_steps": accumulation, "eval_steps": None}
    )
    trained, held_out = _seen(monkeypatch, gradients_module), _seen(monkeypatch, rehearsal_module)
    events: list[Event] = []
    train(with_extremes(recipe), listeners=[events.append])
    tried, steps = trained[: 1 + 2 * accumulation], trained[1 + 2 * accumulation :]
    assert len(steps) == 18

    def tokens(batch: _Seen) -> int:
        return batch.shape[0] * batch.shape[1]

    assert tokens(tried[0]) == min(map(tokens, steps))
    assert tried[1:-1] == [tried[0]] * (accumulation - 1) + [tried[accumulation]] + [tried[0]] * (accumulation - 1)
    assert tried[accumulation].supervised == max(batch.supervised for batch in steps)
    assert tokens(tried[-1]) == max(map(tokens, steps))
    assert tried[-1].supervised < tried[accumulation].supervised
    (told,) = (event for event in events if isinstance(event, Rehearsed))
    assert (told.rows, told.tokens) == tried[-1].shape
    assert [batch.shape[0] for batch in held_out] == [2]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["timings"]["rehearsal"] == vars(told)
    weights = (tmp_path / "run" / "checkpoints" / "step-000018" if accumulation == 1 else tmp_path / "run").rglob("*")
    assert told.checkpoint_bytes > sum(path.stat().st_size for path in weights if path.name == "optimizer.safetensors")


def test_it_draws_nothing(tmp_path: Path) -> None:
    """Random states before and after it are the same, with dropout inside."""
    states: list[RandomStates] = []

    def note(event: Event) -> None:
        if event == REHEARSING or isinstance(event, Rehearsed):
            states.append(RandomStates.here(CPU))

    train(tiny_recipe(tmp_path, lora={"dropout": 0.3}, training={"max_steps": 1}), listeners=[note])
    before, after = states
    assert before.numbers == after.numbers
    assert all(torch.equal(tensor, after.tensors[name]) for name, tensor in before.tensors.items())


def test_with_no_step_left_there_is_none(tmp_path: Path) -> None:
    """A complete run that is resumed is complete: nothing is tried."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 1})
    train(recipe)
    events: list[Event] = []
    train(recipe, resume=True, listeners=[events.append])
    assert REHEARSING not in events
