"""The loop is a plain training loop, whatever way the rows are cut into micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from qlora_cli.data.batches import StepPlan, collate
from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.units import row_units
from qlora_cli.model.base import load_base
from qlora_cli.model.inject import inject
from qlora_cli.model.lora import lora_layers, lora_parameters
from qlora_cli.model.source import ModelSource, load_tokenizer
from qlora_cli.model.storage import compute_dtype
from qlora_cli.recipe.schema import Recipe, TrainingSection
from qlora_cli.training.checkpoint import Progress
from qlora_cli.training.events import Emitter, Event, StepDone
from qlora_cli.training.loop import Loop
from qlora_cli.training.loop_parts import LoopData, LoopOutput
from qlora_cli.training.optim import build_optimizer
from qlora_cli.training.schedule import learning_rate, seed_step, total_steps
from tests.support.encoded import encode_training_rows
from tests.support.rows import fake_units
from tests.support.runs import tiny_recipe

CPU = torch.device("cpu")


def _encode(recipe: Recipe) -> tuple[EncodedRows, int]:
    tokenizer = load_tokenizer(ModelSource(recipe.base_model))
    return encode_training_rows(recipe.dataset, tokenizer), tokenizer.pad_token_id


class _Recorder(torch.optim.SGD):
    """Keeps the gradients of each step and changes nothing."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1.0)
        self.steps: list[list[torch.Tensor]] = []

    def step(self, closure: Any = None) -> None:
        self.steps.append([p.grad.clone() for group in self.param_groups for p in group["params"]])


