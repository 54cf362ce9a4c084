"""The run folder: what is in it, and when it may be written.

recipe.yaml   run.json   metrics.jsonl   adapter/   checkpoints/step-000050/   .lock
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_cli.disk import append_text, make_folder, write_text
from qlora_cli.errors import OutputError
from qlora_cli.training.events import BenchmarkRecord, EvalRecord, Event, StepSkipped, TrainRecord

_EVENTS = ("train", "skipped", "eval", "benchmark")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def answers(self) -> Path:
        """Where a scoring keeps what the model has answered, until it is done."""
        return self.path / "answers"

    def holds_a_run(self) -> bool:
        """Whether anything that a run writes is already there."""
        return any(p.exists() for p in (self.recipe, self.record, self.metrics, self.adapter, self.checkpoints))

    def may_hold_a_result(self) -> bool:
        """Whether there is a trained adapter; one that cannot be looked at now may be one."""
        try:
            return any(path.suffix == ".safetensors" for path in self.adapter.iterdir())
        except FileNotFoundError:
            return self.adapter.is_symlink()
        except OSError:
            return True

    def check(self, *, resume: bool) -> None:
        """Refuse a folder that must not be written, before anything is loaded.

        Raises:
            OutputError: if it holds a run and `resume` is off or the reverse, is no folder, or cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"output_dir: {self.path} is a file; expected a folder, or nothing, there")
        existing = self.path
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise OutputError(f"output_dir: {existing} is no folder, so {self.path} cannot be made")
        if resume and not self.holds_a_run():
            raise OutputError(
                f"--resume: {self.path.resolve()} holds no run. output_dir is relative to the folder that the command "
                "is run in: look at that and at --output-dir, or leave --resume out to begin"
            )
        if self.holds_a_run() and not resume:
            raise OutputError(
                f"output_dir: {self.path} already holds a run. Add --resume to go on with it, name another folder "
                "with --output-dir, or delete it if no run is at work there"
            )
        if not os.access(existing, os.W_OK):
            raise OutputError(f"output_dir: {existing} cannot be written")

    def take_back(self) -> None:
        """Remove what a run that has trained nothing has put here; what cannot be removed stays."""
        for path in (self.recipe, self.record, self.metrics):
            with contextlib.suppress(OSError):  # what the run failed of is told, such as a disk that became read-only
                path.unlink(missing_ok=True)
        for path in (self.checkpoints, self.answers):
            with contextlib.suppress(OSError):  # there is something else in it
                path.rmdir()

    def create(self) -> None:
        """Make the folder and its checkpoint folder."""
        make_folder(self.checkpoints)


@dataclass
class MetricsFile:
    """Appends records to `metrics.jsonl`, one JSON object a line."""

    path: Path

    def clear(self) -> None:
        """Forget every record: the run begins."""
        if self.path.exists():
            write_text(self.path, "")

    def keep_until(self, step: int, evaluated_step: int | None) -> None:
        """Forget records after `step`, evaluations after `evaluated_step`, and a line cut short by a kill: a resumed
        run writes them again."""
        if not self.path.exists():
            return
        evaluated = -1 if evaluated_step is None else evaluated_step
        last = {"train": step, "skipped": step, "eval": evaluated, "benchmark": step}
        kept = [line + "\n" for line, record in self._records() if record["step"] <= last[record["event"]]]
        write_text(self.path, "".join(kept))

    def benchmarks(self) -> list[BenchmarkRecord]:
        """What was scored, in the order of the lines, that of which a resumed run will be before among it."""
        found = []
        for _, record in self._records():
            if record.pop("event") == "benchmark":
                with contextlib.suppress(TypeError):  # a damaged disk has changed its names
                    found.append(BenchmarkRecord(**record))
        return found

    def held_out_losses(self) -> list[tuple[int, float]]:
        """The step and the loss of every evaluation, in the order of the lines."""
        records = [record for _, record in self._records() if record["event"] == "eval"]
        return [(r["step"], r["eval_loss"]) for r in records if isinstance(r.get("eval_loss"), float)]

    def _records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every whole line, and what it says; what is no record, as a kill or a damaged disk leaves, is left out."""
        for raw in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                line = raw.decode()
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and record.get("event") in _EVENTS and isinstance(record.get("step"), int):
                yield line, record

    def __call__(self, event: Event) -> None:
        match event:
            case TrainRecord():
                self._append("train", event)
            case StepSkipped():
                self._append("skipped", event)
            case EvalRecord():
                self._append("eval", event)
            case BenchmarkRecord():
                self._append("benchmark", event)

    def _append(self, name: str, record: TrainRecord | StepSkipped | EvalRecord | BenchmarkRecord) -> None:
        line = json.dumps({"event": name, **asdict(record)})
        append_text(self.path, line + "\n")
