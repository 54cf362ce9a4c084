"""What preparing data costs: tokens per second of encoding, beside TRL's way, and memory from 1 k to 1 M rows.

python scripts/bench_data.py                       1,000 and 100,000 rows
python scripts/bench_data.py --rows 1000000 --write   a million, too (minutes); writes docs/benchmarks/data.md

Rows are synthetic questions and answers of some 150 tokens in SmolLM2's tokenizer and template. Every measurement is a
process of its own: it reads and encodes them, makes the batches of an epoch and reads a hundred of them. Peak memory
is the highest resident set of that process, its libraries included. The peer is what TRL's SFTTrainer does with such
rows: `datasets.Dataset.map` over `apply_chat_template(tokenize=True)`, with as many processes as there are cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "data.md"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
WORDS = (ROOT / "README.md").read_text(encoding="utf-8").split()

OURS = """
import datetime, json, resource, sys, time
import numpy as np
from transformers import AutoTokenizer
from qlora_cli.data.batches import collate
from qlora_cli.data.units import make_units
from qlora_cli.recipe.schema import DatasetSection, TrainingSection
from qlora_cli.training.preparation import encode_all, lay_out
from qlora_cli.training.schedule import step_plan
path, model, packing = sys.argv[1], sys.argv[2], sys.argv[3] == "packed"
section = DatasetSection(train=path, max_length=2048, packing=packing)
tokenizer = AutoTokenizer.from_pretrained(model)
started = time.perf_counter()
rows = encode_all(lay_out("train", section.train_sources, section), section, tokenizer, today=datetime.date.today())
encoded = time.perf_counter() - started
started = time.perf_counter()
units = make_units(rows, section.max_length if packing else None, 42)
plan = step_plan(TrainingSection(), units, 1)
for step in range(100):
    for micro in plan.step(step):
        collate(units, micro.indices, 0)
batches = time.perf_counter() - started
padded = sum(len(b) * max(units.lengths[b]) for i in range(plan.steps_per_epoch) for b in [plan.step(i)[0].indices])
print(json.dumps({
    "rows": len(rows), "tokens": rows.tokens, "encoded": encoded, "batches": batches,
    "padding": 1 - rows.tokens / float(padded),
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""

PEER = """
import json, os, sys, time
import datasets
from transformers import AutoTokenizer
path, model = sys.argv[1], sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(model)
def encode(row):
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=True, return_dict=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    ids = whole["input_ids"]
    return {"input_ids": ids, "completion_mask": [i >= len(prompt["input_ids"]) for i in range(len(ids))]}
started = time.perf_counter()
rows = datasets.load_dataset("json", data_files=path, split="train")
rows = rows.map(encode, remove_columns=rows.column_names, num_proc=len(os.sched_getaffinity(0)))
seconds = time.perf_counter() - started
print(json.dumps({"encoded": seconds, "tokens": sum(map(len, rows[:]["input_ids"]))}))
"""


def main() -> int:
    """Measure and print, or write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="the largest number of rows")
    parser.add_argument("--rounds", type=int, default=3, help="of encoding beside the peer")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    if not MODEL.is_dir():
        print(f"{MODEL} is not there: run `make demo-model` first")
        return 2
    sizes = [size for size in (1_000, 100_000, 1_000_000) if size <= options.rows]
    with tempfile.TemporaryDirectory() as folder:
        found = {size: measure(Path(folder), size) for size in sizes}
        speeds = beside_the_peer(Path(folder), options.rounds)
    page = report(found, speeds, options.rounds)
    print(page)
    if options.write:
        PAGE.write_text(page, encoding="utf-8")
    return 0


def make_rows(path: Path, rows: int) -> Path:
    """Rows of 20 to 200 words, the same ones every time."""
    if not path.exists():
        draw = random.Random(0)
        with path.open("w", encoding="utf-8") as file:
            for _ in range(rows):
                words = draw.choices(WORDS, k=int(min(200, max(20, draw.lognormvariate(4.2, 0.5)))))
                cut = len(words) // 3
                row = {"prompt": " ".join(words[:cut]), "completion": " ".join(words[cut:])}
                file.write(json.dumps(row) + "\n")
    return path


def run(code: str, *arguments: str, cache: Path) -> dict[str, float]:
    """What a process prints that runs `code` with an empty or a given cache."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(cache),
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    facts: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def measure(folder: Path, size: int) -> dict[str, dict[str, float]]:
    """The first run, the second, which finds the rows encoded, and one that packs them."""
    path = make_rows(folder / f"{size}.jsonl", size)
    cache = folder / f"cache-{size}"
    return {kind: run(OURS, str(path), str(MODEL), kind, cache=cache) for kind in ("first", "second", "packed")}


def beside_the_peer(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Tokens per second of both, in turns."""
    path = make_rows(folder / "peer.jsonl", 20_000)
    speeds: dict[str, list[float]] = {"qlora": [], "peer": []}
    for number in range(rounds):
        for name, code in (("qlora", OURS), ("peer", PEER)):
            facts = run(code, str(path), str(MODEL), "first", cache=folder / f"{name}-{number}")
            speeds[name].append(facts["tokens"] / facts["encoded"])
    return speeds


def report(found: dict[int, dict[str, dict[str, float]]], speeds: dict[str, list[float]], rounds: int) -> str:
    """The page, in Markdown."""
    packages = ("tokenizers", "transformers", "datasets", "numpy")
    ours, peer = (statistics.median(speeds[name]) for name in ("qlora", "peer"))
    lines = [
        "# Preparing data",
        "",
        "`scripts/bench_data.py`: synthetic rows of a question and an answer, SmolLM2's tokenizer and chat template.",
        "",
        f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python "
        f"{platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in packages)}",
        "",
        "| rows | tokens | encoding, s | tokens/s | second run, s | 100 batches, s | packing too, s | padding at 8 | "
        "peak memory, MB | with packing |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size, runs in found.items():
        first, second, packed = runs["first"], runs["second"], runs["packed"]
        lines.append(
            f"| {size:,} | {first['tokens']:,} | {first['encoded']:.1f} | {first['tokens'] / first['encoded']:,.0f} | "
            f"{second['encoded']:.2f} | {second['batches']:.2f} | {packed['batches']:.2f} | {first['padding']:.1%} | "
            f"{first['peak'] / 1e6:,.0f} | {packed['peak'] / 1e6:,.0f} |"
        )
    peaks = [runs["first"]["peak"] for runs in found.values()]
    lines += [
        "",
        f"From {min(found):,} to {max(found):,} rows, peak memory grows by {(max(peaks) - peaks[0]) / 1e6:,.0f} MB.",
        "",
        f"Encoding 20,000 such rows, medians of {rounds} rounds in turns: {ours:,.0f} tokens/s; by `datasets.map` over "
        f"`apply_chat_template` with as many processes, as TRL does it, {peer:,.0f} tokens/s. Ratio {ours / peer:.2f}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
