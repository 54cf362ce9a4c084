"""What a check says of a recipe's data is what training would make of it, and no weights are needed to know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_cli.data.batches import collate
from qlora_cli.data.units import row_units
from qlora_cli.errors import DataError
from qlora_cli.model.source import ModelSource, load_tokenizer
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.checking import check_data
from qlora_cli.training.events import DataReady, Event, Notice
from qlora_cli.training.examples import first_examples
from qlora_cli.training.facts import Facts, Lengths, Overlong, SomeRows
from qlora_cli.training.run import train
from tests.support.encoded import encode_training_rows, rows_of_tokens
from tests.support.runs import tiny_recipe
from tests.support.tokenizers import PLAIN, tiny_tokenizer

SHORT = {"prompt": "red", "completion": "apple"}
LONG = {"prompt": "red", "completion": "apple " * 20}
# All of the prompt and nothing of the answer fits into 24 tokens.
BURIED = {"prompt": "red " * 30, "completion": "apple"}
SILENT = {"prompt": "red", "completion": ""}


def recipe_of(folder: Path, *rows: dict[str, Any], weights: bool = False, **sections: Any) -> Recipe:
    """A recipe over these rows, whose base has a tokenizer and a configuration, but no weights unless asked for."""
    recipe = tiny_recipe(folder, validation_rows=0, **sections)
    if not weights:
        (Path(recipe.base_model) / "model.safetensors").unlink(missing_ok=True)
    if rows:
        Path(recipe.dataset.train).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return recipe


def change(recipe: Recipe, section: str, **fields: Any) -> Recipe:
    """The recipe with other values in one section."""
    changed = getattr(recipe, section).model_copy(update=fields)
    return recipe.model_copy(update={section: changed})


def refusal_of_training(recipe: Recipe) -> str:
    with pytest.raises(DataError) as caught:
        train(recipe)
    return str(caught.value)


def test_a_check_says_what_training_says(tmp_path: Path) -> None:
    """Rows, tokens, what is dropped, and every doubt are the ones that the run itself tells of, in its words."""
    rows = [SHORT, SILENT, LONG, *[SHORT] * 5]
    fields = {"max_length": 24, "overlong": "drop", "validation": str(tmp_path / "train-32.jsonl")}
    training = {"max_steps": 1, "warmup_steps": 3}
    recipe = recipe_of(tmp_path, *rows, weights=True, dataset=fields, training=training)
    facts = check_data(recipe)
    events: list[Event] = []
    train(recipe, listeners=[events.append])
    assert facts.train is not None
    assert facts.validation is not None
    assert [facts.train.data, facts.validation.data] == [event for event in events if isinstance(event, DataReady)]
    assert facts.notices == (
        "1 training row has an empty answer and teaches only to stop (line 2)",
        "validation has the rows of train: its loss says nothing about rows the model has not seen",
        "warmup_steps is 3 and the run ends after 1",
    )
    assert set(facts.notices) < {event.text for event in events if isinstance(event, Notice)}
    assert (facts.problems, facts.checked) == ((), "recipe and data")


def test_nothing_is_read_of_the_weights(tmp_path: Path) -> None:
    """A model folder without weights: everything is known all the same, and nothing is wrong."""
    recipe = recipe_of(tmp_path)
    assert not list(Path(recipe.base_model).glob("*.safetensors"))
    facts = check_data(recipe)
    assert (facts.problems, facts.notices, facts.context_length) == ((), (), 256)
    assert not Path(recipe.output_dir).exists()


def test_steps_are_those_of_one_process(tmp_path: Path) -> None:
    """32 rows, 4 x 2 a step: 4 steps an epoch; max_steps counts for itself, and is told in epochs."""
    recipe = recipe_of(tmp_path, training={"gradient_accumulation_steps": 2, "max_steps": 6, "warmup_steps": 2})
    steps = check_data(recipe).steps
    assert steps is not None
    assert (steps.total, steps.sequences_per_step, steps.epochs, steps.warmup) == (6, 8, 1.5, 2)
    steps = check_data(change(recipe, "training", max_steps=None, num_train_epochs=2.5)).steps
    assert steps is not None
    assert (steps.total, steps.epochs) == (10, 2.5)


def test_lengths_are_those_before_cutting(tmp_path: Path) -> None:
    """Of 100 rows of different lengths: the shortest, the longest, and the lengths that so many do not exceed."""
    rows = [{"text": "the end " * count} for count in range(1, 101)]
    recipe = recipe_of(tmp_path, *rows, dataset={"max_length": 50, "overlong": "truncate"})
    tokenizer = load_tokenizer(ModelSource(recipe.base_model))
    lengths = sorted(len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows)
    facts = check_data(recipe).train
    assert facts is not None
    assert facts.lengths == Lengths(*(lengths[i] for i in (0, 49, 89, 94, 98, 99)))
    assert facts.overlong.rows == sum(length > 50 for length in lengths)
    assert facts.data.tokens == sum(min(length, 50) for length in lengths)


@pytest.mark.parametrize("overlong", ["error", "drop", "truncate"])
def test_what_becomes_of_rows_that_are_too_long(overlong: str, tmp_path: Path) -> None:
    """Refused, dropped or truncated; what is lost is counted in tokens that would have been learned."""
    recipe = recipe_of(tmp_path, SHORT, LONG, LONG, dataset={"max_length": 24, "overlong": overlong})
    facts = check_data(recipe)
    whole = check_data(change(recipe, "dataset", max_length=256)).train
    assert facts.train is not None
    assert whole is not None
    lost = whole.data.supervised_tokens - facts.train.data.supervised_tokens
    match overlong:
        case "error":
            assert facts.train.overlong == Overlong(2, "refused", 0, 0, 0)
            assert facts.problems == (refusal_of_training(recipe),)
            assert facts.problems[0].startswith(f"{recipe.dataset.train}: 2 of 3 rows are longer than ")
        case "drop":
            assert facts.train.overlong == Overlong(2, "dropped", 2, 2, lost)
            assert (facts.train.data.rows, facts.problems) == (1, ())
            assert facts.notices == ("dataset.overlong: drop leaves 1 of 3 training rows",)
        case "truncate":
            assert facts.train.overlong == Overlong(2, "truncated", 2, 0, lost)
            assert facts.train.end_of_turn.rows == 1
            assert facts.notices == ("2 of 3 training rows lose part of their answer at dataset.max_length",)
            assert facts.problems == ()
    assert facts.train.lengths == whole.lengths


def test_every_problem_at_once(tmp_path: Path) -> None:
    """Rows that are too long, rows without a label, rows beyond the model, a validation set of its own kind of wrong,
    a base that is stored otherwise: all of them in one go, the first of them in training's words."""
    recipe = recipe_of(tmp_path, {"text": ""}, {"text": "the end " * 300}, {"text": "the end"})
    validation = tmp_path / "validation.jsonl"
    validation.write_text('{"text": "fine"}\n{"text": 3}\n')
    recipe = change(recipe, "dataset", validation=str(validation), max_length=200)
    config = Path(recipe.base_model) / "config.json"
    stored = {"quantization_config": {"quant_method": "gptq"}}
    config.write_text(json.dumps(json.loads(config.read_text()) | stored))
    facts = check_data(recipe)
    rows, longest = recipe.dataset.train, check_longest(facts)
    assert facts.problems == (
        "base_model: its weights are stored quantised (gptq), and the recipe's quantization asks for NF4, double "
        "quantisation, float32 compute. Use the unquantised model, or set quantization to what is stored, if that is "
        "4-bit by bitsandbytes",
        f"{validation}, line 2: text: expected text, got the number 3.\n"
        "Mend the data, or set dataset.on_bad_row: skip to leave such rows out.",
        f"{rows}: 1 of 3 rows are longer than dataset.max_length (200 tokens). The longest has {longest} tokens: "
        f"{rows}, line 2. Raise dataset.max_length, or set dataset.overlong to drop or truncate.",
        f"{rows}: 1 row (line 1) has nothing to learn: no token has a loss.",
        f"{rows}, line 2 has {longest} tokens, the model has positions for 256. Set dataset.max_length to 256 or less, "
        "and dataset.overlong to drop or truncate",
    )
    assert facts.train is not None
    assert facts.train.without_labels == SomeRows(1, (1,), "line 1")
    assert (facts.validation, facts.checked) == (None, "recipe")


