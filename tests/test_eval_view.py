"""What a person sees of an evaluation: how far it is, the scores beside the base's, and what they come to."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from qlora_cli import encoding_view, eval_view
from qlora_cli.benchmarking.events import Evaluated, Event, LossRow, Prepared, ScoreRow, Turn, Written
from qlora_cli.eval_view import EvalView
from qlora_cli.evaluation.events import Asking
from qlora_cli.evaluation.statistics import Comparison
from qlora_cli.evaluation.tasks.names import Listing
from qlora_cli.score_table import legend, shown_losses, shown_scores, verdict
from qlora_cli.task_list import show_tasks
from qlora_cli.training.events import EncodingProgress, EvaluationProgress, Notice, Stage

PREPARED = Prepared("the run runs/x", "NF4, double quantisation, bfloat16 compute", "models/base", 7, 3610)


class _Clock:
    """Stands for the module `time`, a second later whenever a test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(eval_view, "time", clock)
    monkeypatch.setattr(encoding_view, "time", clock)
    return clock


def score(task: str, metric: str = "acc", value: float = 0.5, error: float | None = 0.01, **more: object) -> ScoreRow:
    fields = {"label": task, "depth": 0, "is_group": False, "documents": 100, "filter": "none"}
    fields |= {"higher_is_better": True, "num_fewshot": 5, **more}
    return ScoreRow(task=task, metric=metric, value=value, error=error, **fields)  # type: ignore[arg-type]


def beside(row: ScoreRow, base: float, low: float, high: float, p: float | None = None) -> ScoreRow:
    """With a baseline."""
    comparison = Comparison(row.value - base, low, high, p, 31, 1204, 0, 1235)
    return replace(row, base=base, base_error=row.error, comparison=comparison)


ROWS = (
    score("arc_easy", value=0.5412, error=0.0102, documents=2376),
    score("arc_easy", "acc_norm", 0.4912, 0.0103, documents=2376),
    score("mmlu", value=0.25114, error=0.0123, documents=1234, is_group=True, partial="5 of 57 tasks"),
    score("mmlu_humanities", label="humanities", depth=1, is_group=True, documents=500, partial="2 of 13 tasks"),
    score("mmlu_formal_logic", label="formal_logic", depth=2, documents=126),
    score("gsm8k", "exact_match", 0.0311, None, filter="strict-match"),
)
LOSS = LossRow("data/test.jsonl", 64, 7926, 0.8715, 0.0212, 2.391)
BESIDE = (
    beside(ROWS[0], 0.5, 0.02, 0.06, 0.00004),
    beside(ROWS[1], 0.5, -0.02, 0.003, 0.25),
    beside(ROWS[2], 0.2, 0.01, 0.09),
    beside(ROWS[5], 0.1, -0.09, -0.01, 0.0123),
)
LOSS_BESIDE = replace(
    LOSS, base=1.7636, base_error=0.03, base_perplexity=5.833,
    comparison=Comparison(-0.8921, -0.912, -0.87, None, 63, 1, 0, 64),
)  # fmt: skip


def texts(lines: Sequence[object]) -> list[str]:
    return [str(line) for line in lines]


def evaluated(*scores: ScoreRow, losses: tuple[LossRow, ...] = (), **more: object) -> Evaluated:
    fields = {"template": None, "way": "prefix tree", "answers": 9504, "kept": 0, "seconds": 123.4, **more}
    return Evaluated(PREPARED, scores, losses, **fields)  # type: ignore[arg-type]


def shown(*events: Event, terminal: bool = False, width: int = 100, baseline: bool = False) -> str:
    file = StringIO()
    # As make_console makes it.
    console = Console(file=file, force_terminal=terminal, width=width, highlight=False, soft_wrap=True, emoji=False)
    with EvalView(console, baseline=baseline) as view:
        for event in events:
            view(event)
    return file.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def asking(answered: int, questions: int = 9504, kept: int = 0, **more: object) -> Asking:
    fields = {"kind": "loglikelihood", "tokens": 0, "all_tokens": 0, "seconds": 10.0, **more}
    return Asking(answered=answered, questions=questions, kept=kept, **fields)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- The table


