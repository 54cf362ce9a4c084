"""Write the reference pages that are derived from the code, or check that they are current.

python scripts/generate_docs.py           writes docs/recipe.md and docs/commands.md
python scripts/generate_docs.py --check   exits 1 if a page is not what it would be
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from qlora_cli.cli import app
from qlora_cli.recipe.schema import Recipe

DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMANDS = ("train", "init")

_RECIPE_HEAD = """# The recipe

<!-- Written by scripts/generate_docs.py from qlora_cli/recipe/schema.py: change it there. -->

A YAML file. Unknown keys are refused. A recipe states only what differs from the defaults below; a run keeps the
whole of it, every default written out, as `recipe.yaml` in its folder.

Precedence: defaults < the recipe < `--set section.key=value`. Paths in a recipe are relative to the recipe; in
`--set`, to the folder the command is run in. A name that is no path, and that nothing here has, is a hub name.
"""


def recipe_page() -> str:
    """The fields of every section with type, default and meaning."""
    parts = [_RECIPE_HEAD, "## Top level\n", _table(Recipe)]
    for name, model in _sections():
        parts += [f"## `{name}`\n", f"{(model.__doc__ or '').strip()}\n", _table(model)]
    return "\n".join(parts)


def commands_page() -> str:
    """The `--help` of every command."""
    parts = ["# The commands\n", "<!-- Written by scripts/generate_docs.py from `--help`: change it there. -->\n"]
    for arguments in ([], *([name] for name in COMMANDS)):
        title = " ".join(["qlora", *arguments])
        parts += [f"## `{title}`\n", f"```text\n{_help(arguments)}\n```\n"]
    return "\n".join(parts)


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in Recipe.model_fields.items():
        if _is_section(field.annotation):
            yield name, field.annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _table(model: type[BaseModel]) -> str:
    lines = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if not _is_section(field.annotation):
            cells = (f"`{name}`", _type(field), _default(field), field.description or "")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(field: FieldInfo) -> str:
    bounds = [_bound(item) for item in field.metadata]
    return " ".join([_words(field.annotation), *filter(None, bounds)])


def _words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {_words(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return " or ".join(_words(part) for part in get_args(annotation))
    if hasattr(annotation, "__metadata__"):  # Annotated
        inner = " ".join(filter(None, (_bound(item) for item in annotation.__metadata__)))
        return f"{_words(annotation.__origin__)} {inner}".strip()
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    return names.get(annotation, str(annotation))


def _bound(item: Any) -> str:
    limits = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
    holders = [item, *getattr(item, "metadata", [])]
    found = [(sign, getattr(holder, name, None)) for holder in holders for name, sign in limits]
    return ", ".join(f"{sign} {limit}" for sign, limit in found if limit is not None)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{json.dumps(value)}`"


def _help(arguments: list[str]) -> str:
    # A fixed width and no colours: the page must not depend on who writes it.
    environment = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    result = CliRunner().invoke(app, [*arguments, "--help"], env=environment, prog_name="qlora")
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def main() -> int:
    """Write the pages, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    options = parser.parse_args()
    stale = []
    for name, text in (("recipe.md", recipe_page()), ("commands.md", commands_page())):
        page = DOCS / name
        if options.check and (not page.exists() or page.read_text(encoding="utf-8") != text):
            stale.append(os.path.relpath(page))
        elif not options.check:
            page.write_text(text, encoding="utf-8")
    if stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/generate_docs.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
