"""What checkpoints cost: training time with and without them, beside transformers' own, and the time to resume.

python scripts/bench_checkpoint.py                    SmolLM2-135M-Instruct on GSM8K, 3 rounds in turns
python scripts/bench_checkpoint.py --write            writes docs/benchmarks/checkpoint.md, too

Every measurement is a process of its own. One trains and saves after every step, one trains and never saves; what a
step takes longer in the first is what a checkpoint costs, disk and processor that the writer shares with it included.
The peer is transformers' Trainer over PEFT with the same layers and optimizer state: the time that its
`_save_checkpoint` takes, in which training waits and nothing is synced to the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "checkpoint.md"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
RECIPE = ROOT / "recipes" / "smollm2-gsm8k.yaml"
DEFAULT_SAVE_STEPS = 500

TRAIN = """
import json, sys, time
began = time.time()
from pathlib import Path
from qlora_cli.recipe.load import load_recipe
from qlora_cli.training.events import CheckpointSaved, StepDone
from qlora_cli.training.run import train
recipe, resume, overrides = Path(sys.argv[1]), sys.argv[2] == "resume", sys.argv[3:]
steps, sizes = [], []
def listen(event):
    if isinstance(event, StepDone):
        steps.append(time.time())
    if isinstance(event, CheckpointSaved):
        sizes.append(sum(path.stat().st_size for path in event.path.rglob("*") if path.is_file()))
finished = train(load_recipe(recipe, overrides), resume=resume, listeners=[listen])
between = [later - earlier for earlier, later in zip(steps, steps[1:])]
print(json.dumps({"first_step": steps[0] - began, "between": between, "sizes": sizes}))
"""

PEER = """
import json, sys, tempfile, time
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(r=int(sys.argv[2]), target_modules=names, task_type="CAUSAL_LM"))
rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4
with tempfile.TemporaryDirectory(dir=sys.argv[3]) as folder:
    arguments = TrainingArguments(folder, max_steps=1, per_device_train_batch_size=1, save_strategy="no", report_to=[])
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    seconds = []
    for _ in range(5):
        began = time.time()
        trainer._save_checkpoint(model, None)
        seconds.append(time.time() - began)
print(json.dumps({"seconds": seconds}))
"""


def main() -> int:
    """Measure and print, or write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=13, help="of each training")
    parser.add_argument("--rounds", type=int, default=3, help="of training with and without checkpoints, in turns")
    parser.add_argument("--dtype", default="bfloat16", help="that products are computed in")
    parser.add_argument("--folder", help="where to write, to measure another disk; by default a temporary folder")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    if not MODEL.is_dir():
        print(f"{MODEL} is not there: run `python scripts/get_demo_model.py {MODEL.relative_to(ROOT)}` first")
        return 2
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        page = report(measure(Path(folder), options), options)
    print(page)
    if options.write:
        PAGE.write_text(page, encoding="utf-8")
    return 0


def run(code: str, *arguments: str) -> dict[str, Any]:
    """What a process prints last that runs `code`."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trainings in turns, a resumed one after each that saved, and the peer."""
    common = [
        f"training.max_steps={options.steps}",
        f"quantization.compute_dtype={options.dtype}",
        "training.eval_on_start=false",
        "dataset.validation=null",
        "training.eval_steps=null",
    ]
    found: dict[str, Any] = {"with": [], "without": [], "sizes": [], "fresh": [], "resumed": [], "peer": []}
    for number in range(options.rounds):
        for name, saving in (("with", "1"), ("without", "null")):
            place = [f"output_dir={folder / f'{name}-{number}'}", f"training.save_steps={saving}"]
            facts = run(TRAIN, str(RECIPE), "fresh", *common, *place)
            found[name].append(statistics.median(facts["between"]))
            found["sizes"] += facts["sizes"]
            found["fresh"].append(facts["first_step"])
        more = [f"training.max_steps={options.steps + 2}", f"output_dir={folder / f'with-{number}'}"]
        found["resumed"].append(run(TRAIN, str(RECIPE), "resume", *common, *more)["first_step"])
        found["peer"] += run(PEER, str(MODEL), "16", str(folder))["seconds"]
    return found


def report(found: dict[str, Any], options: argparse.Namespace) -> str:
    """The page."""
    pairs = list(zip(found["with"], found["without"], strict=True))
    cost = statistics.median(saving - plain for saving, plain in pairs)
    step, peer = statistics.median(found["without"]), statistics.median(found["peer"])
    share = 100 * cost / (DEFAULT_SAVE_STEPS * step)
    shown = "; ".join(f"{saving:.2f} and {plain:.2f}" for saving, plain in pairs)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    versions = f"Python {platform.python_version()}, {packages}"
    rounds = f"{options.rounds} round{'s' * (options.rounds != 1)}"
    return f"""# Checkpoints

`scripts/bench_checkpoint.py`: SmolLM2-135M-Instruct, rank 16 on all linear layers, batches of 8 rows of GSM8K, products
in {options.dtype}, {options.steps} steps, {rounds} in turns. A checkpoint is of
{statistics.median(found["sizes"]) / 1e6:.1f} MB: adapter, optimizer state, random states.

{date.today()}, {processor()}, {len(os.sched_getaffinity(0))} cores, {versions}

| | seconds |
|---|---|
| a step that saves and one that does not, medians of each round | {shown} |
| what a checkpoint adds to a step, median over the rounds | {cost:.3f} |
| transformers' `_save_checkpoint`, in which training waits, nothing synced | {peer:.3f} |
| from the start of Python to the end of the first step, fresh | {statistics.median(found["fresh"]):.1f} |
| the same, resumed | {statistics.median(found["resumed"]):.1f} |

At the default `save_steps` of {DEFAULT_SAVE_STEPS}, checkpoints are {share:.3f} % of training time.
"""


def processor() -> str:
    """Its name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
