"""`qlora schema` as a person or a script meets it."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from qlora_cli.cli import app
from qlora_cli.recipe.json_schema import recipe_schema_text
from tests.test_cli import process


def test_it_prints_the_schema_and_nothing_else(tmp_path: Path) -> None:
    """Standard output is the file, byte for byte, and nothing heavy is imported for it."""
    done = process("schema", folder=tmp_path, spy=True)
    assert done.stdout == recipe_schema_text()
    assert done.stderr == "IMPORTED ['typer']\n"
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_no_terminal_wraps_it() -> None:
    """A narrow terminal that wants colours changes nothing."""
    narrow = CliRunner(env={"COLUMNS": "20", "TERMINAL_WIDTH": "20", "FORCE_COLOR": "1"})
    assert narrow.invoke(app, ["schema"]).stdout_bytes == recipe_schema_text().encode()


def test_it_takes_no_arguments() -> None:
    result = CliRunner().invoke(app, ["schema", "recipe.yaml"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage:" in result.stderr
