"""Checkpoints are written while training goes on, and nothing is lost by that."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from qlora_cli.errors import CheckpointError, RunError
from qlora_cli.training import keeping
from qlora_cli.training.checkpoint import Snapshot, write_checkpoint
from qlora_cli.training.events import CheckpointSaved, Emitter, Event
from qlora_cli.training.keeping import CheckpointKeeper
from qlora_cli.training.manifest import Fault, find_fault
from tests.support.checkpoints import some_snapshot


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No checkpoint is written before this is set; what is to be told to leave off is told so meanwhile."""
    gate = threading.Event()

    def write(folder: Path, snapshot: Snapshot, *, go_on: Callable[[], None], **rest: Any) -> Path:
        while not gate.wait(0.01):
            go_on()
        return write_checkpoint(folder, snapshot, go_on=go_on, **rest)

    monkeypatch.setattr(keeping, "write_checkpoint", write)
    yield gate
    gate.set()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_training_goes_on_while_it_is_written(held: threading.Event, tmp_path: Path) -> None:
    """Told, and old ones deleted, only once the new one is whole; what was trained since is not in it."""
    told: list[Event] = []
    keeper = CheckpointKeeper(tmp_path, 1, Emitter([told.append]))
    held.set()
    keeper.save(some_snapshot(1), wait=True, rotating=True)
    held.clear()
    with keeper.keeping():
        keeper.save(some_snapshot(2), wait=False, rotating=True)
        keeper.settle()
        assert told == [CheckpointSaved(1, tmp_path / "step-000001")]
        assert "step-000001" in _names(tmp_path)
        held.set()
    assert told[1:] == [CheckpointSaved(2, tmp_path / "step-000002")]
    assert _names(tmp_path) == ["step-000002"]


def test_one_at_a_time(held: threading.Event, tmp_path: Path) -> None:
    """A second one waits for the first: they are told in their order, and none is skipped."""
    told: list[Event] = []
    keeper = CheckpointKeeper(tmp_path, None, Emitter([told.append]), kept=lambda: [1])
    with keeper.keeping():
        keeper.save(some_snapshot(1), wait=False, rotating=True)
        threading.Timer(0.05, held.set).start()
        keeper.save(some_snapshot(2), wait=False, rotating=True)
    assert [event.step for event in told if isinstance(event, CheckpointSaved)] == [1, 2]
    assert _names(tmp_path) == ["step-000001", "step-000002"]


