"""What a person sees of a run, event by event, on a terminal and in a log."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from qlora_cli.console import describe_rows, make_console, show_error, visible
from qlora_cli.errors import DataError
from qlora_cli.train_view import TrainView
from qlora_cli.training.events import (
    BestKept,
    CheckpointSaved,
    DataReady,
    EvalRecord,
    EvaluationProgress,
    Event,
    Finished,
    ModelReady,
    Notice,
    Rehearsed,
    SourceReady,
    Stage,
    Started,
    StepDone,
    StepSkipped,
    TrainRecord,
)

DATA = DataReady(
    split="train",
    sources=(SourceReady("data/train.jsonl", "prompt_completion", 7473, 1.0),),
    fingerprint="f" * 64,
    rows=7473,
    sequences=7473,
    tokens=1_234_567,
    supervised_tokens=987_654,
    dropped=0,
    truncated=0,
    skipped=0,
)
MODEL = ModelReady(
    name="org/model",
    architecture="LlamaForCausalLM",
    device="cuda:0",
    total_parameters=134_515_008,
    trainable_parameters=4_884_480,
    quantized_parameters=106_168_320,
    base_bytes=112_000_000,
    bits_per_quantized_parameter=4.127,
    storage="nf4, double quantisation",
    adapted_layers=210,
)
STARTED = Started(output_dir=Path("runs/x"), first_step=0, total_steps=1875, epochs=3.0, sequences_per_step=16)
REHEARSED = Rehearsed(
    rows=8,
    tokens=2048,
    step_seconds=3.21,
    evaluation_seconds=0.87,
    checkpoint_bytes=59_000_000,
    checkpoint_seconds=0.44,
    peak_memory_bytes=5_900_000_000,
)
STEP = StepDone(step=1, loss=2.5, learning_rate=2e-4, grad_norm=0.1, tokens=1000, seconds=0.5)
RECORD = TrainRecord(
    step=10,
    epoch=0.256,
    loss=1.23456,
    learning_rate=2e-4,
    grad_norm=0.98765,
    tokens=12_345,
    tokens_per_second=4321.9,
    seconds=1234.5,
)
EVAL = EvalRecord(step=10, eval_loss=1.5, perplexity=4.4817, supervised_tokens=100, seconds=1.0)
FINISHED = Finished(
    adapter=Path("runs/x/adapter"),
    steps=1875,
    seconds=2000.0,
    tokens=4_000_000,
    peak_memory_bytes=1_500_000_000,
    first_eval_loss=2.5,
    last_eval_loss=1.25,
)
EVERY = (
    Notice("n"),
    Stage("s"),
    DATA,
    MODEL,
    REHEARSED,
    STARTED,
    EvaluationProgress(1, 4),
    EVAL,
    STEP,
    RECORD,
    CheckpointSaved(10, Path("runs/x/checkpoints/step-000010")),
    FINISHED,
)


def shown(*events: Event, terminal: bool = False, width: int = 100) -> str:
    """Everything that a view prints for these events."""
    file = StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, highlight=False, soft_wrap=True)
    with TrainView(console) as view:
        for event in events:
            view(event)
    return file.getvalue()


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Notice("going on from step-000005"), "note     going on from step-000005\n"),
        (Stage("loading org/model"), "         loading org/model …\n"),
        (
            DATA,
            "data     train: 7,473 rows, 1,234,567 tokens, 987,654 of them supervised "
            "(prompt_completion, data/train.jsonl)\n",
        ),
        (
            MODEL,
            "model    org/model (LlamaForCausalLM) on cuda:0\n"
            "         nf4, double quantisation: 4.127 bits per parameter for 106.2 M of 134.5 M, 112.00 MB in all\n"
            "         LoRA on 210 layers: 4,884,480 trainable parameters, 3.50%\n",
        ),
        (
            REHEARSED,
            "tried    the longest batch (8 rows of 2,048 tokens) in 3.2 s, an evaluation batch in 0.9 s, "
            "a checkpoint of 59.00 MB in 0.4 s; peak memory 5.90 GB\n",
        ),
        (STARTED, "train    1,875 steps of 16 rows, 3 epochs, into runs/x\n"),
        (STEP, ""),
        (
            RECORD,
            "step     10  epoch 0.26  loss 1.2346  lr 2.00e-04  grad norm 0.988  4,322 tokens/s  1,234 s\n",
        ),
        (
            StepSkipped(7, "loss is nan", "Rows of a.jsonl in it: line 3, 5"),
            "note     skipped step 7, which changed nothing: its loss is nan. Rows of a.jsonl in it: line 3, 5\n",
        ),
        (EvaluationProgress(1, 4), ""),
        (EVAL, "eval     step 10  held-out loss 1.5000  perplexity 4.482\n"),
        (CheckpointSaved(10, Path("c/step-000010")), "saved    c/step-000010\n"),
        (
            FINISHED,
            "done     1,875 steps, 4,000,000 tokens in 2,000 s (2,000 tokens/s), peak memory 1.50 GB\n"
            "         held-out loss 2.5000 before, 1.2500 after\n"
            "adapter  runs/x/adapter/  (PEFT format)\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_the_lines_of_a_log(event: Event, text: str) -> None:
    """Each event's whole text where nobody watches: a file, CI. What only moves a bar prints nothing."""
    assert shown(event) == text