def _one_step(recipe: Recipe, folder: Path) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the first optimizer step of a recipe."""
    model = load_base(ModelSource(recipe.base_model), recipe.quantization, CPU)
    inject(model, recipe.lora, compute_dtype=compute_dtype(recipe.quantization), seed=0)
    torch.manual_seed(3)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)  # with B at zero, A has no gradient to compare
    rows, pad = _encode(recipe)
    optimizer = _Recorder(lora_parameters(model))
    events: list[Event] = []
    output = LoopOutput(folder, dict, Emitter([events.append]))
    section = recipe.training.model_copy(update={"max_steps": 1})
    Loop(
        Accelerator(cpu=True), model, optimizer, section, LoopData(row_units(rows), None, pad), output, Progress()
    ).run()
    loss = next(event.loss for event in events if isinstance(event, StepDone))
    return loss, optimizer.steps[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_four_unequal_micro_batches_are_one_batch(tmp_path: Path, checkpointing: bool) -> None:
    """8 rows as 4 × 2, whose supervised tokens differ, and as 1 × 8: the same loss and gradients, to float32 noise.
    A mean of per-batch means would be off by percents."""
    results = []
    for batch, accumulation in ((2, 4), (8, 1)):
        training = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_checkpointing": checkpointing,
            "max_grad_norm": None,
        }
        recipe = tiny_recipe(tmp_path, rows=8, validation_rows=0, training=training)
        results.append(_one_step(recipe, tmp_path / f"checkpoints-{batch}"))
    rows, _ = _encode(recipe)
    plan = StepPlan(row_units(rows), 2, accumulation=4, seed=recipe.training.seed)
    counts = [collate(plan.units, micro.indices, 0).supervised_tokens for micro in plan.step(0)]
    assert len(set(counts)) > 1, "the micro-batches must differ, or the test shows nothing"
    (loss_a, grads_a), (loss_b, grads_b) = results
    assert loss_a == pytest.approx(loss_b, rel=1e-6)
    for a, b in zip(grads_a, grads_b, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_checkpointing_draws_the_same_dropout_twice(tmp_path: Path) -> None:
    """Recomputed activations use the masks of the first pass: the gradients are bit for bit those without it."""
    results = []
    for checkpointing in (False, True):
        training = {"gradient_checkpointing": checkpointing, "max_grad_norm": None}
        recipe = tiny_recipe(tmp_path, rows=8, validation_rows=0, lora={"dropout": 0.5}, training=training)
        results.append(_one_step(recipe, tmp_path / f"checkpoints-{checkpointing}"))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_losses_are_those_of_a_plain_loop_over_peft(tmp_path: Path) -> None:
    """Eight steps with accumulation, clipping and warmup: PEFT's layers, transformers' model, torch's AdamW, and a
    loop written out below give the same losses and gradient norms to 1e-4 (float32, NF4 base)."""
    training = {
        "optimizer": "adamw_torch",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 3,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.5,
        "weight_decay": 0.01,
        "gradient_checkpointing": False,
    }
    recipe = tiny_recipe(tmp_path, rows=20, validation_rows=0, training=training)
    rows, pad = _encode(recipe)
    section = recipe.training

    model = load_base(ModelSource(recipe.base_model), recipe.quantization, CPU)
    inject(model, recipe.lora, compute_dtype=torch.float32, seed=section.seed)
    start = [(layer.lora_A.detach().clone(), layer.lora_B.detach().clone()) for layer in lora_layers(model).values()]
    events: list[Event] = []
    output = LoopOutput(tmp_path / "checkpoints", dict, Emitter([events.append]))
    optimizer = build_optimizer(section, lora_parameters(model), CPU)
    Loop(
        Accelerator(cpu=True), model, optimizer, section, LoopData(row_units(rows), None, pad), output, Progress()
    ).run()
    ours = [(event.loss, event.grad_norm) for event in events if isinstance(event, StepDone)]

    base = load_base(ModelSource(recipe.base_model), recipe.quantization, CPU)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, target_modules=names)
    reference = peft.get_peft_model(base, config).train()
    layers = [m for m in reference.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    with torch.no_grad():
        for layer, (a, b) in zip(layers, start, strict=True):
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    trained = [p for p in reference.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, weight_decay=0.01, betas=(0.9, 0.999))
    plan = StepPlan(row_units(rows), 3, accumulation=2, seed=section.seed)
    for step in range(8):
        batches = [collate(plan.units, micro.indices, pad) for micro in plan.step(step)]
        tokens = sum(batch.supervised_tokens for batch in batches)
        total = 0.0
        for batch in batches:
            logits = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.5).item()
        for group in adamw.param_groups:
            group["lr"] = learning_rate(section, step, 8)
        adamw.step()
        adamw.zero_grad()
        assert ours[step][0] == pytest.approx(total, rel=1e-4)
        assert ours[step][1] == pytest.approx(norm, rel=1e-3)
    assert ours[-1][0] < ours[0][0] - 0.2, "it must learn, or equal losses show nothing"


def test_steps_follow_epochs_and_max_steps(tmp_path: Path) -> None:
    """Half an epoch of 32 rows in batches of 4 is 4 steps; a short epoch still has one."""
    recipe = tiny_recipe(tmp_path, rows=32, validation_rows=0)
    rows, _ = _encode(recipe)

    def steps(**training: Any) -> int:
        section = TrainingSection.model_validate({"per_device_train_batch_size": 4} | training)
        return total_steps(section, StepPlan(row_units(rows), 4, section.gradient_accumulation_steps))

    assert steps() == 8
    assert steps(num_train_epochs=0.5) == 4
    assert steps(num_train_epochs=2.0, gradient_accumulation_steps=3) == 6
    assert steps(num_train_epochs=0.001) == 1
    assert steps(max_steps=3) == 3
    assert steps(num_train_epochs=1.1, per_device_train_batch_size=4) == 9
    plan = StepPlan(fake_units([1] * 50), 1)
    assert total_steps(TrainingSection(num_train_epochs=1.1), plan) == 55  # not the 56 of 55.00000000000001


def test_random_draws_depend_on_seed_step_and_process_alone() -> None:
    """Whatever was drawn before, a step draws the same; another step, seed or process draws otherwise."""

    def draw(*key: int) -> float:
        seed_step(*key)
        return torch.rand(1).item()

    torch.rand(17)
    first = draw(42, 5, 0)
    torch.rand(3)
    assert draw(42, 5, 0) == first
    assert len({first, draw(42, 6, 0), draw(43, 5, 0), draw(42, 5, 1)}) == 4
