"""Files for `qlora init` to find, the command in this process, and a person who answers it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from typer.testing import CliRunner, Result

from qlora_cli.cli import app
from qlora_cli.commands.given import what_is_given
from qlora_cli.commands.interview import interview
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.starter import Answers

RECIPE = Path("recipe.yaml")
FLAGS = ("base_model", "train", "validation", "columns", "output_dir")


def rows(name: str, *columns: str, count: int = 3) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dict.fromkeys(columns, f"row {n}")) + "\n" for n in range(count)))
    return name


def model(name: str) -> str:
    Path(name).mkdir(parents=True)
    for file in ("config.json", "tokenizer.json"):
        Path(name, file).write_text("{}")
    return name


def init(*arguments: str, code: int = 0) -> Result:
    """The command in this process, which has no terminal."""
    result = CliRunner().invoke(app, ["init", *arguments])
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: str, code: int = 2) -> str:
    """What a command that writes nothing says on stderr."""
    before = sorted(os.listdir())  # noqa: PTH208
    result = init(*arguments, code=code)
    assert sorted(os.listdir()) == before  # noqa: PTH208
    assert result.stderr.startswith("error: ")
    assert "error" not in result.stdout
    return result.stderr.removeprefix("error: ").removesuffix("\n")


def written(path: Path = RECIPE) -> Recipe:
    return load_recipe(path)


class Person:
    """Answers by what the question begins with; then with Enter. Remembers what was asked, and what was told."""

    def __init__(self, answers: Mapping[str, str | list[str]] | None = None) -> None:
        self._answers = {
            key: [value] if isinstance(value, str) else list(value) for key, value in (answers or {}).items()
        }
        self.asked: list[tuple[str, str | None]] = []
        self.told: list[str] = []

    def ask(self, question: str, default: str | None) -> str:
        self.asked.append((question, default))
        assert len(self.asked) < 40, self.told
        waiting = next((texts for key, texts in self._answers.items() if question.startswith(key)), [])
        return waiting.pop(0) if waiting else ""

    def tell(self, text: str) -> None:
        self.told.append(text)


def ask(person: Person, *overrides: str, folder: str = ".", **flags: str) -> Answers:
    given = what_is_given(dict.fromkeys(FLAGS) | flags, list(overrides))
    return interview(given, Path(folder), person)