def test_an_end_that_is_not_the_last_step() -> None:
    """Why it stopped, how many steps were skipped, and whose adapter it is."""
    best = BestKept(50, "eval_loss", 0.8717, Path("runs/x/checkpoints/step-000050"))
    assert shown(best) == "best     eval_loss 0.8717 after step 50: runs/x/checkpoints/step-000050 stays\n"
    reason = "no lower held-out loss than 0.8717, after step 50, in 3 evaluations in a row"
    ended = replace(FINISHED, steps=80, stopped_early=reason, skipped_steps=1, loaded=best, last_eval_loss=0.9)
    assert shown(ended).splitlines()[1:] == [
        f"         stopped early: {reason}",
        "         1 step skipped: the loss or the gradient was not finite",
        "         held-out loss 2.5000 before, 0.9000 after the last step",
        "best     eval_loss 0.8717 after step 50: runs/x/checkpoints/step-000050",
        "adapter  runs/x/adapter/  (PEFT format, that of step 50)",
    ]


def test_a_skipped_step_moves_the_bar() -> None:
    file = StringIO()
    with TrainView(Console(file=file, force_terminal=True, width=120)) as view:
        view(STARTED)
        view(StepSkipped(7, "loss is nan", "Rows"))
        assert view._progress is not None
        assert view._progress.tasks[0].completed == 7


def test_rows_that_were_lost_are_told() -> None:
    event = DataReady(**{**vars(DATA), "dropped": 1200, "truncated": 3})
    assert "supervised, 1,200 dropped, 3 truncated (prompt" in shown(event)


def test_an_unquantised_model() -> None:
    """No bits per quantised parameter where there is none."""
    event = ModelReady(**{**vars(MODEL), "quantized_parameters": 0, "storage": "bfloat16", "name": "gpt2"})
    assert shown(event).splitlines()[1] == "         bfloat16: 134.5 M parameters, 112.00 MB in all"


def test_a_run_on_packs() -> None:
    """What keeps their rows apart, and that steps are of packs."""
    lines = shown(replace(MODEL, packing="block-diagonal mask"), replace(STARTED, packed=True)).splitlines()
    assert lines[3:] == [
        "         the rows of a pack do not see each other: block-diagonal mask",
        "train    1,875 steps of 16 packs, 3 epochs, into runs/x",
    ]


def test_a_rehearsal_on_packs_without_held_out_rows() -> None:
    event = Rehearsed(**{**vars(REHEARSED), "rows": 1, "tokens": 1, "evaluation_seconds": None, "packed": True})
    assert shown(event).startswith("tried    the longest batch (1 pack of 1 token) in 3.2 s, a checkpoint of 59.00 MB ")


def test_a_loss_without_a_perplexity() -> None:
    """A loss too large for e to its power stands alone."""
    event = EvalRecord(step=0, eval_loss=1000.0, perplexity=None, supervised_tokens=1, seconds=1.0)
    assert shown(event) == "eval     step 0  held-out loss 1000.0000\n"


def test_a_run_that_was_evaluated_only_afterwards() -> None:
    event = Finished(**{**vars(FINISHED), "first_eval_loss": None})
    assert "         held-out loss 1.2500 after\n" in shown(event)


def test_a_run_without_held_out_rows() -> None:
    event = Finished(**{**vars(FINISHED), "first_eval_loss": None, "last_eval_loss": None, "seconds": 0.0})
    assert shown(event) == (
        "done     1,875 steps, 4,000,000 tokens in 0 s (0 tokens/s), peak memory 1.50 GB\n"
        "adapter  runs/x/adapter/  (PEFT format)\n"
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 K"), (1_500_000, "1.5 M"), (6_738_415_616, "6.7 B")],
)
def test_counts(count: int, text: str) -> None:
    event = ModelReady(**{**vars(MODEL), "quantized_parameters": 0, "total_parameters": count})
    assert f": {text} parameters," in shown(event)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (123_456_789, "123.46 MB"), (141_200_000_000, "141.20 GB")],
)
def test_bytes(count: int, text: str) -> None:
    """Decimal units, as disks and GPUs are sold."""
    event = Finished(**{**vars(FINISHED), "peak_memory_bytes": count})
    assert f"peak memory {text}\n" in shown(event)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "name", ["[red]x", "[/]", "[/bold]", "a[0].jsonl", "x\\", "\\[b]", ":smile:", "[link=x]y[/link]"]
)
def test_names_are_shown_as_they_are(name: str, terminal: bool) -> None:
    """Brackets, backslashes and colons in file and model names are no markup, in any event that shows one."""
    events = (
        Notice(name),
        DataReady(**{**vars(DATA), "sources": (SourceReady(name, "text", 1, 1.0),)}),
        ModelReady(**{**vars(MODEL), "name": name}),
        Started(**{**vars(STARTED), "output_dir": Path(name)}),
        CheckpointSaved(1, Path(name)),
        Finished(**{**vars(FINISHED), "adapter": Path(name)}),
    )
    for event in events:
        assert str(Path(name)) in shown(event, terminal=terminal)
    assert name in shown(Stage(name), terminal=True)