def test_the_table() -> None:
    """A line for each metric of each task; groups are indented, and what is not whole says so beside its score."""
    assert texts(shown_scores(ROWS, None)) == [
        "task                  n  metric                       value",
        "arc_easy          2,376  acc                         0.5412 ± 0.0102",
        "                         acc_norm                    0.4912 ± 0.0103",
        "mmlu              1,234  acc                         0.2511 ± 0.0123  5 of 57 tasks",
        "  humanities        500  acc                         0.5000 ± 0.0100  2 of 13 tasks",
        "    formal_logic    126  acc                         0.5000 ± 0.0100",
        "gsm8k               100  exact_match (strict-match)  0.0311",
    ]


def test_the_table_with_a_baseline() -> None:
    """The base beside the target, the difference with its interval, McNemar's p, and the documents won and lost."""
    assert texts(shown_scores(BESIDE, None)) == [
        "task          n  metric                        base           target           difference       "
        "95 % interval  McNemar p  won:lost",
        "arc_easy  2,376  acc                         0.5000 ± 0.0102  0.5412 ± 0.0102     +0.0412  "
        "+0.0200 to +0.0600    <0.0001  31:1,204",
        "                 acc_norm                    0.5000 ± 0.0103  0.4912 ± 0.0103     -0.0088  "
        "-0.0200 to +0.0030     0.2500  31:1,204",
        "mmlu      1,234  acc                         0.2000 ± 0.0123  0.2511 ± 0.0123     +0.0511  "
        "+0.0100 to +0.0900             31:1,204  5 of 57 tasks",
        "gsm8k       100  exact_match (strict-match)  0.1000           0.0311              -0.0689  "
        "-0.0900 to -0.0100     0.0123  31:1,204",
    ]


def test_of_a_metric_of_all_documents_together_none_is_won_or_lost() -> None:
    """Nothing stands there, in the table and in the list: 0:0 would say that all documents were alike."""
    mcc = replace(score("cola", "mcc"), base=0.4, comparison=Comparison(0.1, -0.1, 0.3, None, None, None, None, 8))
    assert texts(shown_scores([mcc, BESIDE[0]], None))[1].endswith("+0.1000  -0.1000 to +0.3000")
    assert not any("won:lost" in line for line in texts(shown_scores([mcc], None)))
    assert texts(shown_scores([mcc], 10))[-1] == "    +0.1000  (-0.1000 to +0.3000)"


def test_the_table_of_losses() -> None:
    """Loss and perplexity of a dataset, with its rows and tokens; with a baseline the base's, too."""
    assert texts(shown_losses([LOSS], None)) == [
        "dataset          rows  metric           value",
        "data/test.jsonl    64  loss per token  0.8715 ± 0.0212  7,926 tokens",
        "                       perplexity      2.3910",
    ]
    assert texts(shown_losses([LOSS_BESIDE], None)) == [
        "dataset          rows  metric            base           target           difference       95 % interval  "
        "won:lost",
        "data/test.jsonl    64  loss per token  1.7636 ± 0.0300  0.8715 ± 0.0212     -0.8921  -0.9120 to -0.8700  "
        "    63:1  7,926 tokens",
        "                       perplexity      5.8330           2.3910",
    ]
    bits = replace(LOSS_BESIDE, bits_per_byte=0.31, base_bits_per_byte=0.62)
    assert texts(shown_losses([bits], None))[3:] == [
        "                       bits per byte   0.6200           0.3100",
    ]
    # Of a loss too great to have one.
    assert len(shown_losses([replace(LOSS, perplexity=None)], None)) == 2


def test_on_top_stands_the_name_that_was_asked_for() -> None:
    """lm-eval calls mmlu_anatomy `anatomy`, which is enough inside its group only."""
    row = score("mmlu_anatomy", label="anatomy")
    for width in (None, 10):
        assert [str(line).split()[0] for line in shown_scores([row], width)][width is None] == "mmlu_anatomy"
    assert verdict([beside(row, 0.1, 0.2, 0.3)]) == "better than the base on mmlu_anatomy (acc)"
    assert texts(shown_scores([replace(row, depth=1)], None))[1].split()[0] == "anatomy"


def test_no_scores_no_table() -> None:
    assert (shown_scores([], None), shown_losses([], None)) == ([], [])