def check_longest(facts: Facts) -> int:
    assert facts.train is not None
    return facts.train.lengths.max


def test_rows_that_are_cut_to_nothing(tmp_path: Path) -> None:
    """All of a row's answer is cut away: the problem is training's, told once, and the row is one without labels."""
    recipe = recipe_of(tmp_path, SHORT, BURIED, dataset={"max_length": 24, "overlong": "truncate"})
    facts = check_data(recipe)
    assert facts.problems == (refusal_of_training(recipe),)
    assert facts.train is not None
    assert facts.train.without_labels == SomeRows(1, (2,), "line 2")


def test_no_row_is_left(tmp_path: Path) -> None:
    """Every row is dropped: one problem, and no steps to count."""
    recipe = recipe_of(tmp_path, LONG, LONG, dataset={"max_length": 24, "overlong": "drop"})
    facts = check_data(recipe, examples=1)
    assert facts.problems == (refusal_of_training(recipe),)
    assert (facts.steps, facts.examples) == (None, ())


def test_a_template_without_an_end_of_turn(tmp_path: Path) -> None:
    """Whoever trains on it gets a model that does not stop: a problem here, and a refusal there, in the same words."""
    recipe = recipe_of(tmp_path, SHORT)
    tiny_tokenizer(PLAIN).save_pretrained(recipe.base_model)
    facts = check_data(recipe)
    assert facts.problems == (refusal_of_training(recipe),)
    assert facts.problems[0].startswith(f"{recipe.dataset.train}: the chat template puts nothing after an answer")


