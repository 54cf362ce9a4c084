"""What an adapter mentions is known before the hub's client is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_cli.merging.adapters.peek import named_sources
from qlora_cli.recipe.schema import Recipe
from tests.support.adapters import write_adapter, write_run
from tests.support.cli import ENVIRONMENT


def test_every_way_to_name_an_adapter(tmp_path: Path) -> None:
    """A run, its checkpoint, the adapter in either: the recipe's base and data; of any other folder, its base."""
    data = {"base_model": "org/base", "dataset": {"train": ["org/rows", "/here/rows.jsonl"], "validation": "org/held"}}
    run = write_run(Recipe.model_validate(data | {"output_dir": str(tmp_path / "run")}), steps=(5,))
    checkpoint = run.checkpoints / "step-000005"
    for path in (run.path, run.adapter, checkpoint, checkpoint / "adapter"):
        assert named_sources(path) == ["org/base", "org/rows", "/here/rows.jsonl", "org/held"], path
    assert named_sources(write_adapter(tmp_path / "peft", "org/other")) == ["org/other"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_what_cannot_be_read_mentions_nothing(tmp_path: Path, text: str) -> None:
    """It is told later what is wrong."""
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "recipe.yaml").write_text("base_model: [")
    assert named_sources(tmp_path) == []
    assert named_sources(tmp_path / "nowhere") == []


def test_no_library_is_imported_for_it() -> None:
    """The client would have read its environment by then."""
    libraries = "{'huggingface_hub', 'torch', 'transformers'}"
    code = f"import sys, qlora_cli.merging.adapters.peek; print({libraries} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