def test_examples_in_a_prompt_have_a_column_where_tasks_differ() -> None:
    """A group of such tasks has no number of its own."""
    rows = (score("a", num_fewshot=5), score("b", num_fewshot=0), score("c", num_fewshot=None, is_group=True))
    assert texts(shown_scores(rows, None)) == [
        "task    n  shots  metric   value",
        "a     100      5  acc     0.5000 ± 0.0100",
        "b     100      0  acc     0.5000 ± 0.0100",
        "c     100         acc     0.5000 ± 0.0100",
    ]


def test_metrics_of_fewer_documents_say_of_how_many() -> None:
    rows = (score("a"), score("a", "f1", documents=90))
    assert [line.split()[:3] for line in texts(shown_scores(rows, None))[1:]] == [
        ["a", "100", "acc"],
        ["a", "90", "f1"],
    ]


def test_numbers_that_are_none() -> None:
    """What could not be calculated is shown as that, and a difference of nothing has a plus."""
    row = beside(score("a", value=float("nan"), error=None), float("nan"), float("nan"), float("nan"))
    assert texts(shown_scores([row], None))[1].split()[3:8] == ["nan", "nan", "nan", "nan", "to"]
    assert verdict([row]) == "no certain difference from the base on a (acc)"
    row = beside(score("a"), 0.50001, -0.00001, 0.0)
    assert texts(shown_scores([row], None))[1].split()[9:13] == ["+0.0000", "+0.0000", "to", "+0.0000"]


def test_a_single_document_has_no_interval() -> None:
    """It says nothing of others: there is a difference, and no judgement."""
    row = replace(beside(score("a", error=None), 0.1, 0, 0), comparison=Comparison(0.4, None, None, None, 1, 0, 0, 1))
    assert texts(shown_scores([row], None)) == [
        "task    n  metric    base  target  difference  won:lost",
        "a     100  acc     0.1000  0.5000     +0.4000       1:0",
    ]
    assert texts(shown_scores([row], 20))[2] == "    +0.4000  won:lost 1:0"
    assert list(legend([row])) == []
    assert verdict([row]) == "no certain difference from the base on a (acc)"


def test_names_that_steer_a_terminal_are_written_out() -> None:
    rows = [score("a\x1b[2Jb", "acc\n", label="a\x1b[2Jb")]
    for width in (None, 20):
        assert "\x1b" not in "".join(texts(shown_scores(rows, width)))


def test_a_table_that_is_too_wide_becomes_a_list() -> None:
    """No number is left out of it, and no line is cut."""
    lines = texts(shown_scores(BESIDE, 80))
    assert lines == [
        "arc_easy  (n 2,376)",
        "  acc                         0.5412 ± 0.0102  base 0.5000 ± 0.0102",
        "    +0.0412  (+0.0200 to +0.0600)  p <0.0001  won:lost 31:1,204",
        "  acc_norm                    0.4912 ± 0.0103  base 0.5000 ± 0.0103",
        "    -0.0088  (-0.0200 to +0.0030)  p 0.2500  won:lost 31:1,204",
        "mmlu  (n 1,234)",
        "  acc                         0.2511 ± 0.0123  base 0.2000 ± 0.0123  5 of 57 tasks",
        "    +0.0511  (+0.0100 to +0.0900)  won:lost 31:1,204",
        "gsm8k  (n 100)",
        "  exact_match (strict-match)  0.0311  base 0.1000",
        "    -0.0689  (-0.0900 to -0.0100)  p 0.0123  won:lost 31:1,204",
    ]
    numbers = re.compile(r"[+-]?\d[\d.,]*")
    table = "\n".join(texts(shown_scores(BESIDE, None))[1:])
    assert sorted(numbers.findall("\n".join(lines))) == sorted(numbers.findall(table))
    assert texts(shown_losses([LOSS], 50)) == [
        "data/test.jsonl  (rows 64)",
        "  loss per token  0.8715 ± 0.0212  7,926 tokens",
        "  perplexity      2.3910",
    ]
    differing = (score("a", num_fewshot=5), score("b", depth=1, num_fewshot=0))
    assert texts(shown_scores(differing, 10))[::2] == ["a  (n 100, 5-shot)", "  b  (n 100, 0-shot)"]


