"""What a run is made of: two parts of one run are made of the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from qlora_cli.errors import ModelError
from qlora_cli.model.fingerprint import base_fingerprint
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import Recipe, SourceSection
from qlora_cli.training.environment import hardware, versions

# Of the packages, those whose products or draws are in the weights.
_DECISIVE = ("torch", "transformers", "bitsandbytes", "accelerate")

# Where something lies, which may be elsewhere for each process.
_PLACES = {"base_model", "dataset.chat_template", "output_dir", "evaluation.data_root", "evaluation.task_path"}


def run_identity(
    recipe: Recipe,
    source: ModelSource,
    fingerprints: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    num_processes: int,
) -> dict[str, Any]:
    """What a checkpoint keeps of its run, to compare with what a resumed run is made of.

    `recipe` as it is resolved; `data`, the fingerprint of every split's tokens and labels; `base_model`, that of the
    base; `chat_template`, that of the template that is saved with the adapter and asks benchmarks' questions, which may
    be another where the rows are the same; `num_processes`, as a step's rows are dealt to them; `surroundings`, what
    else decides the last bits.
    """
    installed, machine = versions(), hardware(device, num_processes)
    decisive = {name: installed[name] for name in _DECISIVE} | {"numpy": np.__version__}
    device_facts = {"device": machine["device"]}
    if device.type == "cuda":
        device_facts |= {"GPU": machine["gpu"], "CUDA": str(machine["cuda"])}
    else:
        device_facts |= {"CPU": machine["cpu"], "torch threads": str(machine["torch_threads"])}
    return {
        "recipe": recipe.model_dump(mode="json"),
        "data": dict(fingerprints),
        "base_model": base_fingerprint(source),
        "chat_template": hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest(),
        "num_processes": num_processes,
        "surroundings": decisive | device_facts,
    }


def check_same_everywhere(accelerator: Accelerator, recipe: Recipe, run: Mapping[str, Any]) -> None:
    """Refuse processes that would train different models: each has read its own copy, maybe on a machine of its own.

    Raises:
        ModelError: on every process, naming one that has something else, and what.
    """
    here = settings(recipe.model_dump(mode="json"))
    for split, sources in (("train", recipe.dataset.train_sources), ("validation", recipe.dataset.validation_sources)):
        here[f"dataset.{split}"] = [source.model_dump(mode="json") for source in but_for_places(sources)]
    here = {name: value for name, value in here.items() if name not in _PLACES}
    here |= {"base model": run["base_model"], "chat template": run["chat_template"], "rows": run["data"]}
    every = gather_object([here])
    for number, other in enumerate(every):
        names = [*every[0], *(name for name in other if name not in every[0])]
        if differing := [name for name in names if other.get(name) != every[0].get(name)]:
            raise ModelError(
                f"process {number} of {len(every)} has not the {' and '.join(differing)} that process 0 has. Give all "
                "of them the same recipe and files"
            )


def but_for_places(sources: Sequence[SourceSection]) -> list[SourceSection]:
    """What is said of sources of rows, but for where they are: what is in them is compared by fingerprints."""
    return [source.model_copy(update={"path": ""}) for source in sources]


def settings(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's settings by their dotted names."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        name = prefix + key
        if isinstance(value, dict) and name != "dataset.columns":
            result |= settings(value, name + ".")
        else:
            result[name] = value
    return result