def test_the_two_parts_of_a_split_are_not_the_same_rows(tmp_path: Path) -> None:
    """Half the rows of one file held out: same file and as many rows, and yet nothing to doubt."""
    facts = check_data(recipe_of(tmp_path, dataset={"validation_fraction": 0.5}))
    assert facts.notices == ()
    assert facts.validation is not None
    assert facts.validation.data.rows == 16


@pytest.mark.parametrize("number", [0, 2, 99])
def test_examples_are_the_rows_of_training(number: int, tmp_path: Path) -> None:
    """After cutting, with the labels that a batch has, in the order of the file; more than there are gives all."""
    recipe = recipe_of(tmp_path, SHORT, LONG, SILENT, dataset={"max_length": 24, "overlong": "truncate"})
    tokenizer = load_tokenizer(ModelSource(recipe.base_model))
    encoded = encode_training_rows(recipe.dataset, tokenizer)
    examples = check_data(recipe, examples=number).examples
    assert len(examples) == min(number, 3)
    for index, example in enumerate(examples):
        batch = collate(row_units(encoded), [index], tokenizer.pad_token_id)
        assert [example.row] == [row + 1 for row in batch.rows]
        assert example.where == f"{recipe.dataset.train}, line {index + 1}"
        assert list(example.input_ids) == batch.input_ids[0].tolist()
        assert list(example.labels) == batch.labels[0].tolist()
        assert all(label in (token, -100) for token, label in zip(example.input_ids, example.labels, strict=True))
        learned = tokenizer.decode([token for token in example.labels if token != -100])
        assert "".join(piece.text for piece in example.pieces if piece.supervised) == learned
        assert "".join(piece.text for piece in example.pieces) == tokenizer.decode(example.input_ids)
    assert "<|im_end|>" in "".join(piece.text for example in examples for piece in example.pieces) or not examples