@pytest.mark.parametrize("width", [82, 83])
def test_a_table_that_just_fits_is_one(width: int) -> None:
    longest = max(map(len, texts(shown_scores(ROWS, None))))
    assert longest == 83
    assert (texts(shown_scores(ROWS, width))[0].split()[0] == "task") == (width >= longest)


# ------------------------------------------------------------------------------------------- What it comes to


def test_the_legend() -> None:
    """Only what is not plain is said, and only where it is there."""
    assert list(legend(ROWS)) == []
    perplexity = score("wikitext", "word_perplexity", 23.4, None, higher_is_better=False)
    assert list(legend([perplexity, perplexity])) == ["lower is better: word_perplexity"]
    assert list(legend(BESIDE)) == [
        "difference: target minus base, document by document; the interval is a paired bootstrap's; p is McNemar's "
        "exact test"
    ]
    assert list(legend([BESIDE[2]])) == [
        "difference: target minus base, document by document; the interval is a paired bootstrap's"
    ]


def test_many_intervals_are_said_to_be_many() -> None:
    """Of twenty, one leaves out 0 for nothing: who looks at that one only would believe it."""
    assert len(list(legend([BESIDE[0]] * 19))) == 1
    assert list(legend([BESIDE[0]] * 20))[1:] == ["of 20 intervals at 95 %, about 1 leaves out 0 by luck"]
    assert list(legend([BESIDE[0]] * 62))[1:] == ["of 62 intervals at 95 %, about 3 leave out 0 by luck"]


def test_the_verdict() -> None:
    """Better and worse are said where the interval leaves out 0, by what the metric's direction is."""
    assert verdict(ROWS) is None
    assert verdict(BESIDE) == (
        "better than the base on arc_easy (acc), mmlu (acc); worse on gsm8k (exact_match (strict-match)); no certain "
        "difference on arc_easy (acc_norm)"
    )
    assert verdict(BESIDE[3:]) == "worse than the base on gsm8k (exact_match (strict-match))"
    assert (
        verdict([BESIDE[0], replace(BESIDE[0], metric="acc_norm")])
        == "better than the base on arc_easy (acc, acc_norm)"
    )
    lower = replace(BESIDE[0], higher_is_better=False)
    assert verdict([lower]) == "worse than the base on arc_easy (acc)"
    neither = replace(BESIDE[0], higher_is_better=None)
    assert verdict([neither]) == "another score than the base's on arc_easy (acc)"


def test_what_the_exact_test_does_not_bear_out_is_no_difference() -> None:
    """4 documents won of 50 and none lost: no resample is without a win, and luck does that one time in eight."""
    row = beside(score("arc_easy", value=0.38), 0.30, 0.02, 0.16, 0.125)
    assert verdict([row]) == "no certain difference from the base on arc_easy (acc)"
    assert verdict([beside(row, 0.30, 0.02, 0.16, 0.0499)]) == "better than the base on arc_easy (acc)"
    assert verdict([beside(row, 0.30, 0.02, 0.16)]) == "better than the base on arc_easy (acc)"


def test_the_verdict_is_of_what_stands_on_top() -> None:
    """57 subjects are one score of their group; of many tasks the first are named."""
    assert verdict([BESIDE[0], replace(BESIDE[1], depth=1)]) == "better than the base on arc_easy (acc)"
    many = [beside(score(f"t{n}"), 0.1, 0.2, 0.3) for n in range(9)]
    assert verdict(many[:6]) == "better than the base on t0 (acc), t1 (acc), t2 (acc), t3 (acc), t4 (acc), t5 (acc)"
    assert verdict(many) == ("better than the base on t0 (acc), t1 (acc), t2 (acc), t3 (acc), t4 (acc) and 4 more")


# ------------------------------------------------------------------------------------------- From start to end


