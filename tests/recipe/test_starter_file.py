"""A first recipe on disk: right or not there at all, and its schema beside it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from qlora_cli.errors import OutputError, RequestError
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.starter import Answers, starter_text
from qlora_cli.recipe.starter_file import SCHEMA_FILE, write_schema, write_starter

ANSWERS = Answers("org/model", "org/rows", "runs/x")
RECIPE = Path("recipe.yaml")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def left() -> list[str]:
    return sorted(os.listdir())  # noqa: PTH208


def test_what_is_written_can_be_loaded() -> None:
    """And nothing else is left there but the schema."""
    assert write_starter(RECIPE, ANSWERS, force=False) == [RECIPE, Path(SCHEMA_FILE)]
    recipe = load_recipe(RECIPE)
    assert (recipe.base_model, recipe.dataset.train, recipe.output_dir) == ("org/model", "org/rows", "runs/x")
    assert left() == [SCHEMA_FILE, "recipe.yaml"]


def test_a_recipe_that_is_there_stays() -> None:
    """Even one that came while the questions were answered."""
    RECIPE.write_text("mine")
    with pytest.raises(OutputError) as caught:
        write_starter(RECIPE, ANSWERS, force=False)
    assert str(caught.value) == "recipe.yaml is already there; --force writes over it"
    assert RECIPE.read_text() == "mine"
    assert "recipe.yaml" in left()
    assert not [name for name in left() if name.startswith(".")]


def test_force_writes_over_it() -> None:
    """Keeping the file's permissions."""
    RECIPE.write_text("old")
    RECIPE.chmod(0o640)
    write_starter(RECIPE, ANSWERS, force=True)
    assert RECIPE.read_text(encoding="utf-8") == starter_text(ANSWERS)
    assert stat.S_IMODE(RECIPE.stat().st_mode) == 0o640


@pytest.mark.parametrize("force", [False, True])
def test_a_recipe_that_would_be_wrong_is_not_written(force: bool) -> None:
    """The mistake is told with the name that the recipe would have; what was there stays."""
    if force:
        RECIPE.write_text("old")
    with pytest.raises(RequestError) as caught:
        write_starter(RECIPE, Answers("org/model", "org/rows", "o", more={"lora": {"rank": 0}}), force=force)
    assert str(caught.value).startswith("nothing was written, because the recipe would be wrong:\nrecipe.yaml:")
    assert "lora.rank: " in str(caught.value)
    assert left() == (["recipe.yaml"] if force else [])
    assert not force or RECIPE.read_text() == "old"


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(OutputError) as caught:
        write_starter(Path("none/r.yaml"), ANSWERS, force=False)
    assert str(caught.value) == "none/r.yaml cannot be written: No such file or directory"


def test_the_schema() -> None:
    """Written if there is none, brought up to date if it is ours."""
    assert write_schema(Path()) == [Path(SCHEMA_FILE)]
    ours = Path(SCHEMA_FILE).read_text(encoding="utf-8")
    assert "base_model" in json.loads(ours)["properties"]
    assert write_schema(Path()) == []
    Path(SCHEMA_FILE).write_text(json.dumps({"title": json.loads(ours)["title"], "properties": {}}))
    assert write_schema(Path()) == [Path(SCHEMA_FILE)]
    assert Path(SCHEMA_FILE).read_text(encoding="utf-8") == ours


@pytest.mark.parametrize("text", ['{"title": "Recipes of cakes"}', "{}", "[]", "no JSON", "\ud800"])
def test_a_schema_of_somebody_elses(text: str) -> None:
    """Stays as it is."""
    data = text.encode("utf-8", errors="surrogatepass")
    Path(SCHEMA_FILE).write_bytes(data)
    assert write_schema(Path()) == []
    assert Path(SCHEMA_FILE).read_bytes() == data
