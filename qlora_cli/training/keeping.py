"""The checkpoints of a run: written while it trains on, and rotated once the new one is whole."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from pathlib import Path

import psutil

from qlora_cli.errors import RunError
from qlora_cli.training.checkpoint import Snapshot, checkpoint_step, rotate, write_checkpoint
from qlora_cli.training.events import CheckpointSaved, Emitter

# Of the memory that is left, what a snapshot may take while training goes on beside it.
_SHARE_OF_MEMORY = 0.5
_PATIENCE = 5.0  # seconds for a writer that was told to leave off


class _LeftOffError(Exception):
    """The writer was told to leave off."""


class CheckpointKeeper:
    """Writes one snapshot at a time, in a thread of its own where memory allows, and deletes old checkpoints.

    Everything but the writing happens in the thread that calls: what is told, and what is deleted.
    """

    def __init__(
        self,
        folder: Path,
        limit: int | None,
        emit: Emitter,
        *,
        durable: Sequence[Path] = (),
        kept: Callable[[], Collection[int]] = tuple,
    ) -> None:
        """Nothing is being written yet.

        Args:
            limit: how many checkpoints to keep; None keeps all.
            durable: files that have to be on disk before a checkpoint is.
            kept: steps whose checkpoints stay, whatever is deleted.
        """
        self._folder = folder
        self._limit = limit
        self._emit = emit
        self._durable = durable
        self._kept = kept
        self._writing: Future[Path] | None = None
        self._rotating = False
        self._leave_off = threading.Event()

    def save(self, snapshot: Snapshot, *, wait: bool, rotating: bool) -> None:
        """Begin to write a snapshot; with `wait` it is on disk afterwards. Then, if `rotating`, old ones are deleted.

        Raises:
            RunError: if this or the one before could not be written.
        """
        self.settle(wait=True)
        self._rotating = rotating
        future: Future[Path] = Future()
        self._writing = future
        if wait or snapshot.bytes > _SHARE_OF_MEMORY * psutil.virtual_memory().available:
            self._write(snapshot, future)
            self.settle(wait=True)
        else:
            # A daemon, so that a disk which gives no answer does not keep a process that was stopped.
            threading.Thread(target=self._write, args=(snapshot, future), name="checkpoint", daemon=True).start()

    def settle(self, *, wait: bool = False) -> None:
        """Tell of the checkpoint that is written, if it is, and delete old ones.

        Raises:
            RunError: if it could not be written.
        """
        future = self._writing
        if future is None or not (wait or future.done()):
            return
        wait_for([future])  # stopped in here, it is still being written
        self._writing = None
        path = future.result()
        self._emit(CheckpointSaved(checkpoint_step(path), path))
        if self._rotating:
            self.rotate()

    def rotate(self) -> None:
        """Delete old checkpoints."""
        rotate(self._folder, self._limit, keep=self._kept())

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """At the end what was being written is whole; if the run was stopped at once, it is not there."""
        try:
            yield
        except KeyboardInterrupt:
            self._leave_off.set()
            if self._writing is not None:
                with contextlib.suppress(Exception):
                    path = self._writing.result(timeout=_PATIENCE)
                    self._emit(CheckpointSaved(checkpoint_step(path), path))  # it was whole before that
            raise
        except BaseException:
            with contextlib.suppress(RunError):  # what went wrong first is what is told
                self.settle(wait=True)
            raise
        self.settle(wait=True)

    def _write(self, snapshot: Snapshot, future: Future[Path]) -> None:
        try:
            path = write_checkpoint(self._folder, snapshot, durable=self._durable, go_on=self._may_go_on)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(path)

    def _may_go_on(self) -> None:
        if self._leave_off.is_set():
            raise _LeftOffError
