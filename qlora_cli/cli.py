"""The `qlora` command. Every command imports what it needs inside itself, so that `--help` never pays for torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qlora_cli import __version__

app = typer.Typer(
    name="qlora",
    help="Fine-tune language models in 4 bits from a YAML recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The YAML recipe.", show_default=False)]
_Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one value of the recipe, as in --set training.max_steps=20. May be given again.",
    ),
]

_Output = Annotated[
    Path, typer.Option("--output", metavar="DIR", help="The folder to make; it must not hold anything yet.")
]
_MergeBase = Annotated[
    Literal["auto", "original", "dequantized"],
    typer.Option(
        "--base",
        help="What is added to: the original weights; what the 4-bit base that the adapter was trained over holds, "
        "dequantised; or, with auto, whichever gives the lower held-out loss.",
    ),
]
_MergeDtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option("--dtype", help="Of the merged weights; by default each is as the base has it.", show_default=False),
]
_Quantize = Annotated[
    Literal["nf4", "fp4"] | None,
    typer.Option(
        "--quantize",
        help="Write the merged model in 4 bits, as a bitsandbytes checkpoint, and measure what that costs.",
        show_default=False,
    ),
]
_ShardSize = Annotated[
    str, typer.Option("--max-shard-size", metavar="SIZE", help="The largest file of weights to write.")
]
_Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where sums are made and models compared.")
]
_Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify", help="Load what was written and compare it with the trained model on held-out rows."
    ),
]
_VerifyRows = Annotated[int, typer.Option("--verify-rows", metavar="N", min=1, help="How many rows to compare on.")]
_BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="MODEL",
        help="Hub name or local folder of the base, where what the adapter says does not lead there.",
    ),
]
_Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a base on the hub.")
]
_TrainedBase = Annotated[
    Literal["16bit", "nf4", "nf4-double", "fp4", "fp4-double"] | None,
    typer.Option(
        "--trained-base",
        help="How the base was stored in training, where nothing in the adapter's folder tells.",
        show_default=False,
    ),
]
_AllowUnchanged = Annotated[
    bool, typer.Option("--allow-unchanged", help="Go on though a weight, or what the model says, is not changed.")
]
_IntoAdapter = Annotated[
    list[Path] | None,
    typer.Option(
        "--into-adapter",
        metavar="ADAPTER",
        help="In place of ADAPTER: combine adapters of one base, exactly, into one. Given once for each of them.",
    ),
]
_Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="W,...", help="How much of each --into-adapter, as in 0.6,0.4; by default 1."),
]


def _given(context: typer.Context) -> dict[str, object]:
    """The parameters that somebody gave, at their defaults or not."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name: context.params[name] for name, source in sources.items() if source and "DEFAULT" not in source.name}


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune language models in 4 bits from a YAML recipe."""


@app.command()
def train(
    recipe: _RecipePath,
    overrides: _Overrides = None,
    output_dir: Annotated[
        str | None, typer.Option("--output-dir", metavar="DIR", help="The run folder, in place of the recipe's.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the run folder from its newest whole checkpoint.")
    ] = False,
) -> None:
    """Train a LoRA adapter on a 4-bit base model, as the recipe says.

    Exit codes: 0 done; 1 the run failed; 2 the request was wrong; 130 interrupted, state saved.
    """
    from qlora_cli.commands.train import train as command

    raise typer.Exit(command(recipe, overrides=overrides or [], output_dir=output_dir, resume=resume))


@app.command()
def check(
    recipe: _RecipePath,
    overrides: _Overrides = None,
    show: Annotated[
        int | None,
        typer.Option(
            "--show",
            metavar="N",
            min=0,
            show_default=False,
            help="Show the first N training rows as the model sees them, what it learns in colour and in «». "
            "By default none; with --json 3.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the facts as one JSON object, with input_ids and labels of the rows.")
    ] = False,
) -> None:
    """Check a recipe and its data: every mistake, and what training would make of the rows. Loads no weights.

    What is on a hub that cannot be reached is noted, and not looked at.

    Exit codes: 0 no mistake was found; 2 training would be refused, or meaningless; 130 interrupted.
    """
    from qlora_cli.commands.check import check as command

    raise typer.Exit(command(recipe, overrides=overrides or [], show=show, as_json=as_json))


@app.command()
def merge(
    context: typer.Context,
    output: _Output,
    adapter: Annotated[
        Path | None,
        typer.Argument(
            metavar="ADAPTER", help="A run folder, a checkpoint of one, or any PEFT LoRA folder.", show_default=False
        ),
    ] = None,
    base: _MergeBase = "auto",
    dtype: _MergeDtype = None,
    quantize: _Quantize = None,
    max_shard_size: _ShardSize = "5GB",
    device: _Device = "auto",
    verify: _Verify = True,
    verify_rows: _VerifyRows = 32,
    base_model: _BaseModel = None,
    revision: _Revision = None,
    trained_base: _TrainedBase = None,
    allow_unchanged: _AllowUnchanged = False,
    into_adapter: _IntoAdapter = None,
    weights: _Weights = None,
) -> None:
    """Fold an adapter into its base's weights, and show that the result is the model that was trained.

    Streams from file to file: memory stays small, whatever the model's size. What is in DIR at the end is whole.

    Exit codes: 0 done; 1 failed, or not the trained model; 2 the request was wrong; 130 interrupted.

    With any code but 0 there is no DIR.
    """
    from qlora_cli.commands import merge as command
    from qlora_cli.merging.request import MergeRequest

    if into_adapter:
        given = _given(context)
        raise typer.Exit(
            command.combine(into_adapter, weights, output, base_model=base_model, revision=revision, given=given)
        )
    if adapter is None:
        raise typer.BadParameter("expected an ADAPTER to merge, or --into-adapter for each of several to add up")
    if weights is not None:
        raise typer.BadParameter("--weights are those of several --into-adapter")
    request = MergeRequest(
        adapter=adapter,
        output=output,
        max_shard_size=max_shard_size,
        base=base,
        dtype=dtype,
        device=device,
        verify=verify,
        verify_rows=verify_rows,
        base_model=base_model,
        revision=revision,
        trained_base=trained_base,
        allow_unchanged=allow_unchanged,
        quantize=quantize,
    )
    raise typer.Exit(command.merge(request))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The recipe to write.")] = Path("recipe.yaml"),
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="MODEL", help="Hub name or local folder of the base model.")
    ] = None,
    train: Annotated[
        str | None, typer.Option("--train", metavar="ROWS", help="Rows to learn: file, folder, glob or hub name.")
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation", metavar="ROWS|SHARE", help="Held-out rows, or the share of the rows to hold out; 0: none."
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            metavar="FIELD=COLUMN,...",
            help="What the columns mean, as in --columns prompt=question,completion=answer.",
        ),
    ] = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", metavar="DIR", help="The run folder.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other value of the recipe, as in --set training.max_steps=20. May be given again.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Take every default; so it is without a terminal, too.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a recipe that is there.")] = False,
) -> None:
    """Write a first recipe, from at most five questions about the model and the data.

    A flag answers its question. Paths are relative to the current folder; in the recipe, to the recipe.

    Exit codes: 0 done; 2 the request was wrong, nothing was written; 130 interrupted, nothing was written.
    """
    from qlora_cli.commands.init import init as command

    flags = {
        "base_model": base_model,
        "train": train,
        "validation": validation,
        "columns": columns,
        "output_dir": output_dir,
    }
    raise typer.Exit(command(path, flags=flags, overrides=overrides or [], defaults=yes, force=force))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, from which editors complete and underline them.

    Save it beside your recipes: qlora schema > recipe.schema.json
    """
    from qlora_cli.commands.schema import schema as command

    raise typer.Exit(command())
