"""The questions of `qlora init`: at most five, each with a flag that answers it and a default that Enter takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypeVar

from qlora_cli.commands.given import Given, Said
from qlora_cli.commands.replies import (
    check_hub_name,
    columns_text,
    read_columns,
    read_model,
    read_run_folder,
    read_share,
    understood,
)
from qlora_cli.console import plural
from qlora_cli.data.formats import Format
from qlora_cli.data.sample import (
    Layout,
    Sample,
    chosen_layout,
    enough_tokens,
    format_of,
    layouts,
    take_sample,
    token_bound,
)
from qlora_cli.errors import DataError, RequestError
from qlora_cli.recipe.paths import expand_home, is_local
from qlora_cli.recipe.peek import (
    as_recipe_path,
    guess_model,
    guess_run_folder,
    guess_train,
    guess_validation,
    possible_rows,
)
from qlora_cli.recipe.schema import DatasetSection
from qlora_cli.recipe.starter import (
    DEFAULT_COLUMNS,
    DEFAULT_CONFIG,
    DEFAULT_MODEL,
    DEFAULT_ROWS,
    DEFAULT_SHARE,
    DEFAULT_TEST,
    Answers,
)

T = TypeVar("T")

_WHEN_FETCHED = "auto"  # the answer that leaves the columns of hub rows to be recognised when they are there


class Asker(Protocol):
    """Who sits at the terminal."""

    def ask(self, question: str, default: str | None) -> str:
        """What was typed. Raises EOFError if nothing more will come."""

    def tell(self, text: str) -> None:
        """Show a line."""


class _Question(NamedTuple):
    flag: str
    text: str
    default: str | None
    missing: str = ""  # what is said where there is no default


class _Rows(NamedTuple):
    """Rows by their name as typed. What is on the hub has no sample. A layout is there once the columns tell, or
    somebody did; until then there may be several `candidates`."""

    name: str
    sample: Sample | None = None
    layout: Layout | None = None
    candidates: tuple[Layout, ...] = ()

    def check(self, layout: Layout | None) -> int:
        """Tokens that these rows are below, laid out as `layout`; 0 if that is not known. Raises DataError."""
        if self.sample is None or layout is None:
            return 0
        chosen_layout(self.sample, layout.columns, layout.format)
        return token_bound(self.sample, layout)


_HeldOut = _Rows | float  # a share, 0 for none


def interview(given: Given, recipe_folder: Path, asker: Asker | None) -> Answers:
    """Ask what is not given; without an asker, take the defaults.

    Typed names are relative to the current folder; in the answers they are as a recipe in `recipe_folder` has them.

    Raises:
        RequestError: opened by the flag, if what is given cannot be, or what is not given has no default.
    """
    return _Interview(given, asker).answers(recipe_folder)


class _Interview:
    def __init__(self, given: Given, asker: Asker | None) -> None:
        self._given, self._asker = given, asker
        self._format: Format | Literal["auto"] = given.of_dataset("format") or "auto"

    def answers(self, folder: Path) -> Answers:
        given, here = self._given, Path()
        default: str | None = guess_model(here) or DEFAULT_MODEL
        question = _Question("--base-model", "Base model (hub name or folder)", default)
        base_model = self._settle(given.base_model, question, read_model)

        candidates = possible_rows(here)
        # Among several files nobody means a dataset on the hub.
        default = guess_train(here) or (None if candidates else DEFAULT_ROWS)
        missing = f"which rows to learn is not plain from what is here: {', '.join(candidates[:5])}. Name them."
        question = _Question("--train", "Rows to learn (file, folder, glob or hub name)", default, missing)
        rows = self._settle(given.train, question, self._read_rows)
        if given.columns:
            rows = understood("--columns", lambda _: self._laid_out(rows, given.columns), "")

        default = _default_held_out(rows)
        question = _Question("--validation", "Held-out rows (file, or a share of the rows; 0: none)", default)
        held_out = self._settle(given.validation, question, lambda text: self._read_held_out(text, rows))

        rows = self._with_layout(rows, held_out)
        question = _Question("--output-dir", "Run folder", guess_run_folder(rows.name, base_model))
        output_dir = self._settle(given.output_dir, question, read_run_folder)
        return _answers(given, folder, base_model, rows, held_out, output_dir)

    def _settle(self, said: Said | None, question: _Question, read: Callable[[str], T]) -> T:
        """What is given, typed or taken by default, as `read` understands it; typed mistakes are told."""
        if said is not None:
            return understood(said.owner, read, said.text)
        if self._asker is None:
            if question.default is None:
                raise RequestError(f"{question.flag}: {question.missing}")
            return understood(f"{question.flag} (not given, so {question.default})", read, question.default)
        while True:
            text = self._asker.ask(question.text, question.default).strip() or question.default
            if text is None:
                self._asker.tell(question.missing)
                continue
            try:
                return understood("", read, text)
            except RequestError as error:
                self._asker.tell(str(error))

    def _read_rows(self, text: str) -> _Rows:
        if not is_local(text):
            check_hub_name(text, "a file, folder or glob")
            rows = _Rows(text)
            return self._laid_out(rows, DEFAULT_COLUMNS) if text == DEFAULT_ROWS and not self._given.columns else rows
        sample = take_sample(expand_home(text))
        candidates = () if self._given.columns else tuple(layouts(sample, self._format))
        rows = _Rows(text, sample, candidates[0] if len(candidates) == 1 else None, candidates)
        rows.check(rows.layout)
        if self._asker is not None:
            self._asker.tell(f"{_count(sample)} with the columns {', '.join(sample.columns)}")
        return rows

    def _laid_out(self, rows: _Rows, columns: Mapping[str, str]) -> _Rows:
        """The rows with their columns as somebody said. Raises DataError if that cannot be."""
        if rows.sample is None:
            return rows._replace(layout=Layout(format_of(columns, self._format), columns))
        # With the spaces that they have in the file.
        spelt = {column.strip(): column for column in rows.sample.columns} | {
            name: name for name in rows.sample.columns
        }
        columns = {name: spelt.get(column, column) for name, column in columns.items()}
        laid_out = rows._replace(layout=chosen_layout(rows.sample, columns, self._format))
        laid_out.check(laid_out.layout)
        return laid_out

    def _read_held_out(self, text: str, rows: _Rows) -> _HeldOut:
        share = read_share(text)
        if share is None:
            return _held_out_rows(text, rows)
        if share and rows.sample is not None and rows.sample.complete and len(rows.sample.rows) < 2:
            raise DataError(f"a share needs at least 2 rows, {rows.name} has 1; give a file, or 0 for none.")
        return share

    def _with_layout(self, rows: _Rows, held_out: _HeldOut) -> _Rows:
        """The rows with what their columns mean, asked if they do not tell."""
        default: str | None
        if rows.layout is not None:
            return rows
        if rows.sample is None:
            default, missing = _WHEN_FETCHED, ""
            text = "Columns of the prompt and the answer (auto: by their names)"
        else:
            names = ", ".join(rows.sample.columns)
            text = f"Columns of the prompt and the answer (there are {names})"
            default = columns_text(rows.candidates[0]) if rows.candidates else None
            missing = (
                f"{rows.name}: the columns {names} do not tell which is the prompt and which the answer. "
                f"Name them as in `question, answer`, or one alone to learn all of its text."
            )

        def read(text: str) -> _Rows:
            if rows.sample is None and text == _WHEN_FETCHED:
                return rows
            laid_out = self._laid_out(rows, read_columns(text))
            if isinstance(held_out, _Rows):
                held_out.check(laid_out.layout)
            return laid_out

        return self._settle(None, _Question("--columns", text, default, missing), read)


def _default_held_out(rows: _Rows) -> str:
    """A file of held-out rows beside the training rows that can be read as they are, else a share if there is one."""
    if rows.name == DEFAULT_ROWS:
        return DEFAULT_ROWS
    for name in guess_validation(rows.name):
        try:
            found = _held_out_rows(name, rows)
        except (RequestError, OSError):
            continue
        if found.sample and rows.sample and (rows.layout or found.sample.columns == rows.sample.columns):
            return name
    alone = rows.sample is not None and rows.sample.complete and len(rows.sample.rows) < 2
    return "0" if alone else str(DEFAULT_SHARE)


def _held_out_rows(text: str, rows: _Rows) -> _Rows:
    if not is_local(text):
        check_hub_name(text, "a share, or a file, folder or glob")
        return _Rows(text)
    held_out = _Rows(text, take_sample(expand_home(text)))
    held_out.check(rows.layout)
    return held_out


def _answers(given: Given, folder: Path, base_model: str, rows: _Rows, held_out: _HeldOut, output_dir: str) -> Answers:
    looked_at = [rows, held_out] if isinstance(held_out, _Rows) else [rows]
    layout = rows.layout or Layout("text")
    names = [source.name for source in looked_at]
    length, length_note = _length(looked_at, rows.layout)
    said = given.of_dataset("max_length") is not None
    return Answers(
        base_model=_as_in_recipe(base_model, folder),
        train=_as_in_recipe(rows.name, folder),
        output_dir=output_dir,
        validation=_as_in_recipe(held_out.name, folder) if isinstance(held_out, _Rows) else held_out or None,
        hub_config=DEFAULT_CONFIG if DEFAULT_ROWS in names else None,
        validation_split=DEFAULT_TEST if DEFAULT_ROWS in names[1:] else None,
        format=layout.format if layout.named else None,
        columns=layout.columns,
        max_length=None if said else length,
        more=given.more,
        rows_note=f"{_count(rows.sample)} in the format {layout.format}" if rows.sample else "a dataset on the hub",
        length_note="" if said else length_note,
    )


def _length(sources: list[_Rows], layout: Layout | None) -> tuple[int | None, str]:
    """A `max_length` where the default is too short; and why."""
    bound = max(source.check(layout) for source in sources)
    if not bound:
        return None, ""
    enough = enough_tokens(bound)
    default = DatasetSection.model_fields["max_length"].default
    known = all(source.sample is not None and source.sample.complete for source in sources)
    note = f"no row {'here' if known else 'of the first ones'} should have more than {bound:,}"
    # A shorter one would save nothing: a batch is as long as its longest row.
    return enough if enough > default else None, note


def _as_in_recipe(name: str, folder: Path) -> str:
    if is_local(name):
        return as_recipe_path(name, folder)
    if os.path.exists(folder / name):  # noqa: PTH110 (a name too long to look up is no path)
        raise RequestError(f"{name} is no path here, so a hub name, but the recipe would find {folder / name}")
    return name


def _count(sample: Sample) -> str:
    rows = plural(len(sample.rows), "row")
    return rows if sample.complete else f"more than {rows}"
