"""A first recipe's text: what it sets, what it says beside it, and that any answer comes back as it was."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.recipe.schema import Recipe
from qlora_cli.recipe.starter import Answers, starter_text
from qlora_cli.recipe.substitution import substitute
from qlora_cli.recipe.yaml_source import parse_yaml

ANSWERS = Answers(
    base_model="models/tiny",
    train="data/train.jsonl",
    output_dir="runs/maths",
    validation="data/test.jsonl",
    columns={"prompt": "question", "completion": "answer"},
    max_length=4096,
    rows_note="512 rows in the format prompt_completion",
    length_note="no row here should have more than 2,500",
)
TEXT = """\
# yaml-language-server: $schema=recipe.schema.json

base_model: models/tiny  # hub name or local folder (relative to the recipe)

dataset:
  train: data/train.jsonl                          # the rows to learn: 512 rows in the format prompt_completion
  validation: data/test.jsonl                      # held-out rows, named like `train`
  columns: {prompt: question, completion: answer}  # the format's field: your column, as in {prompt: question}
  max_length: 4096                                 # longest row, in tokens: no row here should have more than 2,500

output_dir: runs/maths  # the run folder, relative to where the command is run

# The rest has its default. To change one of these, take away the `# ` of its line and of its section.

# quantization:
#   bits: 4  # 4 stores linear weights in 4 bits; 16 leaves them unquantised

# lora:
#   rank: 16     # rank r of B A
#   alpha: 32.0  # the update is scaled by alpha / rank

# training:
#   num_train_epochs: 1.0           # passes over the training rows
#   per_device_train_batch_size: 8  # rows, or packs of rows, in one forward pass on one device
#   gradient_accumulation_steps: 1  # forward passes per optimizer step
#   learning_rate: 0.0002           # peak learning rate
"""


def read(text: str) -> dict[str, Any]:
    return dict(parse_yaml(text, "recipe.yaml").data)


def test_the_whole_text() -> None:
    """What is set, why, and what people change first; the schema's words and defaults."""
    assert starter_text(ANSWERS) == TEXT


def test_what_is_read_is_what_was_answered() -> None:
    assert read(TEXT) == {
        "base_model": "models/tiny",
        "dataset": {
            "train": "data/train.jsonl",
            "validation": "data/test.jsonl",
            "columns": {"prompt": "question", "completion": "answer"},
            "max_length": 4096,
        },
        "output_dir": "runs/maths",
    }


def test_the_least_there_can_be() -> None:
    """Nothing is written that was not answered; a share is a number, and the length a suggestion."""
    text = starter_text(Answers("org/model", "org/rows", "runs/x", validation=0.05))
    assert read(text)["dataset"] == {"train": "org/rows", "validation_fraction": 0.05}
    assert "  # max_length: 2048         # longest row, in tokens\n" in text


def test_suggestions_are_the_defaults_and_can_be_taken() -> None:
    """With every `# ` before a key taken away it is the same recipe, said in full."""
    text = starter_text(Answers("org/model", "org/rows", "runs/x"))
    whole = re.sub(r"(?m)^( *)# ( *[a-z_]+:)", r"\1\2", text.split("\n", 1)[1])
    data = read(whole)
    assert set(data) == {"base_model", "dataset", "output_dir", "quantization", "lora", "training"}
    assert len(data["training"]) == 4
    assert Recipe.model_validate(data) == Recipe.model_validate(read(text))


def test_every_line_that_sets_something_says_what_it_is() -> None:
    for line in starter_text(ANSWERS).splitlines():
        assert not re.match(r"^(# )? *\w+: \S", line) or re.search(r"\S  +# \S", line), line


def test_other_fields_stand_in_their_sections() -> None:
    """In the schema's order, with its comments; a section that is set is no suggestion, the rest of it is."""
    more: dict[str, Any] = {
        "lora": {"rank": 8},
        "training": {"seed": 1, "max_grad_norm": None, "max_steps": 20, "eval_steps": None},
        "dataset": {"overlong": "drop", "max_length": 64},
        "revision": "1e5",
        "quantization": {},
    }
    text = starter_text(Answers("org/model", "org/rows", "runs/x", 0.05, more=more, max_length=512))
    assert read(text) == {
        "base_model": "org/model",
        "revision": "1e5",
        "dataset": {"train": "org/rows", "validation_fraction": 0.05, "max_length": 64, "overlong": "drop"},
        "output_dir": "runs/x",
        "lora": {"rank": 8},
        "training": {"max_steps": 20, "max_grad_norm": None, "seed": 1},
    }
    assert 'revision: "1e5"        # branch, tag or commit of a hub model\n' in text
    assert "lora:\n  rank: 8        # rank r of B A\n  # alpha: 32.0  # the update is scaled by alpha / rank\n" in text
    assert "\ntraining:\n  max_steps: 20 " in text
    assert "num_train_epochs:" not in text  # it excludes max_steps
    assert "# quantization:\n#   bits: 4" in text


@pytest.mark.parametrize("name", ["1e5", "a b", "a: b #c", "#", "null", "~", "[x]", "- x", "é", "true", "'", '"', "%"])
def test_odd_names_are_text(name: str) -> None:
    """A folder named like a number, or with what means something to YAML, is quoted."""
    text = starter_text(Answers(name, name, name, name, columns={"prompt": name, "completion": "x"}))
    assert read(text) == {
        "base_model": name,
        "dataset": {"train": name, "validation": name, "columns": {"prompt": name, "completion": "x"}},
        "output_dir": name,
    }


def test_notes_cannot_break_out_of_their_comment() -> None:
    """Names in a comment come from files: a line break in one would otherwise be YAML."""
    answers = Answers("org/model", "org/rows", "runs/x", rows_note="a\nlora: {rank: 1}\x00\ud800")
    assert "# the rows to learn: a?lora: {rank: 1}??\n" in starter_text(answers)
    assert set(read(starter_text(answers))) == {"base_model", "dataset", "output_dir"}


texts = st.text(st.characters(exclude_categories=()), min_size=1, max_size=40)


@given(
    base=texts,
    train=texts,
    output=texts,
    held_out=texts | st.floats(1e-9, 0.999),
    columns=st.dictionaries(texts, texts),
)
def test_any_answer_comes_back(
    base: str, train: str, output: str, held_out: str | float, columns: dict[str, str]
) -> None:
    """Whatever the text, halves of surrogate pairs included: reading what was written gives the answers."""
    answers = Answers(base, train, output, held_out, columns=columns, rows_note=train, length_note=base, max_length=3)
    source = parse_yaml(starter_text(answers), "recipe.yaml")
    substitute(source)
    assert source.data == answers.settings()


def test_a_name_that_looks_like_a_reference_is_none() -> None:
    """`${x}` in an answer is a name to the letter, not an environment variable."""
    text = starter_text(Answers("${A}", "$${B}", "${C", columns={"text": "${D}"}))
    source = parse_yaml(text, "recipe.yaml")
    assert [mistake.key for mistake in substitute(source)] == ["dataset.columns.text"]  # where it is to the letter
    assert (source.data["base_model"], source.data["output_dir"]) == ("${A}", "${C")
