"""What merging costs: time beside `cp` of the same files, and peak memory, of an artificial model of 8 GB.

python scripts/bench_merge.py                        1 GB and 8 GB
python scripts/bench_merge.py --size 2GB --rounds 5  a quarter of a GB and 2 GB
python scripts/bench_merge.py --write                writes docs/benchmarks/merge.md

The models are Llamas of random bfloat16 values, sharded, in tensors of at most 64 MB; the adapter has rank 16 on every
linear layer, so that nearly every byte is changed. Each round copies, copies and syncs, and merges, so that a noisy
minute falls on all of them. Times are of whole processes, Python and torch starting included. Peak memory is the
highest resident set of the merging process. There have to be two and a half times `--size` free in `--folder`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_cli.merging.tensors.sizes import parse_size

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "merge.md"

# The largest tensor has 7680 x 4096 values of two bytes: 62.9 MB.
WIDTH, INNER, VOCABULARY, RANK = 4096, 7680, 7680, 16
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
LAYER_BYTES = 2 * sum(rows * columns for rows, columns in LINEARS.values())
EMBEDDING_BYTES = 2 * 2 * VOCABULARY * WIDTH


@dataclass
class Measured:
    """The rounds of one size: seconds of each command, and bytes of memory of the merge."""

    nbytes: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"cp": [], "cp and sync": [], "merge": []})
    peaks: list[int] = field(default_factory=list)


def main() -> int:
    """Measure and print, or write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=parse_size, default="8GB", help="of the larger model; the other has an eighth")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the models are put; a temporary folder by default")
    parser.add_argument("--base", choices=("original", "dequantized"), default="original")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(Path(options.make), options.size)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if shutil.disk_usage(folder).free < 2.5 * options.size:
            print(f"{folder}: less than {2.5 * options.size / 1e9:.1f} GB free")
            return 2
        measured = [measure(Path(folder), size, options) for size in (options.size // 8, options.size)]
    page = report(measured, options)
    print(page)
    if options.write:
        PAGE.write_text(page, encoding="utf-8")
    return 0


def measure(folder: Path, size: int, options: argparse.Namespace) -> Measured:
    """Make a model of that size, run every round, and remove it."""
    model, adapter, target = folder / "model", folder / "adapter", folder / "target"
    # In a process of its own: the peak memory of a child is at least what its parent held when it was started.
    subprocess.run([sys.executable, __file__, "--make", str(folder), "--size", str(size)], check=True)
    files = [str(file) for file in sorted(model.iterdir())]
    found = Measured(sum(Path(file).stat().st_size for file in files))
    for number in range(options.rounds):
        for name, command in {
            "cp": ["cp", *files, str(target)],
            "cp and sync": ["sh", "-c", 'cp "$@" && for last; do :; done && sync "$last"/*', "sh", *files, str(target)],
            "merge": merge_command(adapter, target, options.base),
        }.items():
            shutil.rmtree(target, ignore_errors=True)
            if name != "merge":
                target.mkdir()
            os.sync()  # what the last one left in memory is not this one's to wait for
            seconds, working, peak = run(command)
            found.seconds[name].append(seconds)
            if name == "merge":
                found.peaks.append(peak)
            print(
                f"round {number + 1}, {found.nbytes / 1e9:.2f} GB, {name}: {seconds:.1f} s, {working:.1f} s of it "
                f"on the processor, {peak / 1e6:.0f} MB",
                flush=True,
            )
    for made in (model, adapter, target):
        shutil.rmtree(made)
    return found


def merge_command(adapter: Path, target: Path, base: str) -> list[str]:
    """The merge that is measured."""
    command = [sys.executable, "-m", "qlora_cli", "merge", str(adapter), "--output", str(target)]
    trained = ["--trained-base", "nf4-double"] if base == "dequantized" else []
    return [*command, "--base", base, *trained, "--no-verify"]


def run(command: list[str]) -> tuple[float, float, int]:
    """Wall seconds, processor seconds and peak resident bytes of a process that ends well."""
    with tempfile.TemporaryFile() as output:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)}: exit {child.returncode}\n{output.read().decode()}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make(folder: Path, size: int) -> None:
    """Put a model of about `size` bytes, one layer at least, and an adapter for it into the folder."""
    import torch
    from safetensors.torch import save_file

    from qlora_cli.merging.tensors.writer import Output, write_model

    torch.manual_seed(0)
    layers = max(1, round((size - EMBEDDING_BYTES) / LAYER_BYTES))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.{name}.weight": shape for name, shape in LINEARS.items()}
        shapes |= {f"{path}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}
    # Every tensor of a shape has the same values: drawing 4 billion of them would take a minute.
    values = {shape: torch.randn(shape).mul_(0.02).bfloat16() for shape in set(shapes.values())}
    (folder / "model").mkdir()
    outputs = [
        Output(name, torch.bfloat16, shape, lambda shape=shape: iter([values[shape]]))  # type: ignore[misc]
        for name, shape in shapes.items()
    ]
    write_model(outputs, folder / "model", max_shard_bytes=2_000_000_000, report=lambda _: None)
    (folder / "model" / "config.json").write_text(json.dumps(model_config(layers), indent=2), encoding="utf-8")
    (folder / "adapter").mkdir()
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEARS.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, columns) / columns**0.5
            tensors[f"{path}.lora_B.weight"] = torch.randn(rows, RANK) * 0.01
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    config = json.dumps(adapter_config(folder / "model"), indent=2)
    (folder / "adapter" / "adapter_config.json").write_text(config, encoding="utf-8")


