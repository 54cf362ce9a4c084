"""A run that is killed and gone on with ends in the bits of one that never was."""

from __future__ import annotations

from pathlib import Path

from qlora_cli.selftest.child import losses, train_and_kill
from qlora_cli.selftest.events import Measured
from qlora_cli.selftest.workbench import Workbench, digest
from qlora_cli.training.events import Event, Started
from qlora_cli.training.run import train
from qlora_cli.training.run_folder import RunFolder

_AFTER_STEP = 3
_MORE_STEPS = 3
_ENDLESS = 100_000  # steps: it is killed, however fast the device


def check_killed(bench: Workbench) -> Measured:
    """Kill a training process, resume its run here, and compare with a run of as many steps that nobody touched."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 2}
    killed = bench.recipe("killed", rows=12, lora={"dropout": 0.1}, training=settings | {"max_steps": _ENDLESS})
    killed_after = train_and_kill(bench, killed, after_step=_AFTER_STEP)

    # At a constant rate a longer run begins as a shorter one: how many steps there are is known only now.
    steps = settings | {"max_steps": killed_after + _MORE_STEPS}
    began: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, Started):
            began.append(event.first_step)

    resumed = bench.recipe("killed", rows=12, lora={"dropout": 0.1}, training=steps)
    unbroken = bench.recipe("unbroken", rows=12, lora={"dropout": 0.1}, training=steps)
    got = digest(train(resumed, resume=True, listeners=[listen]).adapter)
    wanted = digest(train(unbroken).adapter)
    got_losses, wanted_losses = (losses(RunFolder(Path(recipe.output_dir))) for recipe in (resumed, unbroken))

    faults = []
    if got != wanted:
        faults.append(f"the adapter has SHA-256 {got}, that of an unbroken run {wanted}")
    if got_losses != wanted_losses:
        faults.append("metrics.jsonl has not the steps and losses of an unbroken run")
    if began == [0]:
        faults.append("no checkpoint was found to go on from")
    done = f"killed after step {killed_after}, resumed after step {began[0]} of {steps['max_steps']}"
    return Measured(
        not faults,
        figure={"sha256": got},
        bound={"sha256": wanted},
        detail=f"{done}: {'; '.join(faults) or f'the adapter has the SHA-256 of an unbroken run, {wanted}'}",
    )
