"""`qlora init`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from qlora_cli.commands.given import what_is_given
from qlora_cli.commands.interview import interview
from qlora_cli.commands.invocation import invocation
from qlora_cli.console import make_console, show_error, show_line
from qlora_cli.errors import Interrupted, OutputError, QloraError, RequestError
from qlora_cli.recipe.starter import Answers
from qlora_cli.recipe.starter_file import SCHEMA_FILE, write_starter


def init(path: Path, *, flags: dict[str, str | None], overrides: list[str], defaults: bool, force: bool) -> int:
    """Ask what a first recipe needs, write it to `path`, show what to do next; returns the exit code.

    `flags` are answers given beforehand, by the names of Given's fields. Asks nothing if `defaults` is on or no
    terminal is there.
    """
    console = make_console()
    try:
        _check_target(path, force=force)
        given = what_is_given(flags, overrides)
        asker = None if defaults or not _at_a_terminal() else _Terminal(console)
        answers = interview(given, path.parent, asker)
        written = write_starter(path, answers, force=force)
    except QloraError as error:
        show_error(error)
        return error.exit_code
    except EOFError:
        console.print()
        show_error(RequestError("the answers ended early, and nothing was written; --yes takes every default"))
        return RequestError.exit_code
    except KeyboardInterrupt:
        console.print()
        show_error(Interrupted("stopped; nothing was written"))
        return Interrupted.exit_code
    _show(console, answers, written)
    return 0


class _Terminal:
    """Asks the person at the terminal."""

    def __init__(self, console: Console) -> None:
        self._console, self._greeted = console, False

    def ask(self, question: str, default: str | None) -> str:
        if not self._greeted:
            self._console.print("Enter takes what is in brackets.\n", markup=False)
            self._greeted = True
        shown = "" if default is None else f" [{default}]"
        try:
            return self._console.input(Text.assemble((question, "bold"), f"{shown}: "))
        except UnicodeDecodeError:
            return "\N{REPLACEMENT CHARACTER}"  # names nothing that is here, and so is told and asked again

    def tell(self, text: str) -> None:
        self._console.print(Text(f"  {text}"))


def _at_a_terminal() -> bool:
    # A closed one is None.
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _check_target(path: Path, *, force: bool) -> None:
    try:
        if path.name == SCHEMA_FILE:
            raise OutputError(f"{path} is the name of the schema that is written beside a recipe; take another")
        if path.is_symlink() and not path.exists():
            raise OutputError(f"{path} is a symbolic link to nothing; take another name")
        if path.is_dir():
            example = path / "recipe.yaml"
            raise OutputError(f"{path} is a folder; expected the name of a recipe to write, such as {example}")
        if path.exists() and not force:
            raise OutputError(f"{path} is already there; --force writes over it")
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent}: there is no such folder to write {path.name} in")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _show(console: Console, answers: Answers, written: list[Path]) -> None:
    held_out = answers.validation
    lines = [
        ("model", answers.base_model),
        ("data", f"{answers.train}: {answers.rows_note}"),
        ("held out", held_out if isinstance(held_out, str) else f"{held_out:.3g} of them" if held_out else "none"),
        ("run", answers.output_dir),
        *(("wrote" if path is written[0] else "", str(path)) for path in written),
    ]
    for label, text in lines:
        show_line(console, label, text)
    commands = [shlex.join([*invocation(), word, str(written[0])]) for word in ("check", "train")]
    console.print("\nNext:\n  " + "\n  ".join(commands), markup=False)
