"""What an answer to one of `qlora init`'s questions means, whether it was typed, or given with a flag."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qlora_cli.data.formats import OPTIONAL, REQUIRED
from qlora_cli.data.sample import Layout
from qlora_cli.errors import DataError, ModelError, OutputError, RequestError
from qlora_cli.recipe.paths import HUB_NAME, expand_home, is_local, model_problem
from qlora_cli.recipe.yaml_source import parse_scalar, shorten
from qlora_cli.training.run_folder import RunFolder

T = TypeVar("T")


def understood(owner: str, read: Callable[[str], T], text: str) -> T:
    """What `read` makes of `text`. Raises RequestError, opened by `owner`, for whatever is wrong with it."""
    try:
        text.encode()
        return read(text)
    except RequestError as error:
        raise RequestError(f"{owner}: {error}" if owner else str(error)) from error
    except (OSError, ValueError) as error:  # names that the file system, or a recipe, cannot have
        reason = "it is not Unicode text" if isinstance(error, UnicodeError) else error
        problem = f"{shorten(repr(text))} cannot be looked up: {reason}"
        raise RequestError(f"{owner}: {problem}" if owner else problem) from error


def read_model(text: str) -> str:
    """A base model: a folder that has one, or a hub name. Raises ModelError."""
    if not is_local(text):
        check_hub_name(text, "a folder", ModelError)
    elif problem := model_problem(Path(expand_home(text)), text):
        raise ModelError(problem)
    return text


def check_hub_name(text: str, instead: str, error: type[RequestError] = DataError) -> None:
    """Refuse what is no name that a hub could have."""
    if not HUB_NAME.fullmatch(text):
        raise error(f"expected {instead} that is here, or a hub name such as org/name, got {shorten(repr(text))}.")


def read_share(text: str) -> float | None:
    """A share of the rows, at least 0 and below 1; None for what is no number. Raises DataError."""
    value = parse_scalar(text.strip())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not 0 <= value < 1:
        raise DataError(f"expected a share of the rows, above 0 and below 1 (0: none), got {text}.")
    return float(value)


def read_columns(text: str) -> dict[str, str]:
    """`dataset.columns` from `question, answer` (a prompt and an answer), `content` (text alone), or `prompt=question,
    completion=answer` (any fields). A name with a comma stands in double quotes. Raises DataError."""
    try:
        cells = [cell.strip() for cell in next(csv.reader([text], skipinitialspace=True), [])]
    except csv.Error:
        cells = []
    pairs = [tuple(part.strip() for part in cell.split("=", 1)) for cell in cells]
    fields = {name for format in REQUIRED for name in (*REQUIRED[format], *OPTIONAL[format])}
    # `a=b` may be the name of a column.
    if pairs and all(len(pair) == 2 for pair in pairs) and (len(pairs) > 2 or any(pair[0] in fields for pair in pairs)):
        columns = {pair[0]: pair[-1] for pair in pairs}
    elif len(cells) == 2:
        columns = {"prompt": cells[0], "completion": cells[1]}
    else:
        columns = {"text": cells[0]} if len(cells) == 1 else {}
    if not columns or not all(columns) or not all(columns.values()) or len(columns) < len(cells):
        raise DataError(
            f"expected the columns of the prompt and of the answer, as in `question, answer`, or fields and columns, "
            f"as in `prompt=question,completion=answer`; got {shorten(repr(text))}."
        )
    return columns


def columns_text(layout: Layout) -> str:
    """A layout such that `read_columns` gives it back."""
    columns = {name: layout.columns.get(name, name) for name in REQUIRED[layout.format]} | dict(layout.columns)
    pair = layout.format == "prompt_completion"
    text = io.StringIO()
    cells = columns.values() if pair else (f"{name}={column}" for name, column in columns.items())
    csv.writer(text, lineterminator="").writerow(cells)
    return ", ".join(columns.values()) if pair and '"' not in text.getvalue() else text.getvalue()


def read_run_folder(text: str) -> str:
    """A run folder that can be written. Raises OutputError."""
    if not text.strip():
        raise OutputError("expected a folder, got nothing.")
    folder = RunFolder(Path(expand_home(text)))
    if folder.path.is_dir() and folder.holds_a_run():
        raise OutputError(f"{text} already holds a run; name another folder.")
    try:
        folder.check(resume=False)
    except OutputError as error:
        raise OutputError(str(error).removeprefix("output_dir: ")) from error
    return text
