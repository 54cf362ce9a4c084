"""The same recipe twice gives the same adapter, bit for bit."""

from __future__ import annotations

from qlora_cli.selftest.events import Measured
from qlora_cli.selftest.workbench import Workbench, digest
from qlora_cli.training.run import train

_STEPS = 5


def check_same_seed(bench: Workbench) -> Measured:
    """Train twice, with NF4, double quantisation, dropout, accumulation and several epochs; compare SHA-256."""
    digests = []
    for name in ("first", "second"):
        recipe = bench.recipe(
            f"same-seed-{name}",
            rows=12,
            lora={"dropout": 0.1},
            training={"max_steps": _STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        )
        digests.append(digest(train(recipe).adapter))
    first, second = digests
    found = "both adapters have" if first == second else f"the first adapter has SHA-256 {first}, the second"
    return Measured(
        first == second,
        figure={"sha256": second},
        bound={"sha256": first},
        detail=f"two runs of {_STEPS} steps in NF4 with double quantisation, dropout and accumulation: "
        f"{found} SHA-256 {second}",
    )
