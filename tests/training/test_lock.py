"""One run at a time in a folder: who is refused and told what, and which locks are none any more."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock._unix
import pytest
from accelerate import Accelerator

from qlora_cli.errors import OutputError, RunError
from qlora_cli.training.events import Event, StepDone
from qlora_cli.training.lock import RunLock
from qlora_cli.training.run import train
from qlora_cli.training.run_folder import RunFolder
from tests.support.cli import REPOSITORY
from tests.support.runs import tiny_recipe

SINCE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
ADVICE = r"Wait for it, stop it, or name another folder with --output-dir"
HOLD = """
import sys, time
from pathlib import Path
from accelerate import Accelerator
from qlora_cli.training.lock import RunLock
from qlora_cli.training.run_folder import RunFolder
with RunLock(RunFolder(Path(sys.argv[1]))) as lock:
    lock.take(Accelerator(cpu=True), resume=False)
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a file system that has none."""

    def refuse(descriptor: int) -> bool:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(filelock._unix, "lock_fd_nonblocking", refuse)
    monkeypatch.setattr("qlora_cli.training.lock._SOFT_PATIENCE", 0.3)


@contextmanager
def held_elsewhere(run: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a run folder."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def take(run: Path, accelerator: Accelerator, *, resume: bool = False) -> None:
    """Take the lock and give it back."""
    with RunLock(RunFolder(run)) as lock:
        lock.take(accelerator, resume=resume)


def test_another_process_holds_it_until_it_is_killed(tmp_path: Path, accelerator: Accelerator) -> None:
    """The message names it; SIGKILL, after which nothing can be tidied up, frees the lock at once."""
    run = tmp_path / "run"
    with held_elsewhere(run) as holder:
        with pytest.raises(OutputError) as caught:
            take(run, accelerator)
        assert re.fullmatch(
            rf"output_dir: {re.escape(str(run))} is in use by another run: process {holder.pid} on "
            rf"{re.escape(socket.gethostname())}, since {SINCE}\. {ADVICE}",
            str(caught.value),
        )
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        take(run, accelerator)


def test_a_run_that_has_made_nothing_leaves_nothing(tmp_path: Path, accelerator: Accelerator) -> None:
    """The file and the folders that were made for it are gone, those that were there before stay; beside a run the file
    stays, empty."""
    run = RunFolder(tmp_path / "new" / "run")

    def fail() -> None:
        with RunLock(run) as lock:
            lock.take(accelerator, resume=False)
            assert not run.holds_a_run()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []
    run.path.mkdir(parents=True)
    take(run.path, accelerator)
    assert list(run.path.iterdir()) == []
    run.checkpoints.mkdir()
    take(run.path, accelerator, resume=True)
    assert sorted((path.name, path.is_file() and path.stat().st_size) for path in run.path.iterdir()) == [
        (".lock", 0),
        ("checkpoints", False),
    ]


def test_the_folder_is_looked_at_again(tmp_path: Path, accelerator: Accelerator) -> None:
    """Another run began and ended there while this one was reading its weights."""
    (tmp_path / "run.json").touch()
    with pytest.raises(OutputError, match=r"^output_dir: .* already holds a run\. Add --resume to go on with it, "):
        take(tmp_path, accelerator)
    take(tmp_path, accelerator, resume=True)


def test_a_lock_that_cannot_be_written(tmp_path: Path, accelerator: Accelerator) -> None:
    """A folder has its name."""
    (tmp_path / ".lock").mkdir()
    with pytest.raises(RunError, match=rf"^{re.escape(str(tmp_path))}: could not be written: Is a directory$"):
        take(tmp_path, accelerator)


@pytest.mark.usefixtures("no_flock")
def test_without_flock(tmp_path: Path, accelerator: Accelerator) -> None:
    """A file is the lock: the message says which to delete if the holder is gone; it is away with the run."""
    with RunLock(RunFolder(tmp_path)) as lock:
        lock.take(accelerator, resume=False)
        with pytest.raises(OutputError) as caught:
            take(tmp_path, accelerator)
    assert re.fullmatch(
        rf"output_dir: {re.escape(str(tmp_path))} is in use by another run: process {os.getpid()} on "
        rf"{re.escape(socket.gethostname())}, since {SINCE}\. {ADVICE}\. On this file system a run that is killed may "
        rf"leave its lock: if you are sure that it is gone, delete {re.escape(str(tmp_path))}/\.lock\.held",
        str(caught.value),
    )
    assert list(tmp_path.iterdir()) == []
    take(tmp_path, accelerator)


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_dead_holder_is_known(tmp_path: Path, accelerator: Accelerator) -> None:
    """Of this host, by its process; the same number on another host may be alive, and keeps the lock."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with RunLock(RunFolder(tmp_path)) as lock:
        lock.take(accelerator, resume=False)
        left = (tmp_path / ".lock.held").read_text().splitlines()
    marker = tmp_path / ".lock.held"
    marker.write_text(f"{dead.pid}\n{left[1]}\n")
    take(tmp_path, accelerator)
    # Another process has got the number since: not the one that started then.
    marker.write_text(f"{os.getpid()}\n{left[1]}\n{int(left[2]) - 1}\n")
    take(tmp_path, accelerator)
    marker.write_text(f"{dead.pid}\nelsewhere\n")
    with pytest.raises(OutputError, match=rf"in use by another run: process {dead.pid} on elsewhere, since "):
        take(tmp_path, accelerator)


def test_two_runs_in_one_program(tmp_path: Path) -> None:
    """One inside the other is refused, whether it would begin or go on, and harms nothing; one after the other work."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    refused: list[str] = []

    def begin_another(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            before = (tmp_path / "run" / "run.json").read_bytes()
            with pytest.raises(OutputError) as caught:
                train(recipe, resume=True)
            refused.append(str(caught.value))
            assert (tmp_path / "run" / "run.json").read_bytes() == before

    train(recipe, listeners=[begin_another])
    assert len(refused) == 1
    assert refused[0].startswith(f"output_dir: {tmp_path}/run is in use by another run: process {os.getpid()} on ")
    train(recipe, resume=True)
    shutil.rmtree(tmp_path / "run")
    train(recipe)
