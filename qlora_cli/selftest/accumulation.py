"""Four forward passes of one row make the step that one forward pass of four rows makes."""

from __future__ import annotations

import torch

from qlora_cli.model.adapter import read_adapter_tensors
from qlora_cli.selftest.differences import largest, relative_to_largest
from qlora_cli.selftest.events import Measured
from qlora_cli.selftest.workbench import Workbench
from qlora_cli.training.events import Event, StepDone
from qlora_cli.training.run import train

_ROWS = 4  # an epoch is one step, so that both runs have the same rows in it, and of different lengths
_STEPS = 3
# float32 sums in another order. The loss is a mean of some 70 terms, each off by about 1e-7 of itself.
LOSS_BOUND = 1e-5
# AdamW divides a gradient by its own size, so that an entry near zero, whose noise is large for it, moves as far as
# any other: noise in the gradient of 1e-7 is up to 1e-4 in the adapter. Means of means in place of one mean make the
# loss 3e-3 and the adapter 2.
ADAPTER_BOUND = 1e-3


def check_accumulation(bench: Workbench) -> Measured:
    """Compare every step's loss, relatively, and the adapter, relative to the largest entry of each tensor."""
    wanted_losses, wanted = _trained(bench, batch=_ROWS, accumulation=1)
    got_losses, got = _trained(bench, batch=1, accumulation=_ROWS)
    loss = largest(abs(a - b) / abs(b) for a, b in zip(got_losses, wanted_losses, strict=True))
    adapter = largest(relative_to_largest(got[key], wanted[key]) for key in wanted)
    return Measured(
        loss <= LOSS_BOUND and adapter <= ADAPTER_BOUND,
        figure={"loss": loss, "adapter": adapter},
        bound={"loss": LOSS_BOUND, "adapter": ADAPTER_BOUND},
        detail=f"{_STEPS} steps of {_ROWS} rows of different lengths, float32, one by one and in one batch: the loss "
        f"differs by {loss:.1e} of itself at most, the adapter by {adapter:.1e} of a tensor's largest entry",
    )


def _trained(bench: Workbench, *, batch: int, accumulation: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the steps, and the adapter's tensors."""
    steps: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(event.loss)

    recipe = bench.recipe(
        f"accumulation-{batch}x{accumulation}",
        rows=_ROWS,
        quantization={"compute_dtype": "float32"},
        training={
            "max_steps": _STEPS,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "optimizer": "adamw_torch",
        },
    )
    return steps, read_adapter_tensors(train(recipe, listeners=[listen]).adapter)