def test_no_line_of_a_log_is_wrapped_or_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """A long path stays on its line; whoever reads the log may search for it."""
    path = Path("runs") / ("x" * 500)
    with TrainView(make_console()) as view:
        view(CheckpointSaved(1, path))
    assert capsys.readouterr().out == f"saved    {path}\n"


def test_a_log_has_no_control_codes() -> None:
    """From the first event to the last: printable characters and newlines."""
    text = shown(*EVERY)
    assert set(text) - {"\n"} == {character for character in text if character.isprintable()}
    assert text.count("\n") == 14


def test_on_a_terminal_a_bar_takes_the_place_of_records() -> None:
    """Stages, the step of all steps, the newest loss, learning rate and speed; no line for every record."""
    text = shown(*EVERY, terminal=True)
    assert "s …" in text
    assert "step    " in text
    assert "1/1875" in text
    assert "loss 2.5000  lr 2.00e-04  2,000 tokens/s" in text
    assert "epoch 0.26" not in text
    assert "\x1b[" in text


def test_the_speed_shown_is_smoothed() -> None:
    """One slow step moves it by a fifth of the way."""
    file = StringIO()
    with TrainView(Console(file=file, force_terminal=True, width=120)) as view:
        view(STARTED)
        view(STEP)
        view(StepDone(step=2, loss=2.5, learning_rate=2e-4, grad_norm=0.1, tokens=1000, seconds=1.0))
    assert "1,800 tokens/s" in file.getvalue()


def test_the_evaluation_has_a_bar_of_its_own() -> None:
    """It counts batches, and is gone when the loss is known; the next evaluation begins a new one."""
    file = StringIO()
    with TrainView(Console(file=file, force_terminal=True, width=120)) as view:
        view(STARTED)
        for loss in (1.5, 1.25):
            view(EvaluationProgress(3, 4))
            assert view._progress is not None
            assert [(task.description, task.completed, task.total) for task in view._progress.tasks] == [
                ("step", 0, 1875),
                ("evaluate", 3, 4),
            ]
            view(EvalRecord(step=0, eval_loss=loss, perplexity=None, supervised_tokens=1, seconds=1.0))
            assert [task.description for task in view._progress.tasks] == ["step"]
    assert "held-out loss 1.2500" in file.getvalue()


def test_a_resumed_run_begins_where_it_was() -> None:
    text = shown(Started(**{**vars(STARTED), "first_step": 1000}), terminal=True)
    assert "875 steps of 16 rows" in text
    assert "1000/1875" in text


@pytest.mark.parametrize("failing", [False, True])
def test_nothing_is_drawn_after_the_end(failing: bool) -> None:
    """The bar's thread is stopped and the cursor is back, also when the run fails."""
    file = StringIO()
    console = Console(file=file, force_terminal=True, width=100)
    view = TrainView(console)
    try:
        with view:
            view(STARTED)
            view(STEP)
            progress = view._progress
            if failing:
                raise DataError("x")
    except DataError:
        assert failing
    assert progress is not None
    assert progress.finished is False
    assert not progress.live.is_started
    before = file.getvalue()
    assert before.endswith("\x1b[?25h") or "\x1b[?25h" in before.rsplit("\x1b[?25l", 1)[1]
    progress.refresh()
    assert file.getvalue() == before


def test_errors_go_to_stderr_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """One word, then the message, brackets and long lines untouched; nothing on stdout."""
    message = f"[red]rows[0].jsonl, line 2: :smile: {'x' * 300}"
    show_error(DataError(message))
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_what_comes_from_elsewhere_does_not_steer_the_terminal() -> None:
    """Colours, titles, and writing from right to left are written out; line breaks, emoji and their joiners stay."""
    family = "👩\u200d👩"
    assert visible(f"a\x1b[31mb\x9bc\u202ed\n\te {family}") == f"a\\x1b[31mb\\x9bc\\u202ed\n\te {family}"


def test_several_sources_are_told_one_by_one() -> None:
    """Each with its format, its rows and how often they are seen, under the sum of them."""
    sources = (
        SourceReady("a.jsonl", "messages", 7000, 1.0),
        SourceReady("b.csv", "alpaca", 473, 0.5),
        SourceReady("c.csv", "text", 1, 3.0),
    )
    event = DataReady(**{**vars(DATA), "sources": sources, "rows": 7474, "sequences": 8000, "skipped": 2})
    assert describe_rows(event).splitlines() == [
        "train: 7,474 rows as 8,000 sequences, 1,234,567 tokens, 987,654 of them supervised, 2 skipped, from 3 sources",
        "         a.jsonl (messages): 7,000 rows",
        "         b.csv (alpaca): 473 rows, 0.5 times an epoch",
        "         c.csv (text): 1 row, 3 times an epoch",
    ]
