"""The options of the commands, as Typer reads them: what they are called, what they take, and what help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

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