def test_a_failure_is_told_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full: the run hears of it when it looks, once, and the old checkpoint stays."""
    keeper = CheckpointKeeper(tmp_path, 1, Emitter())
    keeper.save(some_snapshot(1), wait=True, rotating=True)

    def full(*args: Any, **rest: Any) -> Path:
        raise RunError("no room")

    monkeypatch.setattr(keeping, "write_checkpoint", full)
    keeper.save(some_snapshot(2), wait=False, rotating=True)
    with pytest.raises(RunError, match=r"^no room$"):
        keeper.settle(wait=True)
    keeper.settle(wait=True)
    assert _names(tmp_path) == ["step-000001"]


def _save_and_raise(keeper: CheckpointKeeper, error: BaseException) -> None:
    with keeper.keeping():
        keeper.save(some_snapshot(2), wait=False, rotating=True)
        raise error


def test_another_error_waits_for_what_is_being_written(held: threading.Event, tmp_path: Path) -> None:
    """A run that fails while a checkpoint is written leaves it whole, and tells its own error."""
    keeper = CheckpointKeeper(tmp_path, 1, Emitter())
    threading.Timer(0.2, held.set).start()
    with pytest.raises(RunError, match=r"^the run's own$"):
        _save_and_raise(keeper, RunError("the run's own"))
    assert find_fault(tmp_path / "step-000002") is None


def test_stopped_at_once(held: threading.Event, tmp_path: Path) -> None:
    """The writer leaves off: nothing of the new checkpoint is left, the old one is whole."""
    keeper = CheckpointKeeper(tmp_path, 1, Emitter())
    held.set()
    keeper.save(some_snapshot(1), wait=True, rotating=True)
    held.clear()
    with pytest.raises(KeyboardInterrupt):
        _save_and_raise(keeper, KeyboardInterrupt())
    assert _names(tmp_path) == ["step-000001"]
    assert find_fault(tmp_path / "step-000001") is None


def test_stopped_at_once_when_it_is_whole(tmp_path: Path) -> None:
    """It was on disk before that, and nobody had asked yet: it is told, or the record would lack it."""
    told: list[Event] = []
    keeper = CheckpointKeeper(tmp_path, 1, Emitter([told.append]))
    with pytest.raises(KeyboardInterrupt):
        _save_then_stop(keeper)
    assert told == [CheckpointSaved(1, tmp_path / "step-000001")]
    assert _names(tmp_path) == ["step-000001"]


def _save_then_stop(keeper: CheckpointKeeper) -> None:
    with keeper.keeping():
        keeper.save(some_snapshot(1), wait=False, rotating=True)
        while any(thread.name == "checkpoint" for thread in threading.enumerate()):
            pass
        raise KeyboardInterrupt


def _save_and_wait(keeper: CheckpointKeeper) -> None:
    with keeper.keeping():
        keeper.save(some_snapshot(1), wait=False, rotating=True)
        keeper.settle(wait=True)


def test_stopped_at_once_while_it_is_waited_for(
    held: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second Ctrl-C comes when the run waits for the writer, as after its last step: the writer leaves off."""
    keeper = CheckpointKeeper(tmp_path, 1, Emitter())

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(keeping, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _save_and_wait(keeper)
    writers = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    assert (writers, _names(tmp_path)) == ([], [])


def test_told_to_leave_off_when_all_but_the_name_is_there(tmp_path: Path) -> None:
    """A writer that outlives its run's lock, as on a slow disk, does not rename any more."""
    calls = 0

    def go_on() -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt

    last = 0
    write_checkpoint(tmp_path / "whole", some_snapshot(1), go_on=go_on)
    last, calls = calls, 0
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "left", some_snapshot(1), go_on=go_on)
    assert (_names(tmp_path / "whole"), _names(tmp_path / "left")) == (["step-000001"], [])


def test_without_memory_for_both_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot that takes more than half of the memory that is left is written before training goes on."""
    snapshot = some_snapshot(1)
    for available, threads in ((2 * snapshot.bytes - 1, []), (2 * snapshot.bytes, ["checkpoint"])):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=available: type("Memory", (), {"available": free}))
        seen: list[str] = []

        def write(*args: Any, seen: list[str] = seen, **rest: Any) -> Path:
            seen.append(threading.current_thread().name)
            return tmp_path / "step-000001"

        monkeypatch.setattr(keeping, "write_checkpoint", write)
        keeper = CheckpointKeeper(tmp_path, None, Emitter())
        keeper.save(snapshot, wait=False, rotating=False)
        keeper.settle(wait=True)
        assert seen == (threads or ["MainThread"])


def test_what_is_read_again_has_to_be_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses bytes without a word: no old checkpoint is deleted for such a new one."""
    keeper = CheckpointKeeper(tmp_path, 1, Emitter())
    keeper.save(some_snapshot(1), wait=True, rotating=True)
    monkeypatch.setattr("qlora_cli.training.checkpoint.find_fault", lambda folder: Fault("state.json is missing"))
    with pytest.raises(CheckpointError) as caught:
        keeper.save(some_snapshot(2), wait=True, rotating=True)
    assert str(caught.value) == (
        f"{tmp_path / 'step-000002'}: was written, and read again state.json is missing: look at the disk and its file "
        "system"
    )
    assert find_fault(tmp_path / "step-000001") is None
