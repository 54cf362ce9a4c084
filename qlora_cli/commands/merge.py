"""`qlora merge`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_cli.commands.invocation import as_written
from qlora_cli.commands.stopping import exit_code
from qlora_cli.errors import RequestError
from qlora_cli.merging.output_folder import check_output
from qlora_cli.merging.request import MergeRequest
from qlora_cli.merging.tensors.sizes import parse_size

# What adapters are added up with, of the parameters of the command.
_TO_COMBINE = ("into_adapter", "weights", "output", "base_model", "revision")


def merge(request: MergeRequest) -> int:
    """Merge an adapter into its base, showing how it goes; returns the exit code."""

    def work() -> None:
        # Before torch: what is wrong with these is told at once.
        parse_size(request.max_shard_size, "--max-shard-size")
        check_output(request.output)
        from qlora_cli.console import make_console

        console = make_console()
        _set_up([request.adapter], request.base_model, progress=console.is_terminal, rows=request.verify)
        from qlora_cli.merge_view import MergeView
        from qlora_cli.merging.merge import merge as run

        with MergeView(console) as view:
            run(request, listeners=[view])

    return exit_code(work, lambda: _left(request.output))


def combine(
    adapters: Sequence[Path],
    weights: str | None,
    output: Path,
    *,
    base_model: str | None,
    revision: str | None,
    given: Mapping[str, object],
) -> int:
    """Add adapters up into one; returns the exit code.

    Args:
        weights: numbers with commas between them, one for each adapter; None is 1 for each.
        base_model, revision: of the base that they share, if not as the adapters say.
        given: all parameters of the command that somebody gave, by their names.
    """

    def work() -> None:
        if unused := [as_written(name, value) for name, value in given.items() if name not in _TO_COMBINE]:
            raise RequestError(f"{', '.join(unused)}: --into-adapter adds adapters up, and has no use for this")
        if revision is not None and base_model is None:
            raise RequestError("--revision: with --into-adapter, it is that of a --base-model, which was not given")
        numbers = _numbers(weights, len(adapters))
        check_output(output)
        from qlora_cli.console import make_console

        console = make_console()
        _set_up(adapters, base_model, progress=console.is_terminal, rows=False)
        from qlora_cli.merge_view import show_combined
        from qlora_cli.merging.combine import combine as run

        show_combined(console, run(adapters, numbers, output, base_model=base_model, revision=revision))

    return exit_code(work, lambda: _left(output))


def _left(output: Path) -> str:
    """What a merge that was ended has left."""
    # It takes its name whole, so that one file in it says that all are there.
    whole = output.is_dir() and any(output.iterdir())
    return f"stopped; {output} is whole" if whole else "stopped; nothing was written"


def _numbers(weights: str | None, count: int) -> list[float]:
    """What `--weights` says, one for each adapter."""
    if weights is None:
        return [1.0] * count
    try:
        numbers = [float(word) for word in weights.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise RequestError(f"--weights: expected numbers with commas between them, as in 0.6,0.4, got {weights!r}")
    if len(numbers) != count:
        expected = "1 number" if count == 1 else f"{count} numbers"
        raise RequestError(f"--weights: expected {expected}, one for each --into-adapter, got {len(numbers)}")
    return numbers


def _set_up(adapters: Sequence[Path], base_model: str | None, *, progress: bool, rows: bool) -> None:
    from qlora_cli.commands.libraries import set_up_libraries
    from qlora_cli.merging.adapters.peek import named_sources

    names = [name for adapter in adapters for name in named_sources(adapter)]
    set_up_libraries([*names, *([base_model] if base_model else [])], progress=progress, rows=rows)
