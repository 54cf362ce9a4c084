"""`${NAME}`: environment variables, in the fields that take them and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.substitution import escape, substitute
from qlora_cli.recipe.yaml_source import Source
from tests.support.recipes import MINIMAL, load, refusal

FIELDS = (
    "extends, base_model, output_dir, dataset.train, dataset.validation, dataset.chat_template, "
    "evaluation.data_root, evaluation.task_path"
)


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", f"{tmp_path}/data")
    monkeypatch.setenv("WORD", "word")


def test_where_it_is_replaced(tmp_path: Path) -> None:
    """In every field that names a file, alone or within, more than once, in overrides too."""
    dataset = "dataset: {train: '${DATA}/${WORD}.jsonl', validation: '${DATA}'}\n"
    text = "base_model: org/${WORD}\n" + dataset + "output_dir: ${WORD}\n"
    recipe = load(text)
    assert (recipe.base_model, recipe.output_dir) == ("org/word", "word")
    assert (recipe.dataset.train, recipe.dataset.validation) == (f"{tmp_path}/data/word.jsonl", f"{tmp_path}/data")
    assert load(text, "output_dir=runs/${WORD}").output_dir == "runs/word"


def test_a_doubled_dollar_is_the_character(tmp_path: Path) -> None:
    """And what a run keeps of such a recipe is read back as it was."""
    recipe = load(MINIMAL.replace("out\n", "a$${WORD}$b$\n"))
    assert recipe.output_dir == "a${WORD}$b$"
    Path("kept.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(Path("kept.yaml")) == recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("${NO_SUCH_WORD}", "the environment variable NO_SUCH_WORD is not set"),
        ("${WROD}", "the environment variable WROD is not set; did you mean `${WORD}`?"),
        ("${}", "`${}` names no environment variable; write `$$` for a dollar"),
        ("${A B}", "`${A B}` names no environment variable; write `$$` for a dollar"),
        ("${DATA:-x}", "`${DATA:-x}` names no environment variable; write `$$` for a dollar"),
        ("$WORD/x", "`$WORD` is not replaced; write `${WORD}` for the environment variable"),
    ],
)
def test_what_cannot_be_replaced(name: str, message: str) -> None:
    assert refusal(MINIMAL.replace("out\n", f"{name}\n")) == f"r.yaml:4:13: output_dir: {message}"


def test_an_unknown_dollar_word_is_a_name() -> None:
    """Files may be called so."""
    assert load(MINIMAL.replace("out\n", "$no_such_word\n")).output_dir == "$no_such_word"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("revision: ${WORD}", "5:11: revision"),
        ("lora: {target_modules: '${WORD}'}", "5:24: lora.target_modules"),
        ("lora: {target_modules: [q_proj, '${WORD}']}", "5:33: lora.target_modules.1"),
    ],
)
def test_elsewhere_it_is_refused(lines: str, told: str) -> None:
    """To the letter it would be a name that nothing has; replaced in silence, a way for secrets to get into records."""
    message = f"environment variables are not read in this field, only in {FIELDS}; got '${{WORD}}'"
    assert refusal(f"{MINIMAL}{lines}\n") == f"r.yaml:{told}: {message}"


def test_elsewhere_in_columns() -> None:
    told = refusal(MINIMAL.replace("  train", "  columns: {prompt: '${WORD}'}\n  train"))
    assert told.startswith("r.yaml:3:21: dataset.columns.prompt: environment variables are not read in this field")


def test_in_a_number_it_is_told_as_well() -> None:
    assert refusal(MINIMAL + "lora: {rank: '${WORD}'}\n") == (
        "r.yaml:5:14: lora.rank: expected a whole number from 1 to 65,536, got '${WORD}'; "
        "environment variables are not read in this field"
    )


def test_a_value_is_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a variable holds is not read as YAML, nor searched for further references."""
    monkeypatch.setenv("WORD", "{a: ${DATA}}")
    assert load(MINIMAL.replace("out\n", "${WORD}\n")).output_dir == "{a: ${DATA}}"


@pytest.mark.parametrize(
    "text", ["${A}", "$${A}", "$$${A}", "${A", "$${A", "${${A}", "${}", "a${b c}d}", "${A\n}", "$"]
)
def test_what_is_escaped_comes_back(text: str) -> None:
    """To the letter, whatever stands where a reference might."""
    source = Source({"output_dir": escape(text)}, {})
    assert substitute(source) == []
    assert source.data == {"output_dir": text}