def test_a_log(clock: _Clock) -> None:
    """Every line of an evaluation with a baseline, none of them broken, without control codes."""
    events: list[Event] = [
        Stage("loading the model"),
        PREPARED,
        Turn("target"),
        asking(0, tokens=0, all_tokens=90_000, seconds=0.0),
        Notice("3 prompts were longer than the model's 2,048 tokens, and were cut on the left"),
        asking(9504, tokens=90_000, all_tokens=90_000, seconds=45.0),
        Turn("base"),
        asking(9504, kept=9504, seconds=0.0),
        evaluated(*BESIDE, losses=(LOSS_BESIDE,), kept=9504, answers=19008),
        Written("results", (Path("out.json"),)),
        Written("samples", (Path("samples_a_out.jsonl"),)),
    ]  # fmt: skip
    text = shown(*events, baseline=True)
    assert text == shown(*events, baseline=True, width=40)
    assert set(text) - {"\n"} == {character for character in text if character.isprintable()}
    lines = text.splitlines()
    assert lines[:8] == [
        "         loading the model …",
        "target   the run runs/x; weights: NF4, double quantisation, bfloat16 compute",
        "base     models/base",
        "tasks    7 tasks, 3,610 documents",
        "ask      the target",
        "note     3 prompts were longer than the model's 2,048 tokens, and were cut on the left",
        "answered 9,504 continuations, 90,000 tokens, in 45 s (2,000 tokens/s)",
        "ask      the base, without the adapter",
    ]
    assert lines[8] == "answered 9,504 continuations, all of them kept from an earlier start"
    assert lines[9:14] == texts(shown_scores(BESIDE, None))
    assert lines[14:17] == texts(shown_losses([LOSS_BESIDE], None))
    assert lines[17] == "         lower is better: loss per token, perplexity"
    assert lines[18].startswith("         difference: target minus base, ")
    assert lines[19:] == [
        "verdict  better than the base on arc_easy (acc), mmlu (acc), data/test.jsonl (loss per token); worse on gsm8k "
        "(exact_match (strict-match)); no certain difference on arc_easy (acc_norm)",
        "asked    5-shot; plain prompts; weights: NF4, double quantisation, bfloat16 compute; shared prefixes "
        "computed once",
        "done     19,008 answers, 9,504 of them kept from an earlier start, in 123 s",
        "results  out.json  (in lm-eval's format)",
        "samples  samples_a_out.jsonl",
    ]


def test_a_notice_is_told_once() -> None:
    """What was cut of the prompts of the target is cut of the base's, too."""
    assert shown(Notice("a"), Turn("base"), Notice("a"), Notice("b")) == "note     a\nnote     b\n"


def test_without_a_baseline_nobody_is_told_apart() -> None:
    assert "\nask " not in shown(PREPARED, Turn("target"), evaluated(ROWS[0]))


def test_a_model_without_an_adapter_has_no_base() -> None:
    lines = shown(replace(PREPARED, base=None, tasks=1, documents=1)).splitlines()
    assert lines[1:] == ["tasks    1 task, 1 document"]


def test_rows_only() -> None:
    """Nothing is said of tasks, of prompts and of answers."""
    lines = shown(replace(PREPARED, tasks=0, documents=0), evaluated(losses=(LOSS,), answers=0, way=None)).splitlines()
    assert [line for line in lines if line.startswith(("tasks", "asked", "done"))] == [
        "asked    weights: NF4, double quantisation, bfloat16 compute",
        "done     in 123 s",
    ]
    assert "asked    at most 64 rows; weights: " in shown(evaluated(losses=(LOSS,), limit=64))


@pytest.mark.parametrize(
    ("rows", "more", "told"),
    [
        (ROWS, {}, "5-shot; plain prompts; "),
        ((ROWS[0], replace(ROWS[1], num_fewshot=0)), {}, "0- to 5-shot; plain prompts; "),
        ((replace(ROWS[0], num_fewshot=None),), {}, "plain prompts; "),
        (ROWS, {"template": "the run's chat template"}, "5-shot; prompts rendered with the run's chat template; "),
        (ROWS, {"way": "row by row"}, "compute; every question by itself"),
        (ROWS, {"way": "some other way"}, "compute; some other way"),
        (ROWS, {"way": None}, "bfloat16 compute\n"),
        (ROWS, {"limit": 1500}, "5-shot; plain prompts; at most 1,500 documents of each task; weights"),
        (ROWS, {"limit": 0.1}, "5-shot; plain prompts; 10% of the documents of each task; weights"),
        (
            ROWS,
            {"seed": 7, "system_instruction": "Be terse."},
            "5-shot; plain prompts; after a system instruction; seed 7; weights",
        ),
    ],
)
def test_how_it_was_asked(rows: tuple[ScoreRow, ...], more: dict[str, object], told: str) -> None:
    """What one has to know to set a score beside another."""
    text = shown(evaluated(*rows, **more))
    assert told in text[text.index("asked    ") :]


