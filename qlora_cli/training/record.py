"""`run.json`: what was run, on what, how it stands, and what it cost."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qlora_cli.disk import write_json
from qlora_cli.training.events import (
    EVAL_LOSS,
    BenchmarkRecord,
    BestKept,
    CheckpointSaved,
    DataReady,
    EvalRecord,
    Event,
    Finished,
    ModelReady,
    Rehearsed,
    StepSkipped,
    TrainRecord,
)


@dataclass(frozen=True)
class _Scored:
    step: int
    scores: dict[str, float | None]
    seconds: float
    partial: dict[str, Any]


@dataclass(frozen=True)
class _Best:
    step: int
    score: str
    value: float
    checkpoint: str


# What a resumed run goes on with, of what its first part had found, and as what: a file that was damaged or edited may
# hold anything.
_BEST = ("best", "best_eval")
_FOUND: dict[str, Any] = {
    "last_train": TrainRecord,
    **dict.fromkeys(("first_eval", "last_eval"), EvalRecord),
    **dict.fromkeys(("first_benchmark", "last_benchmark"), _Scored),
    **dict.fromkeys(_BEST, _Best),
    "last_checkpoint": str,
    "adapter_step": int,
}


class RunRecord:
    """Listens to a run and keeps its `run.json` current.

    Statuses are `running`, `completed`, `failed` and `interrupted`; one that says `running` with no such process was
    killed.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        previous = _read(path)
        self._path = path
        self._began = time.monotonic()
        self._data: dict[str, Any] = {
            "status": "running",
            "error": None,
            "started_at": _moment(previous.get("started_at")) or _now(),
            "finished_at": None,
            **facts,
            "data": {},
            "model": None,
            **{name: _as(kind, previous.get(name)) for name, kind in _FOUND.items()},
            "skipped_steps": 0,
            "stopped_early": None,
            "timings": {},
            "peak_memory_bytes": None,
        }

    @property
    def started_on(self) -> date:
        """The day on which the run began, of a resumed one the day of its first part."""
        return datetime.fromisoformat(self._data["started_at"]).date()

    def start_over(self) -> None:
        """Forget what an earlier part of the run found: there is nothing to go on from.

        Its day stays: the rows were rendered with that date, and would be others for the next part.
        """
        self._data |= dict.fromkeys(_FOUND)

    def go_on(self, *, skipped_steps: int, kept: Collection[str]) -> None:
        """An earlier part of the run has skipped so many steps, and has checkpoints that are kept for these names.

        One that was kept for anything else is forgotten: it may be rotated away.
        """
        self._data["skipped_steps"] = skipped_steps
        for which in _BEST:
            if self._data[which] is not None and self._data[which]["score"] not in kept:
                self._data[which] = None

    def eval_loss(self, which: str) -> float | None:
        """The held-out loss of the `last_eval`, or of a `first_eval` before the first step, if there was one."""
        record = self._data[which]
        if record is None or (which == "first_eval" and record["step"] > 0):
            return None
        return float(record["eval_loss"])

    def scores(self, which: str) -> dict[str, float | None] | None:
        """What was scored by the `first_benchmark` or the `last_benchmark`, if there was one."""
        record = self._data[which]
        return None if record is None else dict(record["scores"])

    def write(self) -> None:
        """Put what is known on disk."""
        write_json(self._path, self._data)

    def end(self, status: str, *, error: str | None = None, peak_memory_bytes: int) -> None:
        """Close the record."""
        self._data |= {"status": status, "error": error, "finished_at": _now(), "peak_memory_bytes": peak_memory_bytes}
        self._data["timings"]["total_seconds"] = time.monotonic() - self._began
        self.write()

    def __call__(self, event: Event) -> None:
        data = self._data
        match event:
            case DataReady():
                data["data"][event.split] = asdict(event)
            case ModelReady():
                data["model"] = asdict(event)
                data["timings"]["ready_seconds"] = time.monotonic() - self._began
            case StepSkipped():
                data["skipped_steps"] += 1
            case Rehearsed():
                data["timings"]["rehearsal"] = asdict(event)
                self.write()
            case TrainRecord():
                data["last_train"] = asdict(event)
            case EvalRecord():
                data["first_eval"] = data["first_eval"] or asdict(event)
                data["last_eval"] = asdict(event)
                self.write()
            case BenchmarkRecord():
                shown = {"step": event.step, "scores": dict(event.scores), "seconds": event.seconds}
                shown |= {"partial": dict(event.partial)}
                data["first_benchmark"] = data["first_benchmark"] or shown
                data["last_benchmark"] = shown
                self.write()
            case BestKept():
                best = {"step": event.step, "score": event.score, "value": event.value}
                data["best_eval" if event.score == EVAL_LOSS else "best"] = best | {"checkpoint": event.path.name}
                self.write()
            case CheckpointSaved():
                data["last_checkpoint"] = event.path.name
                self.write()
            case Finished():
                data["timings"]["training_seconds"] = event.seconds
                data |= {"adapter_step": event.adapter_step, "stopped_early": event.stopped_early}
                self.write()


def last_checkpoint(path: Path) -> str | None:
    """The name of the newest checkpoint that this record of a run tells of."""
    found = _as(_FOUND["last_checkpoint"], _read(path).get("last_checkpoint"))
    return None if found is None else str(found)


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _as(kind: Any, found: object) -> Any:
    """What was found, if it is that; else None."""
    adapter = TypeAdapter(kind)
    try:
        return adapter.dump_python(adapter.validate_json(json.dumps(found), strict=True))
    except ValidationError:
        return None


def _moment(text: object) -> str | None:
    """The text, if it is a time as `_now` writes it."""
    try:
        return datetime.fromisoformat(text).isoformat(timespec="seconds") if isinstance(text, str) else None
    except ValueError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
