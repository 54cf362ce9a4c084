"""Runs that are killed anywhere, whose machine loses its power, or whose disk fails: they go on to the same bits.

`make test-slow` kills ten times as often, and has the disk fail at ten times as many places.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import ENVIRONMENT
from tests.support.small_disk import ALONE, may_mount

QUICK = {"kills": 20, "full": 8, "read-only": 4, "power": 10}
SLOW = {"kills": 200, "full": 200, "read-only": 60, "power": 300}

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform == "win32", reason="nothing is forked there"),
]

Told = dict[str, Any]


def _harness(folder: Path, ways: dict[str, int], *alone: str, timeout: float) -> dict[str, list[Told]]:
    """What each run that was brought to its end told, by what befell it."""
    (folder / "runs").mkdir()
    program = [sys.executable, "-m", "tests.support.killed_runs", str(folder / "runs")]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)}
    done = subprocess.run(
        [*alone, *program, *(f"{way}={count}" for way, count in ways.items())],
        env=environment, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return {way: [line for line in told if line["way"] == way] for way in ways}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((QUICK, 500), id="quick"),
        pytest.param((SLOW, 7000), id="slow", marks=[pytest.mark.slow, pytest.mark.timeout(7200)]),
    ],
)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Told]]:
    """Of two recipes, with dropout, accumulation and gradient checkpointing, over three epochs: rows and packs."""
    ways, timeout = request.param
    told = _harness(tmp_path_factory.mktemp("killed"), ways, timeout=timeout)
    for way, runs in told.items():  # with -rP, or by a failure, these are shown
        seconds = sorted(chain.from_iterable(run["resume_seconds"] for run in runs))
        lost = [run["steps_lost"] for run in runs]
        befell = sum(len(run["befell"]) for run in runs)
        sys.stdout.write(
            f"{way}: {befell} in {len(runs)} runs; steps lost: {sum(lost)}, at most {max(lost)} in a run; "
            f"the first step of a resumed run after {seconds[len(seconds) // 2]:.2f} s, at most {seconds[-1]:.2f} s\n"
        )
    return told


def _wrong(runs: list[Told]) -> list[Told]:
    return [run for run in runs if run["wrong"]]


def test_killed_anywhere_it_goes_on_to_the_same_bits(
    outcomes: dict[str, list[Told]], request: pytest.FixtureRequest
) -> None:
    """SIGKILL before, after and in the middle of writes, fsyncs and renames, at moments, and again while it goes on:
    the adapter, the metrics, and the optimizer's state in the checkpoints are those of the run that was never killed,
    no more checkpoints are there, nothing half written is left, and no step that was told to be saved is done again."""
    runs = outcomes["kills"]
    befell = Counter(place.split()[0] for run in runs for place in run["befell"])
    assert befell.total() == (SLOW if "slow" in request.node.name else QUICK)["kills"]
    assert set(befell) == {"before", "after", "torn", "at"}
    assert _wrong(runs) == []
    assert max(len(run["befell"]) for run in runs) == 3


def test_a_power_cut_costs_no_step_that_was_saved(outcomes: dict[str, list[Told]]) -> None:
    """The disk keeps what was fsynced, and of the rest nothing, the names alone, or some: still the same bits, each
    step once, from the newest checkpoint that was told to be saved."""
    runs = outcomes["power"]
    assert _wrong(runs) == []
    assert {way for run in runs for place in run["befell"] for way in place.split("(")[1:2]} != set()
    # At the very first places nothing is there yet; all others had something to lose.
    assert sum(bool(run["befell"]) for run in runs) == len(runs)


@pytest.mark.parametrize(
    ("way", "message"), [("full", "No space left on device"), ("read-only", "Read-only file system")]
)
def test_a_disk_that_fails_harms_nothing(outcomes: dict[str, list[Told]], way: str, message: str) -> None:
    """At any write, fsync, rename, mkdir or open, once or from then on: a message that names the file, exit code 1,
    what was saved is whole, and once there is room the run goes on to the same bits."""
    runs = outcomes[way]
    assert _wrong(runs) == []
    failed = [run["message"] for run in runs if run["message"] is not None]
    assert len(failed) > 0.8 * len(runs)  # what cannot be taken away stays, and a later one may take it
    told = f": could not be written: {message}"
    assert [text for text in failed if not (text.endswith(told) or _of_a_rehearsal(text, told))] == []
    assert len({text.split(":")[0] for text in failed}) > 3


def _of_a_rehearsal(text: str, told: str) -> bool:
    return text.startswith("rehearsal: a checkpoint, of ") and f"{told}; " in text


@pytest.mark.slow
@pytest.mark.skipif(not may_mount(), reason="no disk can be mounted here: unshare or mount is not there or not allowed")
def test_a_small_disk_of_its_own(tmp_path: Path) -> None:
    """The same on file systems in memory that are really full, at a checkpoint or at the adapter; they are made larger
    then."""
    runs = _harness(tmp_path, {"small": 20}, *ALONE, timeout=250)["small"]
    assert _wrong(runs) == []
    full = Counter(Path(run["message"].split(":")[0]).name for run in runs)
    assert {run["message"].split(": ", 1)[1] for run in runs} == {"could not be written: No space left on device"}
    assert full["adapter"] > 0
    assert sum(name.startswith("step-") for name in full) > 2
