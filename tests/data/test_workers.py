"""A function over chunks in several processes gives what it gives in one, in the same order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from qlora_cli.data.workers import cores, map_in_order
from qlora_cli.errors import DataError, RunError
from tests.support.cli import REPOSITORY


def square(number: int) -> tuple[int, int]:
    time.sleep(0.002 * (number % 3))  # those that finish early have to wait
    return number * number, os.getpid()


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("chunks", [0, 1, 8, 9, 40])
def test_results_come_in_order(processes: int, chunks: int) -> None:
    """However many processes and chunks there are; the first chunks never leave this process."""
    results = list(map_in_order(square, range(chunks), processes=processes))
    assert [number for number, _ in results] == [n * n for n in range(chunks)]
    here = {pid for _, pid in results[:8]}
    assert here <= {os.getpid()}
    elsewhere = {pid for _, pid in results[8:]} - {os.getpid()}
    assert len(elsewhere) == (min(processes, max(0, chunks - 8)) if processes > 1 else 0)


def test_an_error_is_raised_where_it_can_be_told() -> None:
    """With its type and its text, and no process is left behind."""

    def fail(number: int) -> int:
        if number == 20:
            raise DataError("row 20: wrong")
        return number

    results = map_in_order(fail, range(100), processes=2)
    assert [next(results) for _ in range(20)] == list(range(20))
    with pytest.raises(DataError, match="row 20: wrong"):
        next(results)
    assert not multiprocessing.active_children()


def test_chunks_are_taken_as_they_are_needed() -> None:
    """A source of any length is never held as a whole: at most two chunks per process are ahead of the results."""
    taken = 0

    def chunks() -> Iterator[int]:
        nonlocal taken
        for number in range(200):
            taken += 1
            yield number

    ahead = []
    for done, _ in enumerate(map_in_order(square, chunks(), processes=2), start=1):
        ahead.append(taken - done)
    assert max(ahead) <= 4


def test_a_killed_process_is_told() -> None:
    """As where the system had no memory left; nothing hangs."""

    def die(number: int) -> int:
        if number == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(RunError, match="a process that encodes rows was killed"):
        list(map_in_order(die, range(40), processes=2))
    assert not multiprocessing.active_children()


KILLED = """
import time
from qlora_cli.data.workers import map_in_order

def slow(number):
    if number >= 8:
        print("busy", flush=True)
        time.sleep(0.3)
    return number

list(map_in_order(slow, range(100), processes=2))
"""


def test_nothing_is_left_to_say_where_the_run_is_killed() -> None:
    """Its processes find nobody to give their results to, and end without a traceback."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert "busy" in run.stdout.readline()  # two of them may write at once
        run.kill()
        assert run.stderr.read() == ""  # up to when the last of them has ended


def test_leaving_early_ends_the_processes() -> None:
    """As when the first bad row ends the reading."""
    results = map_in_order(square, range(1000), processes=2)
    for _ in range(15):
        next(results)
    assert multiprocessing.active_children()
    results.close()
    assert not multiprocessing.active_children()


def test_cores_are_shared_among_the_processes_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the processes that were started beside each other takes its part, and at least one core."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = cores()
    assert alone >= 1
    for beside, expected in (("2", max(1, alone // 2)), ("1000", 1), ("nonsense", alone), ("0", alone)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", beside)
        assert cores() == expected
        assert cores(shared=False) == alone


class UnsendableError(Exception):
    """Cannot be made again from what pickle keeps of it, as many libraries' exceptions."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(f"{text} in line {line}")


class PanicError(BaseException):
    """As Rust's, which are no Exceptions."""


@pytest.mark.parametrize("error", [ValueError("bad in line 3"), UnsendableError(3, "bad"), PanicError("bad in line 3")])
def test_errors_of_any_kind_are_told(error: BaseException) -> None:
    """Not as a process that was killed, and with where they came from."""

    def fail(number: int) -> int:
        if number == 12:
            raise error
        return number

    with pytest.raises(RuntimeError, match=r"(?s)^encoding rows failed:\n.*in fail.*Error: bad in line 3$"):
        list(map_in_order(fail, range(40), processes=2))


def test_a_process_that_is_killed_while_it_waits_is_told() -> None:
    """The next chunk finds nobody to take it: that is no fault of the disk."""
    results = map_in_order(square, range(40), processes=2)
    for _ in range(12):
        next(results)
    for process in multiprocessing.active_children():
        process.kill()
        process.join()
    with pytest.raises(RunError, match="a process that encodes rows was killed"):
        list(results)


def test_a_process_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a user may have no more processes; the ones that were started are ended."""
    start = multiprocessing.get_context("fork").Process.start
    begun = []

    def refuse(process: multiprocessing.Process) -> None:
        begun.append(process)
        if len(begun) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        start(process)

    monkeypatch.setattr(multiprocessing.get_context("fork").Process, "start", refuse)
    with pytest.raises(RunError, match=r"^a process to encode rows cannot be started: Resource temporarily unavail"):
        list(map_in_order(square, range(40), processes=3))
    assert not multiprocessing.active_children()


def test_leaving_early_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """A process that is about to answer when nobody waits any more does not complain."""

    def large(number: int) -> bytes:
        return bytes(10_000_000)

    for _ in range(5):
        results = map_in_order(large, range(100), processes=2)
        for _ in range(9):
            next(results)
        results.close()
    assert capfd.readouterr().err == ""
