"""The command line in a process of its own or in this one, without a network."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import transformers

HEAVY = ("torch", "transformers", "datasets", "bitsandbytes", "accelerate", "numpy", "pyarrow")
# Runs the command, then tells on stderr which of these packages were imported; Typer is there to show that it can.
SPY = f"""
import sys
from qlora_cli.cli import app
try:
    app(sys.argv[1:])
finally:
    print("IMPORTED", [name for name in ("typer", *{HEAVY!r}) if name in sys.modules], file=sys.stderr)
"""
REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100", "NO_COLOR": ""}


def process(*arguments: str, folder: Path, spy: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    program = ["-c", SPY] if spy else ["-m", "qlora_cli"]
    return subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=folder, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def settings(*pairs: str) -> list[str]:
    """These KEY=VALUE pairs, each after its --set."""
    return [word for pair in pairs for word in ("--set", pair)]


@contextmanager
def offline_libraries(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in this process find no hub, and leave the libraries as talkative as they were."""
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    try:
        yield
    finally:
        # The command quiets the libraries for its whole process, which here has other tests to run.
        transformers.utils.logging.set_verbosity_warning()
        transformers.utils.logging.enable_progress_bar()
        datasets.utils.logging.set_verbosity_warning()
        datasets.enable_progress_bars()
        for name in ("accelerate", "huggingface_hub"):
            logging.getLogger(name).setLevel(logging.NOTSET)
