"""The recipe's words become a plan of steps."""

from __future__ import annotations

from qlora_cli.recipe.schema import TrainingSection
from qlora_cli.training.schedule import step_plan, total_steps
from tests.support.rows import fake_units

SECTION = TrainingSection(per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=2, seed=7)


def test_steps_are_of_rows_or_of_packs() -> None:
    """48 rows in steps of 2 × 3 on one process and on two; packed in fours they are 12, and a quarter of the steps."""
    rows = fake_units([5] * 48)
    assert total_steps(SECTION, step_plan(SECTION, rows, 1)) == 16
    assert total_steps(SECTION, step_plan(SECTION, rows, 2)) == 8
    plan = step_plan(SECTION, fake_units([5] * 48, pack_to=20), 1)
    assert total_steps(SECTION, plan) == 4
    assert [len(plan.units.rows_of(i)) for micro in plan.step(3) for i in micro.indices] == [4] * 6


def test_an_epoch_follows_the_weights() -> None:
    """12 rows twice and 24 rows at a quarter: 30 rows an epoch, 5 steps of 6."""
    plan = step_plan(SECTION, fake_units([5] * 12, [6] * 24, weights=[2, 0.25]), 1)
    assert plan.steps_per_epoch == 5
