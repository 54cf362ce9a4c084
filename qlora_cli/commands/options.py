"""The options of the commands, as Typer reads them: what they are called, what they take, and what help says."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import typer


def _batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise typer.BadParameter(f"expected a whole number above 0, or auto, got {text!r}")
    return int(text)


def _limit(text: str) -> int | float:
    """A number of documents, or a share of them."""
    with suppress(ValueError):
        if text.isdecimal() and int(text) > 0:
            return int(text)
        if 0 < float(text) < 1:
            return float(text)
    raise typer.BadParameter(f"expected a whole number above 0, or a share such as 0.1, got {text!r}")


def _bits(text: str) -> Literal[4, 8, 16]:
    known: dict[str, Literal[4, 8, 16]] = {"4": 4, "8": 8, "16": 16}
    if text not in known:
        raise typer.BadParameter(f"expected 4, 8 or 16, got {text!r}")
    return known[text]


def names(given: Sequence[str]) -> tuple[str, ...]:
    """The names that stand in an option, or in each of several, with commas between them."""
    return tuple(name for text in given for part in text.split(",") if (name := part.strip()))


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one value of the recipe, as in --set training.max_steps=20. May be given again.",
    ),
]

MergeOutput = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="The folder to make; it must not hold anything yet.")
]
MergeBase = Annotated[
    Literal["auto", "original", "dequantized"],
    typer.Option(
        "--base",
        help="What is added to: the original weights; what the 4-bit base that the adapter was trained over holds, "
        "dequantised; or, with auto, whichever gives the lower held-out loss.",
    ),
]
MergeDtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option("--dtype", help="Of the merged weights; by default each is as the base has it.", show_default=False),
]
Quantize = Annotated[
    Literal["nf4", "fp4"] | None,
    typer.Option(
        "--quantize",
        help="Write the merged model in 4 bits, as a bitsandbytes checkpoint, and measure what that costs.",
        show_default=False,
    ),
]
ShardSize = Annotated[
    str, typer.Option("--max-shard-size", metavar="SIZE", help="The largest file of weights to write.")
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where sums are made and models compared.")
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify", help="Load what was written and compare it with the trained model on held-out rows."
    ),
]
VerifyRows = Annotated[int, typer.Option("--verify-rows", metavar="N", min=1, help="How many rows to compare on.")]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="MODEL",
        help="Hub name or local folder of the base, where what the adapter says does not lead there.",
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a base on the hub.")
]
TrainedBase = Annotated[
    Literal["16bit", "nf4", "nf4-double", "fp4", "fp4-double"] | None,
    typer.Option(
        "--trained-base",
        help="How the base was stored in training, where nothing in the adapter's folder tells.",
        show_default=False,
    ),
]
AllowUnchanged = Annotated[
    bool, typer.Option("--allow-unchanged", help="Go on though a weight, or what the model says, is not changed.")
]
IntoAdapter = Annotated[
    list[Path] | None,
    typer.Option(
        "--into-adapter",
        metavar="ADAPTER",
        help="In place of ADAPTER: combine adapters of one base, exactly, into one. Given once for each of them.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="W,...", help="How much of each --into-adapter, as in 0.6,0.4; by default 1."),
]

# What the options of `qlora eval` are about, where it is not the model.
_TASKS, _ROWS, _RESULTS = "Tasks", "Rows", "Results"

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="TARGET",
        help="A run folder, a checkpoint of one, a PEFT LoRA folder, a model folder, or the name of one on the hub. "
        "With --list: a PATTERN of names.",
        show_default=False,
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="NAME,...",
        rich_help_panel=_TASKS,
        help="Tasks, groups and tags of lm-eval, as in mmlu,arc_easy; patterns such as 'arc_*', too.",
        show_default=False,
    ),
]
ListTasks = Annotated[
    bool,
    typer.Option("--list", rich_help_panel=_TASKS, help="List the names that --tasks takes, and do nothing else."),
]
NumFewshot = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot",
        metavar="N",
        min=0,
        rich_help_panel=_TASKS,
        help="Examples in each prompt; by default as many as the task says.",
        show_default=False,
    ),
]
Limit = Annotated[
    float | None,
    typer.Option(
        "--limit",
        metavar="N",
        parser=_limit,
        rich_help_panel=_TASKS,
        help="Only the first N documents of each task and rows of --dataset, or that share of them if N is below 1.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N|auto",
        parser=_batch_size,
        rich_help_panel=_TASKS,
        help="At most so many sequences at once; by default auto, as many tokens as the device takes.",
        show_default=False,
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        metavar="DIR",
        rich_help_panel=_TASKS,
        help="Read the tasks' data from this folder, and never from the hub.",
    ),
]
TaskPaths = Annotated[
    list[Path] | None,
    typer.Option(
        "--task-path",
        metavar="DIR",
        rich_help_panel=_TASKS,
        help="A folder of tasks of your own, beside lm-eval's. May be given again.",
    ),
]
AllowPartial = Annotated[
    bool,
    typer.Option(
        "--allow-partial",
        rich_help_panel=_TASKS,
        help="Score a group, or what a pattern stands for, on those of its tasks whose data is there, and say so.",
    ),
]
Bits = Annotated[
    Literal[4, 8, 16] | None,
    typer.Option(
        "--bits",
        metavar="4|8|16",
        parser=_bits,
        help="How the base is stored: 4 is NF4, 8 is LLM.int8(). By default as the adapter was trained, or as the "
        "model is.",
        show_default=False,
    ),
]
ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--apply-chat-template",
        rich_help_panel=_TASKS,
        help="Render each prompt as a conversation; by default it is plain.",
    ),
]
SystemInstruction = Annotated[
    str | None,
    typer.Option("--system-instruction", metavar="TEXT", rich_help_panel=_TASKS, help="Said before each prompt."),
]
Baseline = Annotated[
    bool,
    typer.Option(
        "--baseline",
        rich_help_panel=_RESULTS,
        help="Score the base without the adapter, too, and compare document by document.",
    ),
]
ResultsFile = Annotated[
    Path | None,
    typer.Option(
        "--output", metavar="FILE", rich_help_panel=_RESULTS, help="Write the scores here as JSON, in lm-eval's format."
    ),
]
LogSamples = Annotated[
    bool,
    typer.Option(
        "--log-samples",
        rich_help_panel=_RESULTS,
        help="Write every question and its answer beside FILE, as JSON Lines.",
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="ROWS",
        rich_help_panel=_ROWS,
        help="Measure loss and perplexity on rows such as are trained on: file, folder, glob or hub name.",
    ),
]
DatasetOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        rich_help_panel=_ROWS,
        help="How the rows of --dataset are read, as in --set dataset.format=alpaca; by default as in the run that "
        "TARGET is of. May be given again.",
    ),
]
TargetRevision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a model or an adapter on the hub."),
]
EvalDevice = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where the model runs.")]
SelftestDevice = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="What is checked.")]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        rich_help_panel=_TASKS,
        help="Of the choice of examples and of what is sampled; by default as lm-eval draws them.",
        show_default=False,
    ),
]
NoKeep = Annotated[
    bool,
    typer.Option(
        "--no-keep",
        rich_help_panel=_RESULTS,
        help="Keep no answers for another start, and take none from an earlier one.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let code run that comes with the model or with a task's data.",
    ),
]
RunUnsafeCode = Annotated[
    bool,
    typer.Option(
        "--run-unsafe-code",
        rich_help_panel=_TASKS,
        help="Let code run that the model writes, which some tasks are about.",
    ),
]
