"""Merging tiny models' adapters from folder to folder, and reading what came of it as any client would."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertForMaskedLM, PreTrainedModel

from qlora_cli.merging.events import Merged
from qlora_cli.merging.merge import merge
from qlora_cli.merging.request import MergeRequest
from tests.support.models import save_tiny_model, tiny_config
from tests.support.peft_adapters import save_peft_adapter
from tests.support.tokenizers import tiny_tokenizer


class Bases:
    """Model folders by family, each made once and read only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, family: str) -> Path:
        folder = self._folder / family
        return folder if folder.exists() else save_tiny_model(folder, family)


def save_masked_model(folder: Path) -> Path:
    """A BERT that fills gaps: it has a bias for each token, tied as its embeddings are."""
    tokenizer = tiny_tokenizer()
    model = BertForMaskedLM(tiny_config("bert", len(tokenizer)))
    torch.nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapt(base: Path, folder: Path, *, task: str | None = "CAUSAL_LM", **settings: Any) -> Path:
    """A random adapter over the model in `base`, as PEFT saves it."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 10, "task_type": task, **settings})
    return save_peft_adapter(load_model(base), folder, config)


def merge_adapter(adapter: Path, output: Path, **options: Any) -> Merged:
    """A whole merge on the CPU; nothing is compared unless `verify` is given."""
    return merge(MergeRequest(adapter=adapter, output=output, **{"verify": False, "device": "cpu", **options}))


def load_model(folder: Path, **arguments: Any) -> PreTrainedModel:
    """What plain transformers makes of a model folder, whole: nothing missing, left over or of another shape."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, found = getattr(transformers, architecture).from_pretrained(
        folder, dtype="auto", output_loading_info=True, **arguments
    )
    assert not any(found.values()), found
    return model.eval()


def model_logits(model: torch.nn.Module) -> Tensor:
    """What a model says of two short texts."""
    ids = torch.arange(5, 29).reshape(2, 12)
    more = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, **more).logits
    return logits


def trained_logits(base: PreTrainedModel, adapter: Path) -> Tensor:
    """What the model says with the adapter beside it, as PEFT applies it. `base` is the caller's no longer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model_logits(peft.PeftModel.from_pretrained(base, adapter).eval())


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder, of all its shards."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def edit_stored(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Put tensors into the one file of a model folder; None takes one away."""
    tensors = {name: value for name, value in (stored_tensors(folder) | changes).items() if value is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's `config.json`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def set_config(folder: Path, **values: Any) -> None:
    """Set fields of `config.json`."""
    (folder / "config.json").write_text(json.dumps(read_config(folder) | values))