def test_a_character_of_several_tokens_is_shown_whole() -> None:
    """Learned from its second token on: it is shown once, whole, with what is learned; no half of it is garbage."""
    tokenizer = tiny_tokenizer()
    before, emoji = (tokenizer(text)["input_ids"] for text in ("the end ", "😀"))
    assert len(emoji) > 1
    ids = [*before, *emoji, *before]
    mask = [len(before) < position < len(ids) - 1 for position in range(len(ids))]
    rows = rows_of_tokens((ids, mask), number=7)
    (example,) = first_examples(rows, tokenizer, 1)
    last = tokenizer.decode(before[-1:])
    assert example.row == 7
    assert [(piece.text, piece.supervised) for piece in example.pieces] == [
        ("the end ", False),
        ("😀" + "the end ".removesuffix(last), True),
        (last, False),
    ]


def test_a_folder_that_holds_a_run_is_a_note(tmp_path: Path) -> None:
    """It is what training without --resume would refuse, but the recipe is not wrong for it; a file in its place is."""
    recipe = recipe_of(tmp_path)
    run = Path(recipe.output_dir)
    run.mkdir()
    (run / "run.json").touch()
    facts = check_data(recipe)
    assert facts.problems == ()
    assert facts.notices == (
        f"output_dir: {run} already holds a run: go on with it by --resume, or name another folder with --output-dir",
    )
    (tmp_path / "file").touch()
    facts = check_data(recipe.model_copy(update={"output_dir": str(tmp_path / "file")}))
    assert facts.problems == (f"output_dir: {tmp_path / 'file'} is a file; expected a folder, or nothing, there",)


# ------------------------------------------------------------------------------------------- Without a base


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    """It is a problem; rows that are wrong in themselves are told of at the same time."""
    recipe = recipe_of(tmp_path, SHORT, {"prompt": "red", "completion": None})
    facts = check_data(recipe.model_copy(update={"base_model": str(tmp_path / "none")}))
    assert facts.problems == (
        f"base_model: {tmp_path / 'none'}: there is no such folder.",
        f"{recipe.dataset.train}, line 2: completion: expected text, got null.",
    )
    assert (facts.checked, facts.train, facts.steps) == ("recipe", None, None)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_a_base_on_a_hub_that_is_out_of_reach(tmp_path: Path) -> None:
    """Nothing is known against it: a note; rows that are wrong in themselves stay a problem."""
    recipe = recipe_of(tmp_path, SHORT).model_copy(update={"base_model": "no-such-org/model"})
    facts = check_data(recipe, examples=1)
    assert (facts.problems, facts.checked, facts.train, facts.examples) == ((), "recipe", None, ())
    assert len(facts.notices) == 1
    assert facts.notices[0].startswith(
        "tokens were not counted: base_model: the tokenizer of no-such-org/model (revision main) cannot be had from "
    )
    Path(recipe.dataset.train).write_text("[]")
    assert len(check_data(recipe).problems) == 1


@pytest.mark.usefixtures("offline")
def test_rows_on_a_hub_that_is_out_of_reach(tmp_path: Path) -> None:
    """What is here is looked at, what is not is noted, and the check does not call itself complete."""
    recipe = change(recipe_of(tmp_path, SHORT), "dataset", validation="no-such-org/rows")
    facts = check_data(recipe)
    assert (facts.problems, facts.checked, facts.validation) == ((), "recipe", None)
    assert facts.train is not None
    assert facts.steps is not None
    assert [notice.partition(": ")[0] for notice in facts.notices] == ["the validation rows were not read"]


def test_counts_are_plain_numbers(tmp_path: Path) -> None:
    """No NumPy scalar among the facts: they go into JSON as they are."""
    facts = check_data(recipe_of(tmp_path), examples=1)
    assert facts.train is not None
    numbers = [*vars(facts.train.lengths).values(), *vars(facts.train.overlong).values(), facts.train.data.rows]
    numbers += [facts.train.end_of_turn.rows, facts.examples[0].row, *facts.examples[0].labels]
    assert not any(isinstance(number, np.generic) for number in numbers)


