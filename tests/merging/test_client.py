"""A merged folder is loaded as any client would, and what a client would pass over in silence is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import MergeError
from qlora_cli.merging.fidelity.client import load_client, release_memory
from qlora_cli.merging.fidelity.held_out import CheckRow
from qlora_cli.merging.fidelity.outputs import outputs
from qlora_cli.model.base import load_base
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection
from tests.support.models import save_tiny_model

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


def _row() -> CheckRow:
    return CheckRow(torch.arange(5, 29), torch.arange(24) >= 6)


def _edit(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "loaded"),
    [("llama", "LlamaForCausalLM"), ("bert", "BertForSequenceClassification"), ("t5", "T5ForConditionalGeneration")],
)
def test_what_was_saved_is_loaded(family: str, loaded: str, tmp_path: Path) -> None:
    """By its architecture, in the dtype that it is stored in, ready to be asked."""
    save_tiny_model(tmp_path, family)
    with load_client(tmp_path, CPU) as model:
        assert type(model).__name__ == loaded
        assert model.dtype == torch.float32
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_every_fault_is_named(tmp_path: Path) -> None:
    """A weight that is missing, one that nothing takes: told by name, all at once."""
    save_tiny_model(tmp_path)
    _edit(tmp_path, **{"model.norm.weight": None, "model.layers.0.extra": torch.ones(2), "extra": torch.ones(1)})
    with pytest.raises(MergeError) as caught, load_client(tmp_path, CPU):
        pass
    assert str(caught.value) == (
        f"{tmp_path}: plain transformers does not load all of the merged model:\n"
        "  missing: model.norm.weight\n"
        "  of no use: extra\n"
        "  of no use: model.layers.0.extra"
    )


def test_what_the_base_has_for_nothing_may_stay(tmp_path: Path) -> None:
    """A tensor that is of no use in the base either is no fault of the merge."""
    save_tiny_model(tmp_path)
    _edit(tmp_path, extra=torch.ones(1))
    with load_client(tmp_path, CPU, ignorable=["extra"]) as model:
        assert model is not None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_too_large_a_model_is_read_from_its_files(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for a part of it, it says the same, and no copy of a weight is written anywhere."""
    save_tiny_model(tmp_path / "model", family)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with load_client(tmp_path / "model", CPU) as model:
        expected = outputs(model, _row())
    room = (tmp_path / "model" / WEIGHTS).stat().st_size * 3 // 4
    with load_client(tmp_path / "model", CPU, memory=room) as model:
        assert any(parameter.device.type == "meta" for parameter in model.parameters())
        found = outputs(model, _row())
        assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.parent.name != "model"]
    torch.testing.assert_close(found.scores, expected.scores)
    assert found.blocks.keys() == expected.blocks.keys()


def test_a_4_bit_checkpoint_is_loaded(tmp_path: Path) -> None:
    """What bitsandbytes stores beside a weight is of use; the model says what it said when it was saved."""
    base = save_tiny_model(tmp_path / "base")
    saved = load_base(ModelSource(str(base)), QuantizationSection(compute_dtype="float32"), CPU)
    saved.save_pretrained(tmp_path / "model")
    with load_client(tmp_path / "model", CPU) as model:
        torch.testing.assert_close(outputs(model, _row()).scores, outputs(saved.eval(), _row()).scores)


def test_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU had for one model is free before room for the next is counted; on a CPU there is nothing to do."""
    given: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append(True))
    release_memory(CPU)
    assert not given
    release_memory(torch.device("cuda"))
    assert given
