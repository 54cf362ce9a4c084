"""Trainings in processes forked off this one, which is quick, and what they tell before they end or are killed.

The process that forks has one torch thread: others would not be there in what is forked off.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from qlora_cli.errors import QloraError
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.events import CheckpointSaved, Event, Notice, Started, StepDone
from qlora_cli.training.run import train
from qlora_cli.training.run_folder import RunFolder
from tests.support.disk_hooks import Act, DiskHooks, Tell, write_now

# Its own lock is shared by all that is forked off: one that is killed while it holds that would stop all the others.
tqdm.set_lock(threading.RLock())


@dataclass
class Part:
    """One process of a run: what it told, in order, and its exit code, or the number of its signal below zero."""

    told: list[dict[str, Any]] = field(default_factory=list)
    code: int = 0

    def value(self, name: str) -> Any:
        """The last one of that name, None if there was none."""
        return next((line[name] for line in reversed(self.told) if name in line), None)

    def values(self, name: str) -> list[Any]:
        """All of that name."""
        return [line[name] for line in self.told if name in line]

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class ForkedTraining:
    """Trains one recipe into the folder `run` in `root`, which is empty at first, part by part."""

    def __init__(self, root: Path, recipe: Recipe, *, rehearse: bool = True) -> None:
        self.root = root
        self.rehearse = rehearse
        self.folder = RunFolder(root / "run")
        self.recipe = recipe.model_copy(update={"output_dir": str(self.folder.path)})

    def clear(self) -> None:
        """Nothing was trained yet."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()

    def part(self, act: Callable[[Tell], Act] | None = None, *, kill_after: float | None = None) -> Part:
        """Train, or go on if there is something to go on with; wait for the end.

        Args:
            act: what is done at each place of the disk.
            kill_after: seconds until it is killed, if it has not ended by then.
        """
        resume = self.folder.holds_a_run()
        reading, writing = os.pipe()
        began = time.monotonic()
        child = os.fork()
        if not child:
            self._train(act, resume, writing, began)
        os.close(writing)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reading) as pipe:
            told = [json.loads(line) for line in pipe]
        return Part(told, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    def _train(self, act: Callable[[Tell], Act] | None, resume: bool, writing: int, began: float) -> NoReturn:
        """In the process that was forked off."""

        def tell(line: Mapping[str, Any]) -> None:
            write_now(writing, json.dumps(line).encode() + b"\n")

        def listen(event: Event) -> None:
            match event:
                case Started():
                    tell({"first_step": event.first_step})
                case StepDone():
                    tell({"step": event.step, "seconds": time.monotonic() - began})
                case CheckpointSaved():
                    tell({"saved": event.step})
                case Notice():
                    tell({"notice": event.text})

        try:
            if act is not None:
                DiskHooks(self.root, act(tell)).install()
            train(self.recipe, resume=resume, rehearse=self.rehearse, listeners=[listen])
            tell({"seconds": time.monotonic() - began})
        except QloraError as error:
            tell({"error": str(error), "kind": type(error).__name__})
            os._exit(error.exit_code)
        except BaseException as error:
            tell({"error": repr(error), "kind": "not ours"})
            os._exit(99)
        os._exit(0)
