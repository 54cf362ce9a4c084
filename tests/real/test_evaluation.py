"""On SmolLM2-135M-Instruct: benchmarks are answered as lm-eval's own backend does, from a fraction of the tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_cli.evaluation.events import Asking
from qlora_cli.evaluation.harness import score_tasks
from qlora_cli.evaluation.scoring import AnsweringModel
from qlora_cli.evaluation.tasks.build import build_tasks
from qlora_cli.evaluation.tasks.index import load_index
from qlora_cli.evaluation.tasks.loaded import TaskOptions
from tests.support.benchmarks import keep_index, write_data_root

MODEL = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (MODEL / "model.safetensors").exists(),
        reason="no demo model: python scripts/get_demo_model.py models/SmolLM2-135M-Instruct",
    ),
]


def test_few_shot_questions_as_the_hf_backend_answers_them(tmp_path: Path) -> None:
    """float32, five-shot MMLU and zero-shot ARC: every log-likelihood within 1e-4 of the peer's, every choice and every
    score the same; and the examples in the prompts are computed once."""
    keep_index()
    root = write_data_root(tmp_path, subjects=("anatomy",))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    options = TaskOptions(data_root=root, allow_partial=True, num_fewshot=5)
    loaded = build_tasks(["mmlu_anatomy", "arc_easy"], load_index(), options)
    told: list[Asking] = []
    lm = AnsweringModel(
        model, tokenizer, report=lambda event: told.append(event) if isinstance(event, Asking) else None
    )
    ours = score_tasks(lm, loaded, limit=3, bootstrap_iters=0)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(1234)
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    theirs = evaluate(peer, {"tasks": loaded.tasks, "groups": {}}, limit=3, bootstrap_iters=0)

    row_tokens = 0
    for task, samples in theirs["samples"].items():
        for mine, other in zip(ours.samples[task], samples, strict=True):
            found, expected = ([each[0] for each in sample["resps"]] for sample in (mine, other))
            assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            row_tokens += sum(len(tokenizer.encode(context + ending)) for context, ending in other["arguments"])
        assert ours.results["results"][task] == theirs["results"][task]
    assert told[-1].tokens == told[-1].all_tokens < row_tokens / 3