def model_config(layers: int) -> dict[str, Any]:
    """config.json, as transformers writes it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def adapter_config(model: Path) -> dict[str, Any]:
    """adapter_config.json: what PEFT needs of it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(name.rpartition(".")[2] for name in LINEARS),
    }


def report(measured: list[Measured], options: argparse.Namespace) -> str:
    """The page: what was measured, on what, and the figures."""
    lines = [
        "# Merging",
        "",
        "`scripts/bench_merge.py`: artificial sharded Llamas in bfloat16, tensors of at most 64 MB, rank 16 on every "
        f"linear layer, merged with `--base {options.base} --no-verify`; beside `cp` of the same files, and `cp` with "
        f"the files synced to the disk, as a merge syncs them. Whole processes, {options.rounds} rounds in turns, "
        "medians (fastest to slowest).",
        "",
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {os.cpu_count()} cores, {memory() / 1e9:.0f} GB of memory, "
        f"Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors")),
        "",
        "| model, GB | `cp`, s | `cp` and `sync`, s | `qlora merge`, s | times `cp` | times `cp` and `sync` | "
        "peak memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in measured:
        cells = [f"{found.nbytes / 1e9:.2f}"]
        for times in found.seconds.values():
            cells.append(f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})")
        middle = {name: statistics.median(times) for name, times in found.seconds.items()}
        cells += [f"{middle['merge'] / middle[name]:.1f}" for name in ("cp", "cp and sync")]
        cells.append(f"{max(found.peaks) / 1e6:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    small, large = (statistics.median(found.seconds["merge"]) for found in measured)
    speed = (measured[1].nbytes - measured[0].nbytes) / max(1e-9, large - small)
    copies = [statistics.median(found.seconds["cp and sync"]) for found in measured]
    copying = (measured[1].nbytes - measured[0].nbytes) / max(1e-9, copies[1] - copies[0])
    lines += [
        "",
        f"From the smaller model to the larger, without what starting costs: merging {speed / 1e9:.2f} GB/s, copying "
        f"and syncing {copying / 1e9:.2f} GB/s. Peak memory grows by "
        f"{(max(measured[1].peaks) - max(measured[0].peaks)) / 1e6:,.0f} MB.",
        "",
    ]
    return "\n".join(lines)


def processor() -> str:
    """The processor's name, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    sys.exit(main())
