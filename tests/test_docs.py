"""The reference pages say what the code does, and the README's commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from qlora_cli.cli import app
from qlora_cli.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]


def test_generated_pages_are_current() -> None:
    """docs/recipe.md, docs/commands.md and recipes/recipe.schema.json are what scripts/generate_docs.py writes now."""
    done = subprocess.run(
        [sys.executable, "scripts/generate_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_readmes_recipe_is_one() -> None:
    """The YAML that newcomers copy validates; what is shown further down are sections to be added to it."""
    found = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    recipe, *sections = map(yaml.safe_load, found)
    assert Recipe.model_validate(recipe).dataset.validation_fraction == 0.05
    assert [[*section] for section in sections] == [["evaluation"], ["training"]]
    whole = Recipe.model_validate(recipe | {name: part for section in sections for name, part in section.items()})
    assert (whole.evaluation.keep_best, whole.training.load_best) == ("mmlu/acc", True)


def test_the_commands_that_pages_name_exist() -> None:
    """Every `qlora WORD` in the README, docs/ and recipes/ is a command that is there."""
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.md")]
    pages += (ROOT / "recipes").glob("*.yaml")
    named = {word for page in pages for word in re.findall(r"\bqlora ([a-z]+)", page.read_text(encoding="utf-8"))}
    assert "train" in named
    assert named <= commands


def test_the_readmes_targets_and_links_exist() -> None:
    """Every `make` target and every relative link in the README is there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z][a-z-]+)", text))
    assert {"demo", "test", "check", "test-gpu"} <= targets
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert links
    assert all((ROOT / link).exists() for link in links)
