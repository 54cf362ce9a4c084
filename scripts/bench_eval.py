"""What answering benchmarks costs, and whether the answers are the same: beside lm-evaluation-harness's own backend.

python scripts/bench_eval.py --data-root DIR                        float32, every document: item by item, and the time
python scripts/bench_eval.py --data-root DIR --dtype bfloat16 --limit 50 --rounds 3
python scripts/bench_eval.py --data-root DIR --exact arc_easy,piqa  and how far either is from the exact answers
python scripts/bench_eval.py --data-root DIR --write                writes docs/benchmarks/eval.md

DIR holds the benchmarks' data as `qlora eval --data-root` takes it; groups are scored on those of their tasks that are
there. The peer is lm-eval's `hf` backend (HFLM) over the same model in memory, with its cache of one-token choices on,
and for each benchmark the batch size that it was fastest with on two cores of a CPU, of 1, 2, 4, 8 and 16. Each side is
a process of its own, in turns; what is timed is the whole answering, the reading of the rows, the tokenisation and the
metrics included, loading the model and importing libraries left out. Every log-likelihood of the one is then held
against the other's; and, of the benchmarks that `--exact` names, both against those of the peer in float64, one prompt
at a time: what two ways of rounding differ by does not say which of them is nearer.
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
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "eval.md"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
SIDES = ("qlora", "hf")
EXACT = "exact"  # the peer in float64, not timed
# Tasks and the examples in their prompts.
SHOTS = {"mmlu": 5, "arc_easy": 0, "piqa": 0}
# The peer's batch sizes; logits of long prompts, of which it makes all, take the time of larger ones.
PEER_BATCHES = {"mmlu": 1}
PEER_BATCH = 16


@dataclass
class Side:
    """What the rounds of one side gave: seconds by benchmark, and from its last round scores and answers."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, list[list[list[Any]]]] = field(default_factory=dict)
    way: str = ""
    peak: int = 0


@dataclass(frozen=True)
class Agreement:
    """How far two lists of answers to the same documents are the same.

    A choice is the likeliest continuation of a document. Where the two choose differently, `widest_tie` is the largest
    gap, in the peer's own log-likelihoods, between what the two chose: near 0, it is a tie.
    """

    documents: int
    questions: int
    farthest: float
    choices_apart: int
    widest_tie: float
    greedy_apart: int


def main() -> int:
    """Measure and print, or write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument(
        "--tasks", default=",".join(SHOTS), help="comma-separated, of log-likelihoods; zero-shot but MMLU"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--exact", default="", help="comma-separated: tasks that are answered in float64, too")
    parser.add_argument("--peer-batch-size", type=int, help="in place of the fastest")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--append", action="store_true", help="add the table to that page")
    parser.add_argument("--side", choices=(*SIDES, EXACT), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unasked := {*filter(None, options.exact.split(","))} - {*options.tasks.split(",")}:
        parser.error(f"--exact: not among --tasks: {', '.join(sorted(unasked))}")
    if options.side:
        options.out.write_text(json.dumps(answer(options)), encoding="utf-8")
        return 0
    sides = measure(options)
    page = report(sides, options)
    print(page)
    if options.append:
        page = PAGE.read_text(encoding="utf-8") + "\n" + page.split("\n\n", 2)[2]
    if options.append or options.write:
        PAGE.write_text(page, encoding="utf-8")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Side]:
    """Every round of both sides, in turns; then, where it is asked for, the exact answers."""
    sides = {name: Side() for name in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name, side in sides.items():
                found = run_side(name, Path(folder))
                for task, seconds in found["seconds"].items():
                    side.seconds.setdefault(task, []).append(seconds)
                    print(f"round {number + 1}, {name}, {task}: {seconds:.1f} s", flush=True)
                side.scores, side.answers = found["scores"], found["answers"]
                side.way, side.peak = found["way"], max(side.peak, found["peak"])
        sides[EXACT] = Side()
        if options.exact:
            sides[EXACT].answers = run_side(EXACT, Path(folder))["answers"]
    return sides


def run_side(name: str, folder: Path) -> dict[str, Any]:
    """What a process of that side's own gives."""
    out = folder / f"{name}.json"
    command = [sys.executable, __file__, *sys.argv[1:], "--side", name, "--out", str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment)
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def answer(options: argparse.Namespace) -> dict[str, Any]:
    """One side's run over every benchmark."""
    import resource

    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora_cli.evaluation.scoring import AnsweringModel
    from qlora_cli.evaluation.tasks.build import build_tasks
    from qlora_cli.evaluation.tasks.index import load_index
    from qlora_cli.evaluation.tasks.loaded import TaskOptions

    device = torch.device(options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    exact = options.side == EXACT
    dtype = torch.float64 if exact else getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
    ours = AnsweringModel(model, tokenizer, batch_size=None, store=None, report=lambda _: None)
    found: dict[str, Any] = {"seconds": {}, "scores": {}, "answers": {}}
    index = load_index(())
    for name in (options.exact if exact else options.tasks).split(","):
        if options.side != "qlora":
            batch = 1 if exact else peer_batch(name, options)
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=options.device)
        else:
            lm = ours
        tasks = TaskOptions(data_root=options.data_root, allow_partial=True, num_fewshot=SHOTS.get(name, 0))
        loaded = build_tasks([name], index, tasks)
        began = time.perf_counter()
        for task in loaded.tasks.values():
            task.set_fewshot_seed(1234)  # lm-eval's own
        scored = evaluate(
            lm, {"tasks": loaded.tasks, "groups": loaded.groups}, limit=options.limit, bootstrap_iters=100
        )
        found["seconds"][name] = time.perf_counter() - began
        found["scores"][name] = scored["results"][name]
        found["answers"][name] = [
            [list(responses[0]) for responses in sample["resps"]]
            for samples in scored["samples"].values()
            for sample in samples
        ]
    found["way"] = ours.way or ""
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return found


