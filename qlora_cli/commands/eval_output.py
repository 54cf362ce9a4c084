"""What `qlora eval --output` may name, seen before anything is computed."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from qlora_cli.benchmarking.request import EvalRequest
from qlora_cli.errors import OutputError
from qlora_cli.evaluation.new_files import base_of, samples_file, samples_name
from qlora_cli.recipe.data_files import shown_path

_RESULTS = ".json"
_LONGEST = 255  # bytes of a name, on most file systems


def check_output(output: Path, samples: Sequence[str]) -> None:
    """Refuse a results file, and files of answers by the patterns `samples`, that must not or cannot be written.

    Raises:
        OutputError: if it is there, has another ending, or cannot be made.
    """
    shown = shown_path(output)
    try:
        _check_home(output)
        if output.is_dir():
            raise OutputError(
                f"--output: {shown} is a folder; expected the name of a file, such as {shown}/results.json"
            )
        if output.suffix.lower() != _RESULTS:
            raise OutputError(f"--output: expected the name of a JSON file, such as results.json, got {shown}")
        if output.exists() or output.is_symlink():
            raise OutputError(f"--output: {shown} is there already. Name another file, or delete it: nothing is ever "
                              "written over")  # fmt: skip
        folder = next(parent for parent in output.absolute().parents if parent.exists())
        others = sorted(path for pattern in samples for path in output.parent.glob(pattern))
    except OSError as error:
        raise OutputError(f"--output: {str(output)[:200]}: cannot be written: {error.strerror or error}") from None
    if others:
        raise OutputError(
            f"--output: {shown_path(others[0])} is there already, and the samples of {shown} would have its name. Name "
            "another file, or delete it"
        )
    if not folder.is_dir():
        raise OutputError(f"--output: {shown_path(folder)} is no folder, so {shown} cannot be made")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"--output: {shown_path(folder)} cannot be written, so {shown} cannot be made there")


def check_samples_names(request: EvalRequest, tasks: Sequence[str]) -> None:
    """Refuse a results file whose files of answers to these tasks could not be called after it.

    Raises:
        OutputError: if the name of one is too long.
    """
    if request.output is None or not request.log_samples or not tasks or not request.output.name:
        return
    if _bytes(request.output.name) > _LONGEST:
        return  # as `check_output` says
    after = base_of(request.output) if request.baseline else request.output
    longest = max((samples_file(after, task).name for task in tasks), key=_bytes)
    if (over := _bytes(longest) - _LONGEST) > 0:
        raise OutputError(
            f"--output: the samples would be called {longest[:80]}…, {_bytes(longest)} bytes long, and a name may have "
            f"{_LONGEST}. Name a file whose name is shorter by {over}"
        )


def samples_patterns(request: EvalRequest, output: Path) -> list[str]:
    """What the files of answers will be called; see `evaluation.new_files.samples_file`."""
    if not request.log_samples:
        return []
    name = glob.escape(samples_name(output))
    return [f"samples_*_{name}{end}.jsonl" for end in ("", *(["-base"] if request.baseline else []))]


def _check_home(output: Path) -> None:
    """Refuse `~somebody/…` where there is no such user; it would become a folder of that name."""
    first = output.parts[0] if len(output.parts) > 1 else ""
    if first.startswith("~") and not Path(first).exists():
        known = "the home folder is not known here" if first == "~" else f"there is no user {first[1:]}"
        raise OutputError(f"--output: {shown_path(output)}: {known}; write the folder's path")


def _bytes(name: str) -> int:
    return len(os.fsencode(name))
