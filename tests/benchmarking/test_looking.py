"""What a target's name stands for, told without torch; and what is said of a name that stands for nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_cli.benchmarking.looking import Looked, look_at
from qlora_cli.errors import ModelError
from tests.support.cli import ENVIRONMENT

ORG = "expected the folder of a run, a checkpoint, an adapter or a model"


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")


def refusal(target: str) -> str:
    with pytest.raises(ModelError) as caught:
        look_at(target)
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "target", "kind"),
    [
        (["runs/a/recipe.yaml"], "runs/a", "adapter"),
        (["runs/a/adapter/adapter_config.json"], "runs/a", "adapter"),
        (["runs/a/checkpoints/step-000002/manifest.json"], "runs/a", "adapter"),
        (["runs/a/checkpoints/step-000002/adapter/x"], "runs/a/checkpoints/step-000002", "adapter"),
        (["lora/adapter_model.safetensors"], "./lora", "adapter"),
        (["lora/adapter_model.bin"], "lora", "adapter"),
        (["lora/adapter_config.json", "lora/config.json"], "lora", "adapter"),
        (["model/config.json"], "model", "model"),
        (["model/config.json"], "model/../model/", "model"),
    ],
)
def test_a_folder_is_what_is_in_it(files: list[str], target: str, kind: str) -> None:
    """A run, a checkpoint and an adapter are adapters, also where a model's configuration lies along."""
    touch(*files)
    found = look_at(target)
    assert found.kind == kind
    assert Path(found.name).resolve() == Path(target).resolve()


def test_here_is_a_folder_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch("runs/a/recipe.yaml")
    monkeypatch.chdir("runs/a")
    assert look_at(".") == Looked("adapter", str(here / "runs/a"))


def test_a_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    touch("model/config.json")
    assert look_at("~/model") == Looked("model", str(here / "model"))


@pytest.mark.parametrize("name", ["gpt2", "org/name", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_any_other_name_is_of_the_hub(name: str) -> None:
    assert look_at(name) == Looked("hub", name)


def test_a_model_here_does_not_stand_before_the_hub() -> None:
    """A folder called as the organisation is, with another size of the model in it: the name is the hub's all the same,
    and what is here is only told of should the hub have no such model."""
    touch("org/Model-7b/config.json", "gpt3/config.json")
    assert look_at("org/Model-13b") == Looked("hub", "org/Model-13b", "; did you mean Model-7b?")
    assert look_at("gpt2").kind == "hub"


def test_a_misspelt_run_is_no_hub_name() -> None:
    """`runs/nane` could be on the hub by its look."""
    touch("runs/name/recipe.yaml")
    assert refusal("runs/nane") == (
        f"runs/nane: there is no such folder; did you mean name? E{ORG[1:]}, or a hub name such as org/name"
    )


def test_nothing_there() -> None:
    touch("runs/name/recipe.yaml")
    assert refusal("./rums") == (
        f"rums: there is no such folder; did you mean runs? E{ORG[1:]}, or a hub name such as org/name"
    )
    assert refusal("no/such/folder").startswith("no/such/folder: there is no such folder; the folder no/such is not")
    assert refusal("  ") == f"{ORG}, got nothing"
    assert "there is no such folder" in refusal("a name with spaces")
    assert "cannot be looked up" in refusal("x" * 5000)


def test_a_folder_with_none_of_it() -> None:
    touch("notes/a.txt", "gguf/m.gguf")
    assert refusal("notes") == (
        "notes: nothing to score in this folder. Expected a run (adapter/ or checkpoints/ in it), a checkpoint of one, "
        "an adapter (adapter_config.json and adapter_model.safetensors), or a model (config.json and *.safetensors)"
    )
    assert refusal("gguf") == "gguf: holds GGUF files, which are not read. Give the model that they were made from"


def test_folders_inside_are_named() -> None:
    touch("all/b/config.json", "all/a/adapter_config.json", *(f"all/r{i}/recipe.yaml" for i in range(5)))
    assert refusal("all") == (
        "all: nothing to score in this folder, but in folders inside. Name one: all/a, all/b, all/r0, all/r1, all/r2, "
        "… (7 in all)"
    )


def test_a_file_is_no_target() -> None:
    touch("m/config.json", "m/model.safetensors", "a/adapter_config.json", "m.gguf", "notes.txt")
    assert refusal("m/config.json") == "m/config.json is a file; expected the folder that it lies in: m"
    assert refusal("m/model.safetensors").endswith("expected the folder that it lies in: m")
    assert refusal("a/adapter_config.json").endswith("expected the folder that it lies in: a")
    assert refusal("m.gguf") == "m.gguf: GGUF files are not read. Give the model that it was made from"
    assert refusal("notes.txt") == f"notes.txt is a file; {ORG}"


def test_a_recipe_is_no_target_and_its_run_is_named() -> None:
    Path("r.yaml").write_text("base_model: org/m\ndataset: {train: org/rows}\noutput_dir: runs/x\n")
    Path("broken.yml").write_text("][")
    expected = "is a recipe; expected the folder of the run that was made with it"
    assert refusal("r.yaml") == f"r.yaml {expected}, which it says is runs/x"
    assert refusal("broken.yml") == f"broken.yml {expected}"


def test_no_torch_is_needed() -> None:
    code = "import sys, qlora_cli.benchmarking.looking; print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
