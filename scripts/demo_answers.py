"""Ask a finished demo run held-out questions, and show the base model's answer beside the adapter's.

    python scripts/demo_answers.py runs/smollm2-gsm8k

The base is asked by switching the adapter off, so that the two answers differ by the adapter alone. Both are greedy:
the same every time.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from qlora_cli.errors import QloraError
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe


def held_out_rows(recipe: Recipe, count: int) -> list[tuple[str, str]]:
    """Return the first `count` (question, reference answer) pairs of the recipe's validation file."""
    if recipe.dataset.validation is None:
        raise SystemExit("error: the run's recipe names no validation file")
    prompt = recipe.dataset.columns.get("prompt", "prompt")
    completion = recipe.dataset.columns.get("completion", "completion")
    with Path(recipe.dataset.validation).open(encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    return [(row[prompt], row[completion]) for row in rows]


def load_run(run: Path, recipe: Recipe) -> tuple[Any, Any]:
    """Return the run's model, base and adapter, and its tokenizer."""
    from transformers.utils import logging

    from qlora_cli.model.adapter import load_adapter
    from qlora_cli.model.base import choose_device, load_base
    from qlora_cli.model.source import ModelSource, load_tokenizer
    from qlora_cli.model.storage import compute_dtype

    logging.disable_progress_bar()  # the answers are what is to be seen
    source = ModelSource(recipe.base_model, recipe.revision, recipe.trust_remote_code)
    model: Any = load_base(source, recipe.quantization, choose_device(recipe.training.device))
    load_adapter(model, run / "adapter", compute_dtype=compute_dtype(recipe.quantization))
    return model.eval(), load_tokenizer(source)


def answer(model: Any, tokenizer: Any, question: str, max_new_tokens: int) -> str:
    """Return the model's greedy answer to one question, asked as in training."""
    import torch

    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(
        model.device
    )
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True)
    new_tokens = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new_tokens, skip_special_tokens=True)).strip()


def show(title: str, text: str) -> None:
    """Print a titled, indented, wrapped text."""
    print(f"\n{title}")
    for line in text.splitlines():
        print(textwrap.fill(line, width=100, initial_indent="  ", subsequent_indent="  "))
    sys.stdout.flush()


def main() -> int:
    """Run the script; return its exit code."""
    parser = argparse.ArgumentParser(description="Show what the base and the adapter answer to held-out questions.")
    parser.add_argument("run", type=Path, help="a finished run folder, such as runs/smollm2-gsm8k")
    parser.add_argument("--questions", type=int, default=2, help="how many to ask (default 2)")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="longest answer (default 160)")
    options = parser.parse_args()
    try:
        recipe = load_recipe(options.run / "recipe.yaml")
        rows = held_out_rows(recipe, options.questions)
        model, tokenizer = load_run(options.run, recipe)
    except (QloraError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, QloraError) else 1

    from qlora_cli.model.lora import adapters_disabled

    for question, reference in rows:
        show("Question", question)
        show("Reference answer", reference)
        with adapters_disabled(model):
            show("The base model", answer(model, tokenizer, question, options.max_new_tokens))
        show("With the trained adapter", answer(model, tokenizer, question, options.max_new_tokens))
        print("\n" + "-" * 100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
