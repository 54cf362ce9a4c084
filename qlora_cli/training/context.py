"""What the parts of one run share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from qlora_cli.model.source import ModelSource
from qlora_cli.training.events import Emitter
from qlora_cli.training.manifest import Fault
from qlora_cli.training.record import RunRecord
from qlora_cli.training.resume import Resumed
from qlora_cli.training.run_folder import RunFolder


@dataclass(frozen=True)
class RunContext:
    """Where a run happens, and whom it tells.

    Attributes:
        resuming: whether it goes on with what is in the folder.
        resumed: the checkpoint that it goes on from; None if it begins, or begins again.
        passed_over: what is wrong with each newer checkpoint.
    """

    source: ModelSource
    folder: RunFolder
    accelerator: Accelerator
    emit: Emitter
    record: RunRecord
    resuming: bool
    resumed: Resumed | None
    passed_over: Mapping[Path, Fault]
