"""How long a person waits for help and for the first mistake, beside TRL: whole processes, in turns.

python scripts/bench_startup.py                                        only this tool
python scripts/bench_startup.py --peer /path/to/venv/bin/trl --write   beside TRL; writes docs/benchmarks/startup.md

Each round runs every command once, so that a noisy minute falls on all of them. Given are the medians and, in
brackets, the fastest and the slowest; the ratio is of the medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "startup.md"
TRL_CONFIG = "model_name_or_path: x\ndataset_name: y\nuse_cpu: true\nbf16: false\nlerning_rate: 1.0e-3\n"
RECIPE = ROOT / "recipes" / "smollm2-gsm8k.yaml"


def main() -> int:
    """Measure and print, or write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", help="the `trl` command of an environment that has TRL")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # What a user does: a shipped recipe with one letter wrong.
        wrong = Path(folder) / "recipe.yaml"
        wrong.write_text(RECIPE.read_text(encoding="utf-8").replace("learning_rate", "lerning_rate"), encoding="utf-8")
        qlora = [sys.executable, "-m", "qlora_cli"]
        commands = {
            "qlora --help": ([*qlora, "--help"], 0),
            "qlora check, one misspelt key": ([*qlora, "check", str(wrong)], 2),
        }
        if options.peer:
            config = Path(folder) / "trl.yaml"
            config.write_text(TRL_CONFIG, encoding="utf-8")
            commands["trl sft --help"] = ([options.peer, "sft", "--help"], 0)
            commands["trl sft --config, one misspelt key"] = ([options.peer, "sft", "--config", str(config)], 2)
        seconds = measure(commands, options.rounds)
    page = report(seconds, options.peer, options.rounds)
    print(page)
    if options.write:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page, encoding="utf-8")
    return 0


def measure(commands: dict[str, tuple[list[str], int]], rounds: int) -> dict[str, list[float]]:
    """Wall seconds of every command in every round, after one round that fills the file cache."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, (command, code) in commands.items():
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, check=False, cwd=ROOT)
            elapsed = time.perf_counter() - start
            if done.returncode != code:
                raise SystemExit(f"{name}: exit {done.returncode}, expected {code}\n{done.stderr.decode()}")
            if number:
                seconds[name].append(elapsed)
    return seconds


def report(seconds: dict[str, list[float]], peer: str | None, rounds: int) -> str:
    """The page: what was measured, on what, and the figures."""
    first = statistics.median(next(iter(seconds.values())))
    lines = [
        "# Startup",
        "",
        f"`scripts/bench_startup.py`: wall time of whole processes, {rounds} rounds in turns, after one to warm up.",
        "",
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("typer", "pydantic", "torch", "transformers"))
        + (f", {peer_version(peer)}" if peer else ""),
        "",
        "| command | median (fastest to slowest), seconds | times `qlora --help` |",
        "|---|---|---|",
    ]
    for name, times in seconds.items():
        median = statistics.median(times)
        lines.append(f"| `{name}` | {median:.3f} ({min(times):.3f} to {max(times):.3f}) | {median / first:.1f} |")
    return "\n".join(lines) + "\n"


def peer_version(peer: str) -> str:
    """`trl 1.16.0`, asked of the peer's own Python."""
    python = Path(peer).parent / "python"
    code = "from importlib.metadata import version; print('trl', version('trl'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    """The processor's name, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
