"""What a run ran on: versions, hardware, and the most memory it held."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qlora_cli import __version__

_PACKAGES = (
    *("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "tokenizers", "safetensors", "pydantic"),
    "lm_eval",
)


def versions() -> dict[str, str]:
    """This tool's version, Python's, and those of the packages that decide the result."""
    return {
        "qlora-cli": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in _PACKAGES},
    }


def hardware(device: torch.device, num_processes: int) -> dict[str, Any]:
    """The machine, without names that would identify it."""
    facts: dict[str, Any] = {
        "device": device.type,
        "num_processes": num_processes,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def reset_peak_memory(device: torch.device) -> None:
    """Count a GPU's peak from now on; that of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process held: on a GPU what torch allocated there, on a CPU its resident set; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
