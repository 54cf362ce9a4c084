"""The demo from nothing to answers: fetch the model, train it, show what the training changed.

    python scripts/demo.py

Safe to run again: a model that is there is not fetched, a finished run is only shown, an interrupted one goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = "models/SmolLM2-135M-Instruct"
RECIPE = "recipes/smollm2-gsm8k.yaml"
RUN = "runs/smollm2-gsm8k"  # the recipe's output_dir


def run_state(run: Path) -> str:
    """Return the status in `run.json`, `interrupted` for a folder without a readable one, `absent` for no folder."""
    if not run.is_dir() or not any(run.iterdir()):
        return "absent"
    try:
        status = json.loads((run / "run.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return "interrupted"  # killed so early that nothing was written yet
    return str(status)


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Return the held-out evaluations in `metrics.jsonl`, oldest first."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    return [record for record in records if record["event"] == "eval"]


def loss_line(evals: list[dict[str, Any]]) -> str:
    """Say what training did to the loss on rows that it never saw."""
    if len(evals) < 2:
        return "held-out loss: not measured before and after"
    first, last = evals[0], evals[-1]
    return (
        f"held-out loss: {first['eval_loss']:.3f} before training, {last['eval_loss']:.3f} after "
        f"{last['step']} steps (lower is better)"
    )


def step(title: str, *arguments: str) -> None:
    """Run one command of the demo from the repository's root, and stop the demo when it fails."""
    print(f"\n== {title}", flush=True)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode if done.returncode > 0 else 1)


def main() -> int:
    """Run what is still to be done."""
    run = ROOT / RUN
    step("The model", "scripts/get_demo_model.py", MODEL)
    state = run_state(run)
    if state == "completed":
        print(f"\n== Training\n{RUN} is finished already: showing it again (delete the folder to train anew)")
    else:
        resume = [] if state == "absent" else ["--resume"]
        step(
            "Training, going on where it stopped" if resume else "Training", "-m", "qlora_cli", "train", RECIPE, *resume
        )
    print(f"\n== Before and after\n{loss_line(evaluations(run))}", flush=True)
    step("Questions it was not trained on", "scripts/demo_answers.py", RUN)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
