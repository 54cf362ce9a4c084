"""How the command was started."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def invocation() -> list[str]:
    """The words that started this command, up to its name, so that what it tells to type can be typed."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        return ["accelerate", "launch", "--num_processes", str(processes), "-m", "qlora_cli"]
    if Path(sys.argv[0]).name == "__main__.py":
        return [sys.executable, "-m", "qlora_cli"]
    return ["qlora"]
