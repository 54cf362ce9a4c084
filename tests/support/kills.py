"""Merges that are killed at random moments, each in a process forked off this one, which is quick.

Run as a process of its own, where torch has one thread: others would not be there in what is forked off.
Prints one JSON line for each kill: seconds after the first byte could be written, what was left, what became of the
output, and whether merging again mended it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qlora_cli.merging.events import Event, Planned
from qlora_cli.merging.merge import merge
from qlora_cli.merging.request import MergeRequest

_SLACK = 1.1  # of the time that a merge takes: some kills come too late


def contents(folder: Path) -> dict[str, object]:
    """What is in a merged model, but for the time that it was made at."""
    found: dict[str, object] = {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }
    report = json.loads((folder / "merge_report.json").read_text())
    del report["made_at"]
    return found | {"merge_report.json": report}


def asked(adapter: Path, output: Path) -> MergeRequest:
    """Two models are written, one after the other."""
    return MergeRequest(adapter=adapter, output=output, verify=False, quantize="nf4", device="cpu")


def merging(adapter: Path, output: Path, planned: Callable[[], object] = lambda: None) -> int:
    """Begin a merge in a process forked off this one; returns its id. `planned` is called there before it writes."""

    def listen(event: Event) -> None:
        if isinstance(event, Planned):
            planned()

    child = os.fork()
    if child:
        return child
    try:
        merge(asked(adapter, output), listeners=[listen])
    except BaseException as error:
        sys.stderr.write(f"{error!r}\n")
        os._exit(1)
    os._exit(0)


def finished(child: int) -> bool:
    """Wait for the process; whether it ended well."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def killed(adapter: Path, output: Path, seconds: float) -> None:
    """Merge, and kill that so many seconds after it began to write."""
    reading, writing = os.pipe()
    child = merging(adapter, output, lambda: os.write(writing, b"x"))
    os.read(reading, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)


def main(adapter: Path, folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    output = folder / "out"
    lasting = []
    for _ in range(3):  # the first of them imports what every other then has
        shutil.rmtree(output, ignore_errors=True)
        began: list[float] = []
        merge(asked(adapter, output), listeners=[lambda _, began=began: began.append(time.monotonic())])
        lasting.append(time.monotonic() - began[1])  # the second event is the plan
    expected = contents(output)
    draw = random.Random(5)
    for _ in range(kills):
        shutil.rmtree(output)
        seconds = draw.uniform(0, _SLACK * min(lasting))
        killed(adapter, output, seconds)
        left = sorted(path.name for path in folder.iterdir() if path != output)
        became = "absent"
        if output.exists():
            became = "whole" if contents(output) == expected else "broken"
            shutil.rmtree(output)
        again = finished(merging(adapter, output)) and contents(output) == expected
        remains = sorted(path.name for path in folder.iterdir())
        told = {"seconds": seconds, "left": left, "output": became, "again": again, "remains": remains}
        sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
