"""The `qlora` command. Every command imports what it needs inside itself, so that `--help` never pays for torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_cli import __version__
from qlora_cli.commands import options

app = typer.Typer(
    name="qlora",
    help="Fine-tune language models in 4 bits from a YAML recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    recipe: options.RecipePath,
    overrides: options.Overrides = None,
    output_dir: Annotated[
        str | None, typer.Option("--output-dir", metavar="DIR", help="The run folder, in place of the recipe's.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the run folder from its newest whole checkpoint.")
    ] = False,
    no_rehearsal: Annotated[
        bool,
        typer.Option(
            "--no-rehearsal", help="Begin at once: do not try the longest batch, a held-out one and a checkpoint first."
        ),
    ] = False,
) -> None:
    """Train a LoRA adapter on a 4-bit base model, as the recipe says.

    Exit codes: 0 done; 1 the run failed; 2 the request was wrong; 130 interrupted, state saved.
    """
    from qlora_cli.commands.train import train as command

    raise typer.Exit(
        command(recipe, overrides=overrides or [], output_dir=output_dir, resume=resume, rehearse=not no_rehearsal)
    )


@app.command()
def check(
    recipe: options.RecipePath,
    overrides: options.Overrides = None,
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
    output: options.MergeOutput,
    adapter: Annotated[
        Path | None,
        typer.Argument(
            metavar="ADAPTER", help="A run folder, a checkpoint of one, or any PEFT LoRA folder.", show_default=False
        ),
    ] = None,
    base: options.MergeBase = "auto",
    dtype: options.MergeDtype = None,
    quantize: options.Quantize = None,
    max_shard_size: options.ShardSize = "5GB",
    device: options.Device = "auto",
    verify: options.Verify = True,
    verify_rows: options.VerifyRows = 32,
    base_model: options.BaseModel = None,
    revision: options.Revision = None,
    trained_base: options.TrainedBase = None,
    allow_unchanged: options.AllowUnchanged = False,
    into_adapter: options.IntoAdapter = None,
    weights: options.Weights = None,
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


@app.command("eval")
def evaluate(
    context: typer.Context,
    target: options.Target = None,
    tasks: options.Tasks = None,
    listing: options.ListTasks = False,
    num_fewshot: options.NumFewshot = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = None,
    data_root: options.DataRoot = None,
    task_paths: options.TaskPaths = None,
    allow_partial: options.AllowPartial = False,
    bits: options.Bits = None,
    chat_template: options.ChatTemplate = False,
    system_instruction: options.SystemInstruction = None,
    baseline: options.Baseline = False,
    output: options.ResultsFile = None,
    log_samples: options.LogSamples = False,
    dataset: options.Dataset = None,
    overrides: options.DatasetOverrides = None,
    base_model: options.BaseModel = None,
    revision: options.TargetRevision = None,
    trained_base: options.TrainedBase = None,
    device: options.EvalDevice = "auto",
    seed: options.Seed = None,
    no_keep: options.NoKeep = False,
    trust_remote_code: options.TrustRemoteCode = False,
    run_unsafe_code: options.RunUnsafeCode = False,
) -> None:
    """Score a model on lm-eval's tasks, or its loss on rows; with --baseline against the base, beyond luck or not.

    What was answered is kept: a command that was stopped goes on where it was when it is given again.

    Exit codes: 0 done; 1 the evaluation failed; 2 the request was wrong; 130 interrupted, answers kept.
    """
    from qlora_cli.benchmarking.request import EvalRequest
    from qlora_cli.commands import eval as command

    given = _given(context)
    if listing:
        raise typer.Exit(command.list_tasks(target, task_paths or [], given=given))
    if target is None:
        raise typer.BadParameter("expected a TARGET to score, or --list to see what it can be scored on")
    request = EvalRequest(
        target, tasks=options.names(tasks or ()), dataset=dataset, overrides=tuple(overrides or ()),
        num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, data_root=data_root,
        task_paths=tuple(task_paths or ()), allow_partial=allow_partial, bits=bits, base_model=base_model,
        revision=revision, trained_base=trained_base, trust_remote_code=trust_remote_code,
        run_unsafe_code=run_unsafe_code, chat_template=chat_template, system_instruction=system_instruction,
        baseline=baseline, output=output, log_samples=log_samples, keep_answers=not no_keep, device=device, seed=seed,
    )  # fmt: skip
    raise typer.Exit(command.evaluate(request, given=given))


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
def selftest(
    device: options.SelftestDevice = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, once all is checked.")] = False,
) -> None:
    """Check on this device, with these versions, what this tool promises: six checks, in about a minute.

    On a tiny random model that it makes itself: nothing is fetched, and nothing is left on disk.

    Exit codes: 0 every promise is kept; 1 one is not, or may not be; 2 the request was wrong; 130 interrupted.
    """
    from qlora_cli.commands.selftest import selftest as command

    raise typer.Exit(command(device=device, as_json=as_json))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, from which editors complete and underline them.

    Save it beside your recipes: qlora schema > recipe.schema.json
    """
    from qlora_cli.commands.schema import schema as command

    raise typer.Exit(command())