def peer_batch(task: str, options: argparse.Namespace) -> int:
    """How many prompts the peer computes at once."""
    given: int | None = options.peer_batch_size
    return given or PEER_BATCHES.get(task, PEER_BATCH)


def agreement(ours: list[list[list[Any]]], theirs: list[list[list[Any]]]) -> Agreement:
    """Hold two sides' answers, [document][choice] of log-likelihood and greediness, against each other."""
    farthest = widest = 0.0
    apart = greedy = questions = 0
    for mine, other in zip(ours, theirs, strict=True):
        for (value, is_greedy), (reference, was_greedy) in zip(mine, other, strict=True):
            farthest = max(farthest, abs(value - reference))
            greedy += is_greedy != was_greedy
            questions += 1
        my_choice = max(range(len(mine)), key=lambda choice: mine[choice][0])
        choice = max(range(len(other)), key=lambda choice: other[choice][0])
        if my_choice != choice:
            apart += 1
            widest = max(widest, other[choice][0] - other[my_choice][0])
    return Agreement(len(ours), questions, farthest, apart, widest, greedy)


def off(answers: list[list[list[Any]]], exact: list[list[list[Any]]] | None) -> str:
    """How far the log-likelihoods are from the exact ones at most, where there are such."""
    return "" if exact is None else f"{agreement(answers, exact).farthest:.1e}"


def report(sides: dict[str, Side], options: argparse.Namespace) -> str:
    """The page."""
    ours, theirs, exact = sides["qlora"], sides["hf"], sides[EXACT].answers
    rows = []
    for task in ours.seconds:
        found = agreement(ours.answers[task], theirs.answers[task])
        mine, other = (statistics.median(side.seconds[task]) for side in (ours, theirs))
        ratio = statistics.median(b / a for a, b in zip(ours.seconds[task], theirs.seconds[task], strict=True))
        apart = f"{found.choices_apart}" + (f" (gap at most {found.widest_tie:.1g})" if found.choices_apart else "")
        rows.append(
            f"| {task}, {SHOTS.get(task, 0)}-shot | {found.documents:,} | {peer_batch(task, options)} "
            f"| {other:.1f} | {mine:.1f} | **{ratio:.1f}** | {found.farthest:.1e} "
            f"| {off(theirs.answers[task], exact.get(task))} | {off(ours.answers[task], exact.get(task))} "
            f"| {apart} of {found.documents:,} | {found.greedy_apart} of {found.questions:,} "
            f"| {score(theirs, task)} | {score(ours, task)} |"
        )
    processor = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    device = f"{os.cpu_count()} cores of {processor}" if options.device == "cpu" else options.device
    limit = f", the first {options.limit} documents of each task" if options.limit else ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "lm-eval"))
    return "\n".join(
        [
            "# Answering benchmarks, beside lm-eval's hf backend",
            "",
            "Made by `python scripts/bench_eval.py --data-root DIR`, whose docstring says what is measured. Choices "
            "apart: documents in which the two find another continuation likeliest, with the widest gap between the "
            "two in the peer's own log-likelihoods; greedy apart: continuations of which one says that greedy decoding "
            "writes them, and the other that it does not; off: the largest distance from the log-likelihoods of the "
            "peer in float64, one prompt at a time (transformers' norms compute in float32 even there).",
            "",
            f"## {options.model.name}, {options.dtype}{limit}",
            "",
            f"{device}; Python {platform.python_version()}, {versions}. qlora: {ours.way}. "
            f"Rounds in turns: {options.rounds}; medians. Peak memory: qlora {ours.peak / 1e9:.2f} GB, "
            f"hf {theirs.peak / 1e9:.2f} GB.",
            "",
            "| benchmark | documents | hf's batch | hf, s | qlora, s | times as fast "
            "| log-likelihoods differ by at most | hf off | qlora off | choices apart | greedy apart "
            "| hf's score | qlora's score |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def score(side: Side, task: str) -> str:
    """The metrics of a task, with their standard errors."""
    found = side.scores[task]
    metrics = [key.split(",")[0] for key in found if "," in key and "_stderr" not in key]
    return ", ".join(f"{name} {found[f'{name},none']:.4f} ± {_error(found, name)}" for name in metrics)


def _error(found: dict[str, Any], name: str) -> str:
    error = found.get(f"{name}_stderr,none")
    return f"{error:.4f}" if isinstance(error, float) else "?"


def _lines(file: str) -> list[str]:
    path = Path(file)
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


if __name__ == "__main__":
    raise SystemExit(main())
