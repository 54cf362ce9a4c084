"""What a run may be gone on with: the same material in the same order, or else it is refused, or said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import CheckpointError, OutputError
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training import identity as identity_module
from qlora_cli.training import resume as resume_module
from qlora_cli.training.events import Event, Notice
from qlora_cli.training.run import train
from tests.support.checkpoints import rewrite_state
from tests.support.runs import read_metrics, tiny_recipe


def _longer(recipe: Recipe, steps: int = 3, **training: Any) -> Recipe:
    section = recipe.training.model_copy(update={"max_steps": steps, **training})
    return recipe.model_copy(update={"training": section})


def _notices(recipe: Recipe) -> list[str]:
    events: list[Event] = []
    train(recipe, resume=True, listeners=[events.append])
    return [event.text for event in events if isinstance(event, Notice)]


def test_another_base_of_the_same_name_is_refused(tmp_path: Path) -> None:
    """One changed weight file under the old name: nothing is loaded or written."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    weights = Path(recipe.base_model) / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(OutputError) as caught:
        train(_longer(recipe), resume=True)
    assert str(caught.value) == (
        f"--resume: base_model is not the one that the run in {tmp_path / 'run'} began with: its weights or its "
        "configuration are others. Put that back, or train into another folder with --output-dir"
    )
    assert (tmp_path / "run" / "run.json").read_text() == before


def test_model_and_rows_may_lie_elsewhere(tmp_path: Path) -> None:
    """As on a cluster whose scratch folders are other ones for every job: what counts is what is in them."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    other = tmp_path / "elsewhere"
    other.mkdir()
    dataset = {name: str(shutil.move(getattr(recipe.dataset, name), other)) for name in ("train", "validation")}
    moved = {
        "base_model": str(shutil.move(recipe.base_model, other)),
        "dataset": recipe.dataset.model_copy(update=dataset),
    }
    told = _notices(_longer(recipe.model_copy(update=moved)))
    assert "going on from step-000002" in told
    assert (
        f"base_model was {recipe.base_model}, is {moved['base_model']}: taken for the same model, as configurations "
        "and samples of the weights are the same"
    ) in told


def test_a_list_of_sources_is_compared(tmp_path: Path) -> None:
    """Their weights decide what an epoch sees."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    source = {"path": recipe.dataset.train, "weight": 2.0}
    train(recipe)
    listed = recipe.model_dump(exclude_unset=True)
    listed["dataset"]["train"] = [source]
    with pytest.raises(OutputError, match=r"\n  dataset\.train: was '.*', is \[\{'path': .*'weight': 2\.0"):
        train(Recipe.model_validate(listed), resume=True)


def test_a_list_of_sources_may_lie_elsewhere(tmp_path: Path) -> None:
    """Named in a list, or no more; and a template's file, or the model's revision, which are compared by what they
    give."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}")
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2}, dataset={"chat_template": str(template)})
    train(recipe)
    data = recipe.model_dump(exclude_unset=True)
    moved = {
        name: str(Path(data["dataset"][name]).rename(tmp_path / f"{name}.jsonl")) for name in ("train", "validation")
    }
    data["dataset"] |= {"train": [{"path": moved["train"], "weight": 1.0}], "validation": [moved["validation"]]}
    data["dataset"]["chat_template"] = str(template.rename(tmp_path / "other.jinja"))
    data["revision"] = "main"
    data["training"]["max_steps"] = 3
    told = _notices(Recipe.model_validate(data))
    assert "going on from step-000002" in told
    assert [text for text in told if text.startswith("revision was None, is main: taken for the same model, as ")]


def test_a_hub_model_and_a_folder_cannot_be_compared(tmp_path: Path) -> None:
    """It is said so, and not that they differ."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    rewrite_state(checkpoint, lambda state: state["run"].update(base_model="commit 1234"))
    with pytest.raises(OutputError) as caught:
        train(_longer(recipe), resume=True)
    assert str(caught.value) == (
        f"--resume: base_model is not the one that the run in {tmp_path / 'run'} began with: one is on the hub and the "
        "other in a folder, so that they cannot be compared. Put that back, or train into another folder with "
        "--output-dir"
    )


