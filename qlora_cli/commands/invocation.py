"""How the command was started."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Parameters that are given without a name, and those that have another one on the command line.
_ARGUMENTS = ("adapter", "target")
_NAMES = {"overrides": "set", "task_paths": "task-path", "listing": "list", "chat_template": "apply-chat-template"}


def invocation(*, alone: bool = False) -> list[str]:
    """The words that started this command, up to its name, so that what it tells to type can be typed.

    Args:
        alone: for what one process does, however many this is.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and not alone:
        return ["accelerate", "launch", "--num_processes", str(processes), "-m", "qlora_cli"]
    if Path(sys.argv[0]).name == "__main__.py":
        return [sys.executable, "-m", "qlora_cli"]
    return ["qlora"]


def as_written(name: str, value: object) -> str:
    """What a parameter of a command is called on the command line: `dry_run` is `--dry-run`, or `--no-dry-run`."""
    if name in _ARGUMENTS:
        return name.upper()
    return f"--{'no-' if value is False else ''}{_NAMES.get(name, name.replace('_', '-'))}"
