"""Whether a run that was disturbed came to what it would have come to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.training.checkpoint import checkpoint_step, list_checkpoints
from qlora_cli.training.manifest import find_fault
from qlora_cli.training.run_folder import RunFolder

_CLOCKS = ("seconds", "tokens_per_second")
_LEFTOVERS = (".writing", ".old", ".removing")


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without what a clock said."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in _CLOCKS} for line in lines]


def leftovers(folder: Path) -> list[str]:
    """What is there only while something is being written or removed."""
    found = [path for path in folder.rglob(".*") if path.name.endswith(_LEFTOVERS)]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def newest_whole(folder: RunFolder) -> int:
    """The step of the newest checkpoint that is whole, 0 if there is none."""
    return max(
        (checkpoint_step(path) for path in list_checkpoints(folder.checkpoints) if not find_fault(path)), default=0
    )


@dataclass(frozen=True)
class FinishedRun:
    """What is left of a run, without clocks: the adapter's files, the metrics, the checkpoints and their tensors."""

    adapter: Mapping[str, bytes]
    metrics: list[dict[str, Any]]
    checkpoints: Mapping[str, bytes]

    @classmethod
    def of(cls, folder: RunFolder) -> FinishedRun:
        """Read it."""
        tensors = ("adapter/adapter_model.safetensors", "optimizer.safetensors", "random.safetensors")
        kept = {f"{path.name}/{name}": (path / name).read_bytes()
                for path in list_checkpoints(folder.checkpoints) for name in tensors}  # fmt: skip
        adapter = {path.name: path.read_bytes() for path in folder.adapter.iterdir()}
        return cls(adapter, records(folder.metrics), kept)

    def differences(self, folder: RunFolder) -> list[str]:
        """What another run came to otherwise, and what it left that it should not have; none if all is well."""
        if not folder.adapter.exists():
            return ["there is no adapter"]
        found = [f"{name} is left" for name in leftovers(folder.path)]
        found += [
            f"{path.name} {fault}" for path in list_checkpoints(folder.checkpoints) if (fault := find_fault(path))
        ]
        if found:
            return found
        other = FinishedRun.of(folder)
        found += _unequal("adapter", self.adapter, other.adapter)
        found += _unequal("checkpoint", self.checkpoints, other.checkpoints)
        if self.metrics != other.metrics:
            steps = [(record["event"], record["step"]) for record in other.metrics]
            found.append(f"other metrics: {steps}")
        status = json.loads(folder.record.read_text(encoding="utf-8"))["status"]
        return found if status == "completed" else [*found, f"run.json says {status}"]


def _unequal(what: str, mine: Mapping[str, bytes], others: Mapping[str, bytes]) -> list[str]:
    return [
        f"{what} {name} is another"
        for name in sorted(mine.keys() | others.keys())
        if mine.get(name) != others.get(name)
    ]
