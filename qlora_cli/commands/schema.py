"""`qlora schema`."""

from __future__ import annotations

import typer

from qlora_cli.recipe.json_schema import recipe_schema_text


def schema() -> int:
    """Print the JSON Schema of a recipe, and nothing else; returns the exit code."""
    # As bytes: the same file on every system, whatever encoding and line ends its terminal has.
    typer.echo(recipe_schema_text().encode(), nl=False)
    return 0
