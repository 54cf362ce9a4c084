"""What the training loop is given: rows to read, and where its checkpoints go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_cli.data.units import Units
from qlora_cli.training.events import Emitter


@dataclass(frozen=True)
class LoopData:
    """What the loop reads: training rows and held-out rows, in packs or not, and the token that fills short ones."""

    train: Units
    validation: Units | None
    pad_token_id: int

    def fingerprints(self) -> dict[str, str]:
        """Of the rows of each split: the same rows have the same one."""
        splits = {"train": self.train, "validation": self.validation}
        return {name: units.encoded.fingerprint for name, units in splits.items() if units is not None}


@dataclass(frozen=True)
class LoopOutput:
    """Where the loop writes checkpoints, and what is in them beside what it knows itself.

    Attributes:
        adapter: the files of the adapter as it is when this is called.
        run: what the run is made of: see `identity.run_identity`.
        durable: files that have to be on disk before a checkpoint is.
    """

    checkpoints: Path
    adapter: Callable[[], Mapping[str, bytes]]
    emit: Emitter
    run: Mapping[str, Any] = field(default_factory=dict)
    durable: Sequence[Path] = ()
