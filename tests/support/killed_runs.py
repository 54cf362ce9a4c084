"""Runs that are killed, or whose disk fails, again and again, until they come to their end.

    python -m tests.support.killed_runs FOLDER WAY=COUNT...

WAY is `kills`: COUNT of them, at places of the disk and at moments, many of them one after the other in one run; `full`
or `read-only`: a disk that is so at a place, or from it on; `power`: power cuts; `small`: disks of several sizes that
are too small, where one may be mounted. COUNT 0 is every place there is.

Run as a process of its own, with one torch thread. Prints one JSON line for each run that was brought to its end: what
befell it on the way, and what is wrong with what it came to, which is nothing.
"""

from __future__ import annotations

import errno
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.run import train
from tests.support.disk_hooks import counting, dying_at, failing_at
from tests.support.finished_runs import FinishedRun, newest_whole, records
from tests.support.forked_training import ForkedTraining, Part
from tests.support.power_cut import WAYS, cutting_at
from tests.support.runs import tiny_recipe
from tests.support.small_disk import mounted

_SLACK = 1.1  # of the time that a run takes: some kills come too late
_COMMON = {"num_train_epochs": 3, "max_steps": None, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
_COMMON |= {"save_steps": 3, "save_total_limit": 2, "gradient_checkpointing": True}
_ROWS = {"optimizer": "paged_adamw_32bit", "eval_steps": 5, "lr_scheduler_type": "cosine"}
_PACKS = {"optimizer": "adamw_8bit", "eval_steps": 3, "logging_steps": 2}
_HOWS = ("before", "after", "torn")

Told = dict[str, Any]


def recipes(folder: Path) -> list[Recipe]:
    """Two runs of three epochs that end between two saves: on rows, and on packs, evaluated where they are saved."""
    shared: dict[str, Any] = {"validation_rows": 4, "lora": {"dropout": 0.1, "rank": 64}}
    rows = tiny_recipe(folder, rows=15, **shared, training=_COMMON | _ROWS)
    packed = {"packing": True, "max_length": 64}
    return [rows, tiny_recipe(folder, rows=40, **shared, dataset=packed, training=_COMMON | _PACKS)]


def recipes_for_small_disks(folder: Path) -> list[Recipe]:
    """One that needs most room for its checkpoints, and one for its adapter, as it is saved at the end alone."""
    shared: dict[str, Any] = {"rows": 15, "validation_rows": 4}
    often, once = _COMMON | _ROWS, _COMMON | _ROWS | {"save_steps": None}
    return [tiny_recipe(folder, **shared, training=training) for training in (often, once)]


class Trials:
    """Runs of one recipe that something befalls, beside the one that nothing befell."""

    def __init__(self, folder: Path, recipe: Recipe, *, rehearse: bool = True) -> None:
        folder.mkdir()
        self.training = ForkedTraining(folder / "root", recipe, rehearse=rehearse)
        self.image = folder / "image"
        self.training.clear()
        train(self.training.recipe)  # imports what every other then has
        self.training.clear()
        part = self.training.part(counting)
        self.seconds: float = part.value("seconds")
        self.places: list[str] = part.values("call")
        self.steps: int = part.value("step")
        self.whole = FinishedRun.of(self.training.folder)

    def killed(self, kills: list[Callable[[], Part]]) -> Told:
        """A run that is killed so often, and then left alone; a part that its kill comes too late for ends it."""
        self.training.clear()
        parts = []
        for kill in kills:
            parts.append(kill())
            if not parts[-1].killed:
                break
        else:
            parts.append(self.training.part())
        return self._told(parts)

    def at_place(self, number: int, how: str) -> Part:
        """A part that is killed at a place of the disk."""
        return self.training.part(lambda tell: dying_at(number, how, tell))

    def at_moment(self, seconds: float) -> Part:
        """A part that is killed so many seconds after it began."""
        return self.training.part(kill_after=seconds)

    def without_power(self, number: int, way: str) -> Part:
        """A part whose machine loses its power at a place: the disk then holds what it held for certain."""
        root = self.training.root
        part = self.training.part(lambda tell: cutting_at(number, way, root, self.image, tell))
        if part.killed:
            shutil.rmtree(root)
            self.image.rename(root)
        return part

    def failing(self, number: int, error: int, *, lasting: bool) -> Told:
        """A run whose disk fails at a place or from it on, and which goes on once it is mended."""
        self.training.clear()
        return self._mended(self.training.part(lambda tell: failing_at(number, error, lasting=lasting, tell=tell)))

    def on_small_disk(self, size: int) -> Told:
        """A run on a disk of so many bytes, which is made larger when it is full."""
        self.training.clear()
        with mounted(self.training.root, size) as grow:
            part = self.training.part()
            grow(1 << 26)
            return self._mended(part)

    def _mended(self, part: Part) -> Told:
        """Go on with a run whose disk had failed, unless that was nothing to it."""
        wrong = [] if part.code == 0 else self._badly_failed(part)
        told = self._told([part] if part.code == 0 else [part, self.training.part()])
        return told | {"wrong": wrong + told["wrong"], "message": part.value("error")}

    def _badly_failed(self, part: Part) -> list[str]:
        """What is wrong with how a part ended whose disk failed."""
        run = self.training.folder
        found = [] if (part.code, part.value("kind")) == (1, "RunError") else [f"{part.code}: {part.value('error')}"]
        if newest_whole(run) < (part.value("saved") or 0):
            found.append(f"step {part.value('saved')} was saved and is not there")
        if run.metrics.exists():
            records(run.metrics)
        return found

    def _told(self, parts: list[Part]) -> Told:
        wrong = [] if parts[-1].code == 0 else [f"going on failed: {parts[-1].value('error')}"]
        wrong += self.whole.differences(self.training.folder)
        lost, resumed, reached, saved = 0, [], 0, 0
        for number, part in enumerate(parts):
            first = part.value("first_step")
            if first is None:  # it was killed before it had begun
                continue
            lost += reached - first
            if number:
                resumed += [line["seconds"] for line in part.told if "seconds" in line][:1]
            if first < saved:
                wrong.append(f"step {saved} was saved, and it went on from {first}")
            reached, saved = part.value("step") or first, part.value("saved") or first
        befell = [part.value("place") or "at a moment" for part in parts if part.code != 0]
        return {"befell": befell, "wrong": wrong, "steps_lost": lost, "resume_seconds": resumed}


def _some_kills(trial: Trials, number: int, draw: random.Random) -> list[Callable[[], Part]]:
    """The kills of the run of that number: where it is killed first is spread over all places, whatever the count."""
    how = _HOWS[number % 3]
    places = [place for place, name in enumerate(trial.places, 1) if how != "torn" or name == "write"]
    place = places[int(number * 0.618034 % 1 * len(places))]

    def at_a_place() -> Part:
        return trial.at_place(place, how)

    def at_a_moment() -> Part:
        return trial.at_moment(draw.uniform(0, _SLACK * trial.seconds))

    def again_at_a_place() -> Part:
        return trial.at_place(draw.randrange(1, 40), draw.choice(_HOWS))

    def again_at_a_moment() -> Part:
        return trial.at_moment(draw.uniform(0, trial.seconds / 2))

    ways = [
        [at_a_place],
        [at_a_moment],
        [at_a_place, again_at_a_place],
        [at_a_moment, again_at_a_moment],
        [at_a_place, again_at_a_moment, again_at_a_place],
    ]
    return ways[number % len(ways)]


def kills(trials: list[Trials], count: int, draw: random.Random) -> Iterator[Told]:
    """Until so many have been killed: at a place, at a moment, and again while it goes on."""
    done = number = 0
    while done < count:
        trial = trials[number % len(trials)]
        told = trial.killed(_some_kills(trial, number, draw)[: count - done])
        done += len(told["befell"])
        number += 1
        yield told


def at_places(trials: list[Trials], count: int, befall: Callable[[Trials, int, int], Told]) -> Iterator[Told]:
    """So many runs, or one for each place, that something befalls at places spread over all."""
    for index, trial in enumerate(trials):
        places = len(trial.places)
        share = places if count == 0 else count // len(trials) + (index < count % len(trials))
        for number in range(share):
            yield befall(trial, 1 + number * places // share, number)


def small_disks(trials: list[Trials], count: int) -> Iterator[Told]:
    """So many sizes, up to what a run leaves and a little more."""
    for trial in trials:
        needed = sum(path.stat().st_size for path in trial.training.root.rglob("*"))
        for number in range(count // len(trials)):
            yield trial.on_small_disk(4096 * (4 + number * needed // 4096 // (count // len(trials))))


def _power(trial: Trials, place: int, number: int) -> Told:
    return trial.killed([lambda: trial.without_power(place, WAYS[number % 3])])


def _trials(folder: Path, recipes: list[Recipe], *, rehearse: bool = True) -> list[Trials]:
    folder.mkdir()
    return [Trials(folder / str(index), recipe, rehearse=rehearse) for index, recipe in enumerate(recipes)]


def main(folder: Path, ways: list[str]) -> None:
    torch.set_num_threads(1)
    counts = {way: int(count) for way, count in (word.split("=") for word in ways)}
    small = counts.pop("small", 0)
    trials = _trials(folder / "other", recipes(folder)) if counts else []
    do: dict[str, Callable[[int], Iterator[Told]]] = {
        "kills": lambda count: kills(trials, count, random.Random(7)),
        "full": lambda count: at_places(
            trials, count, lambda trial, place, n: trial.failing(place, errno.ENOSPC, lasting=n % 2 == 0)
        ),
        "read-only": lambda count: at_places(
            trials, count, lambda trial, place, n: trial.failing(place, errno.EROFS, lasting=True)
        ),
        "power": lambda count: at_places(trials, count, _power),
        # A rehearsal would refuse such a disk.
        "small": lambda count: small_disks(
            _trials(folder / "small", recipes_for_small_disks(folder), rehearse=False), count
        ),
    }
    for way, count in [*counts.items(), *([("small", small)] if small else [])]:
        for told in do[way](count):
            sys.stdout.write(json.dumps({"way": way} | told) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
