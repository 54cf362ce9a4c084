"""Write the reference pages and the schema that are derived from the code, or check that they are current.

python scripts/generate_docs.py           writes docs/recipe.md, docs/commands.md and recipes/recipe.schema.json
python scripts/generate_docs.py --check   exits 1 if one of them is not what it would be
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.main import get_group
from typer.testing import CliRunner

from qlora_cli.cli import app
from qlora_cli.recipe.fields import (
    all_fields,
    expected,
    item_sections,
    section_fields,
    sections,
    takes_environment,
)
from qlora_cli.recipe.json_schema import recipe_schema_text

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = tuple(get_group(app).commands)  # in the order of their registration

_ENVIRONMENT = ", ".join(f"`{'.'.join(path)}`" for path, _ in all_fields() if takes_environment(path))

_RECIPE_HEAD = f"""# The recipe

<!-- Written by scripts/generate_docs.py from qlora_cli/recipe/schema.py: change it there. -->

A YAML file. A recipe states only what differs from the defaults below; a run keeps the whole of it, every default
written out, as `recipe.yaml` in its folder. [An editor](editors.md) that knows the grammar completes and underlines.

**What is wrong is refused**, all of it at once, with file, line and column, before anything is loaded: unknown keys,
values of another type or out of range, fields that exclude each other, files that are not there, faults of YAML.
`qlora check` says it without training, and looks at the data as well.

**Precedence**: defaults < the recipe that is extended < the recipe < `--set section.key=value`, the last of which wins.
In `--set`, the value is YAML: `[q_proj, v_proj]` is a list, `null` unsets what may be null, and a whole section, as in
`--set lora={{rank: 4}}`, takes the place of the recipe's. What a later one says ends what it excludes: `--set
training.max_steps=20` shortens any recipe, also one that gives `num_train_epochs`; `quantization.bits=16` ends
`quant_type` and `double_quant`, another `base_model` the `revision`, and local rows what is said of a hub dataset.

**`extends: other.yaml`** builds on another recipe. Sections are laid over its sections key by key; any other value, a
list or `columns` too, replaces the other's.

**Paths** in a recipe are relative to that recipe; in `--set`, to the folder the command is run in. A name that is no
path, and that nothing here has, is a hub name.

**`${{NAME}}`** is replaced by the environment variable in {_ENVIRONMENT},
and nowhere else; there, `$$` writes a dollar. A chat template that stands in the recipe itself is left as it is.

**YAML** is read by the 1.2 core rules, with `_` between digits and without `0x` and `0o`: `2e-4` and `1_000` are
numbers; `no`, `on` and `2024-01-01` are text. Anchors and aliases are read; tags, merge keys (`<<`), keys given twice
and files beyond 1 MB are refused.
"""


_ITEMS = """An item of the list is text, such as there is in place of the list, or has fields of its own:

```yaml
dataset:
  train:
    - data/mine.jsonl
    - path: openai/gsm8k
      hub_config: main
      format: prompt_completion
      columns: {prompt: question, completion: answer}
      weight: 0.5
```

In `--set`, `dataset.train.1.weight=2` changes the second item, numbered from 0, and `dataset.train=[a.jsonl, b.jsonl]`
all of them.
"""


def recipe_page() -> str:
    """The fields of every section with what they take, default and meaning."""
    top = {name: field for name, field in section_fields(()).items() if name not in sections()}
    parts = [_RECIPE_HEAD, "## Top level\n", _table(top)]
    for name, model in sections().items():
        parts += [f"## `{name}`\n", f"{(model.__doc__ or '').strip()}\n", _table(section_fields((name,)))]
        parts += _item_tables(name)
    return "\n".join(parts)


def _item_tables(section: str) -> list[str]:
    """The fields of the sections that are items of lists in this section."""
    lists: dict[type[BaseModel], list[str]] = {}
    for path, model in item_sections():
        if path[0] == section:
            lists.setdefault(model, []).append(f"`{'.'.join(path)}`")
    parts = []
    for model, names in lists.items():
        parts += [f"### An item of {' or '.join(names)}\n", f"{(model.__doc__ or '').strip()}\n"]
        parts += [_ITEMS, _table(dict(model.model_fields))]
    return parts


def commands_page() -> str:
    """The `--help` of every command."""
    parts = ["# The commands\n", "<!-- Written by scripts/generate_docs.py from `--help`: change it there. -->\n"]
    for arguments in ([], *([name] for name in COMMANDS)):
        title = " ".join(["qlora", *arguments])
        parts += [f"## `{title}`\n", f"```text\n{_help(arguments)}\n```\n"]
    return "\n".join(parts)


def _table(fields: dict[str, FieldInfo]) -> str:
    lines = ["| field | value | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        cells = (f"`{name}`", expected(field), _default(field), field.description or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


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
    """Write the files, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    options = parser.parse_args()
    files = {
        "docs/recipe.md": recipe_page(),
        "docs/commands.md": commands_page(),
        "recipes/recipe.schema.json": recipe_schema_text(),
    }
    stale = []
    for name, text in files.items():
        file = ROOT / name
        if options.check and (not file.exists() or file.read_text(encoding="utf-8") != text):
            stale.append(os.path.relpath(file))
        elif not options.check:
            file.write_text(text, encoding="utf-8", newline="\n")
    if stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/generate_docs.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
