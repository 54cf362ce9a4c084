"""Answers kept from one start of an evaluation to the next: what a model was asked, and what it said.

`$XDG_CACHE_HOME/qlora/answers`, else `~/.cache/qlora/answers`: a file of JSON lines for each model. A line is whole or
it is not there: whatever a kill, a full disk or another process leaves, an answer is read as it was given or asked
for again. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock

from qlora_cli.data.cache import cache_folder
from qlora_cli.evaluation.answering.questions import Continuation, Likelihood, Prompt

_LAYOUT = 1  # of a line and of its key: another number, another file
_SUFFIX = ".jsonl"
_LOCK = ".lock"
_LIMIT_BYTES = 1 << 30
_PATIENCE = 10.0  # seconds that another process may take to write a few lines
_EVERY = 0.5  # seconds of answers that a kill may take along


def answers_folder() -> Path:
    """Where answers are kept; it need not exist. Raises RuntimeError for a user without a home."""
    return cache_folder() / "answers"


class AnswerStore:
    """The answers of one model, those of earlier starts among them.

    Several processes may use the same one at a time; each knows what was there when it began, and what it has added.
    Where nothing can be kept, the evaluation goes on without.

    Attributes:
        trouble: why nothing more is kept, in a sentence, once that is so.
    """

    def __init__(self, folder: Path | None, fingerprint: str, *, limit_bytes: int = _LIMIT_BYTES) -> None:
        """Read what is there.

        Args:
            folder: where answers of all models are; None keeps none.
            fingerprint: of the model, with all that decides its answers: other answers, another fingerprint.
            limit_bytes: of all models together; those not used for longest make room when a store is opened.
        """
        self.trouble: str | None = None
        self._folder = folder
        self._answers: dict[str, Any] = {}
        self._waiting: list[str] = []
        self._written_at = time.monotonic()
        if folder is None:
            return
        digest = hashlib.sha256(f"{_LAYOUT}\n{fingerprint}".encode()).hexdigest()
        self._path = folder / f"{digest[:32]}{_SUFFIX}"
        with self._surviving():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # answers may be private
            os.utime(folder)  # or it might be taken for what nobody has used for long
            with FileLock(folder / _LOCK, timeout=_PATIENCE):
                if self._path.exists():
                    os.utime(self._path)
                _make_room(folder, limit_bytes, keep=self._path)
            self._read()

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flush()

    def get(self, key: str) -> Any:
        """What was answered to the question of this key; None if nothing was."""
        return self._answers.get(key)

    def put(self, key: str, answer: str | Likelihood) -> None:
        """Keep an answer; on disk with the first `put` or `keep_up` that is half a second later, or with `flush`."""
        self._answers[key] = answer
        if self._folder is None or self.trouble:
            return
        self._waiting.append(json.dumps({"asked": key, "answer": answer}) + "\n")
        self.keep_up()

    def keep_up(self) -> None:
        """Have the file hold what has waited for half a second."""
        if self._waiting and time.monotonic() - self._written_at > _EVERY:
            self.flush()

    def flush(self) -> None:
        """Have the file hold what was answered."""
        waiting, self._waiting = self._waiting, []
        self._written_at = time.monotonic()
        if not waiting or self._folder is None or self.trouble:
            return
        with self._surviving(), FileLock(self._folder / _LOCK, timeout=_PATIENCE):
            _append(self._path, "".join(waiting).encode())

    def _read(self) -> None:
        """Take every whole line; what a kill left of one is passed over."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    match json.loads(line):
                        case {"asked": str(key), "answer": str(text)}:
                            self._answers[key] = text
                        case {"asked": str(key), "answer": [int() | float() as log_probability, bool(greedy)]}:
                            self._answers[key] = Likelihood(log_probability, greedy)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:  # filelock's Timeout is an OSError
            reason = getattr(error, "strerror", None) or error
            self.trouble = (
                f"answers are not kept any more: {self._folder}: {reason}. The evaluation goes on; started again, it "
                "asks anew for those that are not there"
            )


def _append(path: Path, data: bytes) -> None:
    """Add whole lines, on a line of their own whatever is there. The caller holds the lock."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = b"\n" + data
        file.write(data)


def _make_room(folder: Path, limit_bytes: int, keep: Path) -> None:
    """Delete the stores that were not used for longest until the rest is no larger than the limit."""
    stores = sorted(folder.glob(f"*{_SUFFIX}"), key=_last_used, reverse=True)
    total = _size(keep)
    for store in stores:
        if store != keep:
            total += _size(store)
            if total > limit_bytes:
                store.unlink(missing_ok=True)


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def likelihood_key(asked: Continuation) -> str:
    """The name of this question, and of every equal one."""
    return _key("likelihood", asked.tokens, asked.scored)


def text_key(asked: Prompt, habits: str) -> str:
    """The name of this question to a model with these habits, such as the tokens it stops at."""
    told = [asked.until, asked.max_new_tokens, sorted(asked.sampling.items()), habits]
    return _key("text", asked.tokens, json.dumps(told, default=str))


def _key(kind: str, tokens: Sequence[int], told: int | str) -> str:
    digest = hashlib.sha256(f"{kind} {told} {len(tokens)}\n".encode())
    digest.update(array("q", tokens).tobytes())
    return digest.hexdigest()