def test_empty_answers_alone_are_refused(tmp_path: Path) -> None:
    """One is a doubt; if every one is, nothing but stopping is learned."""
    recipe = recipe_of(tmp_path, SILENT, SILENT, weights=True)
    facts = check_data(recipe)
    assert facts.problems == (refusal_of_training(recipe),)
    assert facts.problems[0] == f"{recipe.dataset.train}: every answer is empty: there is nothing to learn but to stop."


def test_a_copy_of_the_rows_is_doubted_under_any_name(tmp_path: Path) -> None:
    copy = tmp_path / "held-out.jsonl"
    copy.write_text(json.dumps(SHORT) + "\n")
    facts = check_data(recipe_of(tmp_path, SHORT, dataset={"validation": str(copy)}))
    assert facts.notices == (
        "validation has the rows of train: its loss says nothing about rows the model has not seen",
    )


def test_held_out_rows_are_those_of_training(tmp_path: Path) -> None:
    """The same seed, the same rows."""
    recipe = recipe_of(
        tmp_path, weights=True, dataset={"validation_fraction": 0.25}, training={"seed": 7, "max_steps": 1}
    )
    facts = check_data(recipe)
    events: list[Event] = []
    train(recipe, listeners=[events.append])
    assert facts.train is not None
    assert facts.validation is not None
    told = [event for event in events if isinstance(event, DataReady)]
    assert [facts.train.data.tokens, facts.validation.data.tokens] == [event.tokens for event in told]
    assert [facts.train.data, facts.validation.data] == told


@pytest.mark.parametrize("targets", [["q_proj", "qproj"], r".*\.nothing"])
def test_targets_that_the_model_has_not(targets: object, tmp_path: Path) -> None:
    """Known from the configuration alone, in training's words."""
    recipe = recipe_of(tmp_path, lora={"target_modules": targets})
    assert len(check_data(recipe).problems) == 1
    assert check_data(recipe).problems[0].startswith("lora.target_modules: ")
    right = recipe_of(tmp_path, lora={"target_modules": ["q_proj", "v_proj"]})
    assert check_data(right).problems == ()


def test_an_end_that_few_rows_have(tmp_path: Path) -> None:
    """The template writes none, and one row of three brings its own: it is said of how many."""
    tiny_tokenizer(PLAIN).save_pretrained(recipe_of(tmp_path).base_model)
    rows = [{"prompt": "red", "completion": text} for text in ("apple", "apple", "apple<|im_end|>")]
    assert check_data(recipe_of(tmp_path, *rows)).notices == (
        "the end of turn (<|im_end|>) is learned at the end of 1 of 3 rows: after the others the model does not "
        "learn to stop",
    )


def test_data_that_cannot_be_read(tmp_path: Path) -> None:
    """A number of thousands of digits, a column that is no text: a message with the file, from check and training."""
    for line, told in (
        ('{"prompt": "a", "completion": "b", "n": ' + "9" * 5000 + "}", "line 1: expected one JSON object"),
        ('{"prompt": "a", "completion": "b", "\\ud800": "c"}', "half of a surrogate pair"),
    ):
        recipe = recipe_of(tmp_path)
        Path(recipe.dataset.train).write_text(line + "\n")
        (problem,) = check_data(recipe).problems
        assert told in problem


def test_a_template_that_fails_in_its_own_way(tmp_path: Path) -> None:
    tiny_tokenizer("{{ 1 / 0 }}").save_pretrained(recipe_of(tmp_path).base_model)
    (problem,) = check_data(recipe_of(tmp_path, SHORT)).problems
    assert "line 1: the chat template refuses this conversation (user, assistant): division by zero" in problem


def test_a_short_text_is_no_empty_answer(tmp_path: Path) -> None:
    """Of text, one token to learn is a short text: neither counted nor doubted."""
    facts = check_data(recipe_of(tmp_path, {"text": "a"}, {"text": "the end of it"}))
    assert facts.train is not None
    assert (facts.train.silent, facts.notices) == (SomeRows(0, (), ""), ())