def test_another_way_at_what_is_not_finite_is_said(tmp_path: Path) -> None:
    """It may be what the run is resumed for; it is another run from there on all the same."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    assert (
        "training.on_nonfinite was stop, is skip_step: a step whose loss or gradient is not finite is met otherwise "
        "from here on"
    ) in _notices(_longer(recipe, on_nonfinite="skip_step"))


def test_another_template_of_the_same_rows_is_refused(tmp_path: Path) -> None:
    """It differs where the rows do not go: the tokenizer that is saved with the adapter would be another."""
    template = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2}, dataset={"chat_template": template})
    train(recipe)
    again = _longer(recipe)
    other = template + "{% if tools %}tools{% endif %}"
    dataset = again.dataset.model_copy(update={"chat_template": other})
    with pytest.raises(OutputError) as caught:
        train(again.model_copy(update={"dataset": dataset}), resume=True)
    assert str(caught.value) == (
        f"--resume: the chat template is not the one that the run in {tmp_path / 'run'} began with: it is saved with "
        "the adapter, and may ask otherwise what the training rows do not. Put it back, or train into another folder "
        "with --output-dir"
    )


def test_what_cannot_be_compared_keeps_its_name(tmp_path: Path) -> None:
    """A hub that told no commit, as of an old cache: then the model's name and revision have to be the same."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    rewrite_state(checkpoint, lambda state: state["run"].update(base_model="commit None"))
    with pytest.raises(OutputError, match=r"\n  revision: was None, is 'other'\n"):
        train(_longer(recipe).model_copy(update={"revision": "other"}), resume=True)


def test_rows_in_another_order_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order is NumPy's to draw: where it would be another from here on, that is told before anything is done."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    monkeypatch.setattr(resume_module, "data_position", lambda plan, step: {"epoch": 0, "steps": 2, "next": "other"})
    with pytest.raises(OutputError, match=r"^--resume: step 3 would see other rows than the run in .* had before it"):
        train(_longer(recipe), resume=True)


def test_other_versions_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may round otherwise: not refused, but not kept quiet either."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    now = identity_module.versions()
    monkeypatch.setattr(identity_module, "versions", lambda: now | {"torch": "9.9"})
    told = (
        f"torch was {torch.__version__}, is 9.9: from here on the last bits may not be those that they would have been"
    )
    assert told in _notices(_longer(recipe))
    assert [text for text in _notices(_longer(recipe, 4)) if "last bits" in text] == []


def test_without_a_checkpoint_any_recipe_will_do(tmp_path: Path) -> None:
    """Nothing was kept that another recipe could not go on with: it begins."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    shutil.rmtree(tmp_path / "run" / "adapter")  # as of a run that was killed
    (tmp_path / "run" / "checkpoints" / "step-000002" / "state.json").unlink()
    notices = _notices(_longer(recipe, learning_rate=1e-3))
    assert "passed over checkpoint step-000002: state.json is missing" in notices
    assert "no checkpoint to go on from: starting from the beginning" in notices
    assert [record["learning_rate"] for record in read_metrics(tmp_path / "run", "train")] == [1e-3] * 3


def test_a_checkpoint_says_what_run_it_is_of(tmp_path: Path) -> None:
    """It is compared with itself, whatever became of recipe.yaml and run.json."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    run = tmp_path / "run"
    for name in ("recipe.yaml", "run.json"):
        (run / name).unlink()
    with pytest.raises(OutputError, match=r"\n  training\.learning_rate: was 0\.01, is 0\.5\n"):
        train(_longer(recipe, learning_rate=0.5), resume=True)
    train(_longer(recipe), resume=True)
    assert json.loads((run / "run.json").read_text())["status"] == "completed"


def test_a_recipe_of_another_version_is_told(tmp_path: Path) -> None:
    """A setting that this version does not know: which, and what to do."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000002"
    rewrite_state(checkpoint, lambda state: state["run"]["recipe"].update(invented=1))
    with pytest.raises(CheckpointError) as caught:
        train(_longer(recipe), resume=True)
    assert str(caught.value) == (
        f"{checkpoint}: was made with settings that this version does not read so: invented. Go on with the version of "
        "qlora-cli that the run began with (run.json has it), or train into another folder with --output-dir"
    )
    rewrite_state(checkpoint, lambda state: state["progress"].update(invented=1))
    with pytest.raises(CheckpointError, match=r"state\.json: not what this version writes: .*'invented'"):
        train(_longer(recipe), resume=True)
