"""The `qlora` command. Every command imports what it needs inside itself, so that `--help` never pays for torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
