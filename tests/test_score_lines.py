"""Benchmark scores on the screen of a run."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from qlora_cli.evaluation.events import Asking
from qlora_cli.score_lines import change_lines, score_lines
from qlora_cli.train_view import TrainView
from qlora_cli.training.events import BenchmarkRecord, BestKept, Finished, Started

SCORES = {
    "mmlu/acc": 0.25,
    "mmlu/acc_stderr": 0.0036,
    "gsm8k/exact_match,strict-match": 0.5,
    "gsm8k/exact_match_stderr,strict-match": 0.1,
    "words/word_perplexity": 2_282_837_179.1,
    "words/f1": None,
}
RECORD = BenchmarkRecord(8, SCORES, {"mmlu_anatomy/acc": 0.5}, "", 12.4)


def _finished(**found: object) -> Finished:
    return Finished(Path("run/adapter"), 8, 2.0, 100, 1_000_000, None, None, **found)  # type: ignore[arg-type]


def test_a_line_for_each_task() -> None:
    """Each metric with its standard error, under the step they were scored after; members are not shown."""
    assert list(score_lines(RECORD, 20)) == [
        "step 8  mmlu  acc 0.2500 ± 0.0036  (12 s)",
        "        gsm8k  exact_match,strict-match 0.5000 ± 0.1000",
        "        words  word_perplexity 2.2828e+09  f1 no number",
    ]


def test_what_is_not_the_whole_says_so_beside_its_score() -> None:
    """A group that was scored on a part of its tasks has not its own score."""
    record = BenchmarkRecord(8, {"mmlu/acc": 0.25, "piqa/acc": 0.5}, {}, "", 1.0, {"mmlu": "4 of 57 tasks"})
    assert list(score_lines(record, 20)) == [
        "step 8  mmlu (4 of 57 tasks)  acc 0.2500  (1 s)",
        "        piqa  acc 0.5000",
    ]


def test_many_tasks_are_cut_short() -> None:
    """What does not fit is counted, and where it is."""
    scores = {f"t{number}/acc": 0.5 for number in range(5)}
    assert list(score_lines(BenchmarkRecord(3, scores, {}, "", 0.0), 3)) == [
        "step 3  t0  acc 0.5000  (0 s)",
        "        t1  acc 0.5000",
        "        and 3 more, in metrics.jsonl",
    ]
    assert len(list(score_lines(BenchmarkRecord(3, scores, {}, "", 0.0), 5))) == 5


def test_before_and_after() -> None:
    """Of a run that was scored at its start; one that was scored once has nothing to compare."""
    finished = _finished(first_scores={"mmlu/acc": 0.2, "mmlu/acc_stderr": 0.1}, last_scores=SCORES)
    assert list(change_lines(finished, 20)) == ["mmlu/acc 0.2000 before, 0.2500 after"]
    assert list(change_lines(_finished(first_scores=SCORES, last_scores=SCORES), 20)) == []
    assert list(change_lines(_finished(), 20)) == []


def test_what_a_pipe_gets() -> None:
    """A line now and then while it is scored, the scores, the best checkpoint as it is found and at the end."""
    out = io.StringIO()
    view = TrainView(Console(file=out, width=200, soft_wrap=True))
    for seconds in (1.0, 31.0, 40.0, 62.0):
        view(Asking("loglikelihood", int(seconds), 1_000, 0, 0, 0, seconds))
    view(RECORD)
    best = BestKept(8, "mmlu/acc", 0.25, Path("run/checkpoints/step-000008"))
    view(best)
    view(_finished(best=best))
    assert out.getvalue().splitlines() == [
        "         scoring: 31 of 1,000 questions",
        "         scoring: 62 of 1,000 questions",
        "scores   step 8  mmlu  acc 0.2500 ± 0.0036  (12 s)",
        "                 gsm8k  exact_match,strict-match 0.5000 ± 0.1000",
        "                 words  word_perplexity 2.2828e+09  f1 no number",
        "best     mmlu/acc 0.2500 after step 8: run/checkpoints/step-000008 stays",
        "done     8 steps, 100 tokens in 2 s (50 tokens/s), peak memory 1.00 MB",
        "best     mmlu/acc 0.2500 after step 8: run/checkpoints/step-000008",
        "adapter  run/adapter/  (PEFT format)",
    ]


def test_what_a_terminal_gets() -> None:
    """The bar of questions goes when the scores are there; without the bar of steps, as before the first, lines."""
    out = io.StringIO()
    view = TrainView(Console(file=out, width=120, force_terminal=True))
    with view:
        view(Started(Path("run"), 0, 8, 1.0, 4))
        view(Asking("loglikelihood", 3, 9, 0, 0, 0, 0.1))
        view(RECORD)
        view(Asking("loglikelihood", 3, 9, 0, 0, 0, 0.1))
    assert "0.2500 ± 0.0036" in out.getvalue()
