"""`qlora init` in a process of its own: with a person at a terminal; and without one, waiting for nobody."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.cli import ENVIRONMENT, SPY
from tests.support.first_recipes import rows, written


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/qlora"])


def start(*arguments: str, spy: bool = False, **streams: int) -> subprocess.Popen[bytes]:
    program = ["-c", SPY] if spy else ["-m", "qlora_cli"]
    command = [sys.executable, *program, "init", *arguments]
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command,
        env=ENVIRONMENT | {"TERM": "xterm"},
        start_new_session=True,
        preexec_fn=_hear_interrupts,
        **streams,
    )


def _hear_interrupts() -> None:
    # Tests that run in the background of a shell ignore SIGINT, and so would what they start.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("silent", ["nothing", "a pipe that stays open", "closed"])
def test_without_a_terminal_nothing_is_waited_for(silent: str) -> None:
    """Defaults are taken, whatever stands in for a person."""
    read, write = os.pipe()
    stdin = {"nothing": subprocess.DEVNULL, "a pipe that stays open": read}.get(silent)
    if stdin is None:
        command = f'"{sys.executable}" -m qlora_cli init <&-'
        done = subprocess.run(command, shell=True, env=ENVIRONMENT, capture_output=True, timeout=30, check=False)
        code = done.returncode
    else:
        with start(stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
            running.communicate(timeout=30)
            code = running.returncode
    os.close(read)
    os.close(write)
    assert code == 0
    assert written().dataset.train == "openai/gsm8k"


@pytest.mark.parametrize("arguments", [["--yes"], ["--train", "none.csv"], ["--set", "lora.rnk=1"]], ids=" ".join)
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    """Rows are looked at and the recipe is written without torch, or what needs it."""
    rows("train.jsonl", "question", "answer")
    with start(
        *arguments, spy=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        _, stderr = running.communicate(timeout=30)
    assert stderr.decode().endswith("IMPORTED ['typer']\n")


class Terminal:
    """The command at a terminal, a line at a time."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = start(*arguments, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.shown = ""

    def wait_for(self, text: str) -> None:
        """Read until `text` is shown."""
        end = time.monotonic() + 30
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            self._read()

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C; again if it came just before the command waited for an answer, which then goes on waiting."""
        for _ in range(3):
            time.sleep(0.2)
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
                return

    def end(self) -> int:
        """The exit code, once all is read."""
        while self._read():
            pass
        os.close(self._master)
        return self.process.wait(30)

    def _read(self) -> bool:
        try:
            if not select.select([self._master], [], [], 30)[0]:
                return False
            data = os.read(self._master, 65536)
        except OSError:  # as Linux says that the other end is closed
            return False
        self.shown += re.sub(r"\x1b\[[0-9;]*m|\r", "", data.decode())
        return bool(data)


def test_at_a_terminal() -> None:
    """Questions, a mistake that is asked about again, and the recipe."""
    rows("train.jsonl", "question", "answer")
    terminal = Terminal()
    terminal.wait_for("Base model (hub name or folder) [HuggingFaceTB/SmolLM2-135M-Instruct]: ")
    assert terminal.shown.startswith("Enter takes what is in brackets.\n\n")
    terminal.type("org/model\n")
    terminal.wait_for("Rows to learn (file, folder, glob or hub name) [train.jsonl]: ")
    terminal.type("\n")
    terminal.wait_for("  3 rows with the columns question, answer\n")
    terminal.wait_for("Held-out rows (file, or a share of the rows; 0: none) [0.05]: ")
    terminal.type("2\n")
    terminal.wait_for("  expected a share of the rows, above 0 and below 1 (0: none), got 2.\n")
    terminal.type("0.5\n")
    terminal.wait_for("Run folder [runs/model]: ")
    terminal.type("\n")
    assert terminal.end() == 0
    recipe = written()
    assert (recipe.base_model, recipe.dataset.validation_fraction, recipe.output_dir) == (
        "org/model",
        0.5,
        "runs/model",
    )


def test_answers_that_end() -> None:
    """Ctrl-D: nothing is written, and that is said."""
    terminal = Terminal()
    terminal.wait_for("]: ")
    terminal.type("\x04")
    assert terminal.end() == 2, terminal.shown
    assert "error: the answers ended early, and nothing was written; --yes takes every default\n" in terminal.shown
    assert os.listdir() == []  # noqa: PTH208


def test_a_stop() -> None:
    """Ctrl-C: so too, with the exit code of what was interrupted."""
    terminal = Terminal()
    terminal.wait_for("]: ")
    terminal.interrupt()
    assert terminal.end() == 130, terminal.shown
    assert "error: stopped; nothing was written\n" in terminal.shown
    assert os.listdir() == []  # noqa: PTH208


def test_yes_asks_nothing_at_a_terminal_either() -> None:
    terminal = Terminal("--yes")
    assert terminal.end() == 0, terminal.shown
    assert "Enter takes" not in terminal.shown
    assert written().dataset.train == "openai/gsm8k"


@pytest.mark.parametrize("kept", ["stdin", "stdout"])
def test_half_a_terminal_is_none(kept: str) -> None:
    """With only questions or only answers on a terminal nobody can be asked."""
    master, slave = pty.openpty()
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL} | {kept: slave}
    with start(**streams) as running:
        os.close(slave)
        running.communicate(timeout=30)
    os.close(master)
    assert running.returncode == 0