def test_many_files_of_samples_are_counted() -> None:
    files = tuple(Path(f"samples_{n}.jsonl") for n in range(61))
    assert shown(Written("samples", files)) == (
        "samples  samples_0.jsonl, samples_1.jsonl, samples_2.jsonl, … (61 files)\n"
    )


def test_a_results_file_says_where_it_is_and_what() -> None:
    """Another name than was asked for is explained, and what lm-eval's tools cannot read is not called theirs."""
    file, other = Path("out.json"), Path("out-2.json")
    told = "out.json has come to be there, and is not written over"
    assert shown(Written("results", (file,), is_lm_evals=False)) == "results  out.json\n"
    assert shown(Written("results", (other,), file)) == f"results  out-2.json  (in lm-eval's format; {told})\n"
    assert shown(Written("results", (other,), file, is_lm_evals=False)) == f"results  out-2.json  ({told})\n"


# ------------------------------------------------------------------------------------------- How far it is


def test_lines_where_there_is_no_terminal(clock: _Clock) -> None:
    """The first after five seconds, the next after half a minute, with the time left by the tokens that are to be
    computed: those that are kept are not."""
    file = StringIO()
    with EvalView(Console(file=file, width=100, highlight=False, soft_wrap=True), baseline=False) as view:
        for now, answered, tokens in ((0, 500, 0), (4.9, 600, 5), (6, 700, 1000), (30, 800, 2000), (36, 2000, 30_000)):
            clock.now = now
            view(asking(answered, kept=500, tokens=tokens, all_tokens=90_000, seconds=float(now)))
        clock.now = 100.0
        view(asking(9504, kept=500, tokens=90_000, all_tokens=90_000, seconds=100.0))
    assert file.getvalue().splitlines() == [
        "         700 of 9,504 continuations, 167 tokens/s, 0:08:54 left",
        "         2,000 of 9,504 continuations, 833 tokens/s, 0:01:12 left",
        "answered 9,504 continuations, 500 of them kept from an earlier start, 90,000 tokens, in 100 s (900 tokens/s)",
    ]


def test_the_time_left_without_a_count_of_tokens(clock: _Clock) -> None:
    """By the questions that are answered in this start; before there is one, it is not known."""
    file = StringIO()
    with EvalView(Console(file=file, width=100, highlight=False, soft_wrap=True), baseline=False) as view:
        for now, answered in ((0, 10), (10, 10), (50, 30)):
            clock.now = now
            view(asking(answered, 110, kept=10, kind="generate_until", seconds=float(now)))
    assert file.getvalue().splitlines() == [
        "         10 of 110 answers, -:--:-- left",
        "         30 of 110 answers, 0:03:20 left",
    ]


@pytest.mark.parametrize(
    ("kind", "word"),
    [("loglikelihood", "1 continuation"), ("loglikelihood_rolling", "1 text"), ("generate_until", "1 answer")],
)
def test_the_end_of_a_kind_is_said_once(kind: str, word: str) -> None:
    """However often it is told; and again when the base is asked."""
    end = asking(1, 1, kind=kind, seconds=2.0)
    assert shown(end, end) == f"answered {word}, in 2.0 s\n"
    assert shown(end, Turn("base"), end) == f"answered {word}, in 2.0 s\n" * 2


def test_a_bar_on_a_terminal(clock: _Clock) -> None:
    """At once, with the time left; it is gone when all is answered, and a notice stands above it."""
    file = StringIO()
    console = Console(file=file, force_terminal=True, width=120, highlight=False, soft_wrap=True)
    with EvalView(console, baseline=False) as view:
        view(asking(100, tokens=1000, all_tokens=90_000))
        assert "100 of 9,504 continuations, 100 tokens/s, 0:14:50 left" in plain(file.getvalue())
        assert "━" in plain(file.getvalue())
        view(Notice("to be known"))
        view(asking(300, tokens=2000, all_tokens=90_000))
        view(asking(9504, tokens=90_000, all_tokens=90_000))
        after = file.getvalue()
        view(PREPARED)
    assert "note     to be known" in plain(after)
    assert "\x1b[?25h" in after  # the cursor is back
    assert "━" not in plain(file.getvalue()[len(after) :])


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_nothing_is_cut_or_broken_on_a_terminal(width: int, clock: _Clock) -> None:
    """No line is wider than the terminal, but for what is one word, and nothing is left out."""
    events = (
        Stage("loading"), PREPARED, Turn("target"),
        asking(1300, 114_504, tokens=1000, all_tokens=90_000), asking(114_504, 114_504, tokens=90_000),
        EvaluationProgress(1, 30), EvaluationProgress(30, 30),
        evaluated(*BESIDE[:3], losses=(LOSS_BESIDE,), template="the chat template of the run, from its recipe"),
    )  # fmt: skip
    text = plain(shown(*events, terminal=True, width=width, baseline=True))
    lines = [line for part in text.split("\n") for line in part.split("\r")]
    assert "…" not in text.replace("loading …", "")
    assert "1,300 of 114,504 continuations" in text
    whole = " ".join(text.split())
    assert "prompts rendered with the chat template of the run, from its recipe" in whole
    assert max(map(len, lines)) <= max(width, 80)


def test_tokens_of_rows(clock: _Clock) -> None:
    """Of a dataset, how many tokens are read and the time left, as its loss counts them; nothing once they are."""
    file = StringIO()
    with EvalView(Console(file=file, width=100, highlight=False, soft_wrap=True), baseline=False) as view:
        for now, done in ((0, 0), (10, 5), (20, 10), (60, 30), (61, 40)):
            clock.now = now
            view(EvaluationProgress(done, 40))
    assert file.getvalue().splitlines() == [
        "         5 of 40 tokens, 0:01:10 left",
        "         30 of 40 tokens, 0:00:20 left",
    ]


def test_one_bar_after_the_other(clock: _Clock) -> None:
    """Encoding rows, asking, reading rows: Rich takes one live display at a time, and each ends before the next."""
    file = StringIO()
    console = Console(file=file, force_terminal=True, width=120, highlight=False, soft_wrap=True)
    with EvalView(console, baseline=False) as view:
        for now, event in enumerate((
            EncodingProgress("a.jsonl", 1, 0.1), asking(1), EncodingProgress("a.jsonl", 2, 0.2),
            EncodingProgress("a.jsonl", 3, 0.3), asking(2), asking(3, kind="generate_until"),
            EvaluationProgress(1, 9), EncodingProgress("b.jsonl", 1, 0.1), EncodingProgress("b.jsonl", 2, 0.1),
            EvaluationProgress(2, 9), Stage("x"), asking(4),
        )):  # fmt: skip
            clock.now = 10.0 * now
            view(event)
    assert plain(file.getvalue()).count("encode ") >= 2


def test_a_failure_takes_the_bar_away() -> None:
    """What is printed after it begins a line of its own."""
    file = StringIO()
    console = Console(file=file, force_terminal=True, width=120, highlight=False, soft_wrap=True)
    with contextlib.suppress(ZeroDivisionError), EvalView(console, baseline=False) as view:
        view(asking(1))
        raise ZeroDivisionError
    assert file.getvalue().endswith("\x1b[1A\x1b[2K")


# ------------------------------------------------------------------------------------------- The list of names


@pytest.mark.parametrize("terminal", [False, True])
def test_the_list(terminal: bool) -> None:
    """A line a name, with nothing else where another program reads it; a name that is too long moves its own line."""
    file = StringIO()
    console = Console(file=file, force_terminal=terminal, width=60, highlight=False, soft_wrap=True)
    long = "x" * 50
    show_tasks(
        console,
        [
            Listing("arc_easy", "task", 1, "multiple_choice"),
            Listing("mmlu", "group", 57, None),
            Listing("odd", "python task", 1, None),
            Listing(long, "tag", 1, None),
        ],
    )
    lines = plain(file.getvalue()).splitlines()
    assert lines[:4] == [
        f"{'arc_easy':<40}  task         multiple_choice",
        f"{'mmlu':<40}  group        57 tasks",
        f"{'odd':<40}  python task",
        f"{long}  tag          1 task",
    ]
    assert lines[4:] == ["         4 names"] * terminal
