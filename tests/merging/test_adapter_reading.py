"""A PEFT folder is read whole or refused: every tensor used once, everything that the config names there, all faults
in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import ModelError
from qlora_cli.merging.adapters.reading import read_changes
from tests.support.models import TASK_TYPES, tiny_model
from tests.support.peft_adapters import (
    WEIGHTS,
    edit_config,
    edit_tensors,
    merged,
    module_kinds,
    parameters,
    read,
    save_peft_adapter,
)

_Q0, _Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A rank-4 adapter of both q_proj of the tiny Llama."""
    return save_peft_adapter(tiny_model("llama"), tmp_path, peft.LoraConfig(r=4, target_modules=["q_proj"]))


def _problems(folder: Path, family: str = "llama") -> list[str]:
    with pytest.raises(ModelError) as caught:
        read(tiny_model(family), folder)
    first, *lines = str(caught.value).split("\n")
    assert first == f"{folder}: the adapter cannot be applied:"
    return [line.removeprefix("  ") for line in lines]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
        ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "lora_bias": True, "fan_in_fan_out": True}),
        ("opt", {"target_modules": ["fc1"], "bias": "lora_only"}),
        ("roberta", {"target_modules": ["query"], "bias": "all"}),
        ("t5", {"target_modules": ["q", "v"]}),
    ],
)
def test_every_tensor_is_used_exactly_once(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """The sources of all changes, and what PEFT writes twice, are the tensors of the file."""
    model = tiny_model(family)
    config = peft.LoraConfig(r=4, task_type=TASK_TYPES.get(family, "CAUSAL_LM"), **settings)
    read_in = read(model, save_peft_adapter(model, tmp_path, config))
    used = [name for change in read_in.changes.values() for name in change.sources]
    assert sorted([*used, *read_in.unused]) == sorted(load_file(tmp_path / WEIGHTS))
    assert all(name == change.parameter for name, change in read_in.changes.items())


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "lora_bias": True, "fan_in_fan_out": True}),
        ("opt", {"target_modules": ["fc1"], "bias": "lora_only", "trainable_token_indices": [1, 2]}),
    ],
)
def test_an_adapter_with_any_one_tensor_missing_is_refused(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Whichever tensor is gone, and both of a pair too: what is missing is named."""
    model = tiny_model(family)
    save_peft_adapter(model, tmp_path, peft.LoraConfig(r=4, **settings))
    tensors = load_file(tmp_path / WEIGHTS)
    beneath = {name for name in tensors if name.endswith("embed_tokens.base_layer.weight")}  # the base has it as well
    for name in tensors.keys() - beneath:
        save_file({kept: tensor for kept, tensor in tensors.items() if kept != name}, tmp_path / WEIGHTS)
        assert len(_problems(tmp_path, family)) == 1, name
    pairs = {name.partition(".lora_")[0] for name in tensors if ".lora_A." in name}
    for pair in pairs:
        save_file({name: tensor for name, tensor in tensors.items() if f"{pair}.lora_" not in name}, tmp_path / WEIGHTS)
        path = pair.removeprefix("base_model.model.")
        assert f"target_modules names {path}, the adapter has no A and B for it" in _problems(tmp_path, family)


def test_all_faults_are_listed_at_once(folder: Path) -> None:
    """Unknown names, half a pair, a wrong rank, a module that is not there, and values that are no numbers."""
    edit_tensors(
        folder,
        **{
            f"{_Q0}.lora_B.weight": None,
            f"{_Q1}.lora_A.weight": torch.full((2, 64), float("nan")),
            "model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 64),
            "model.layers.7.mlp.up_proj.lora_B.weight": torch.ones(128, 4),
            f"{_Q1}.lora_C.weight": torch.ones(1),
            "model.norm.weight": torch.ones(64, dtype=torch.int64),
        },
    )
    assert sorted(_problems(folder)) == sorted(
        [
            f"unknown tensor: base_model.model.{_Q1}.lora_C.weight",
            "the base has no module model.layers.7.mlp.up_proj, the adapter has 2 tensors for it",
            f"A without B: base_model.model.{_Q0}.lora_A.weight",
            f"{_Q1}: rank 4 by the config, expected A [4, in] and B [out, 4], got [2, 64] and [64, 4]",
            "base_model.model.model.norm.weight: expected floating-point values, got int64",
            f"base_model.model.{_Q1}.lora_A.weight: has values that are NaN or infinite",
        ]
    )


@pytest.mark.parametrize(
    ("config", "tensors", "problem"),
    [
        ({"use_dora": True}, {}, f"{_Q0}: use_dora is true, the adapter has no magnitude"),
        ({}, {f"{_Q0}.lora_magnitude_vector": 64}, f"{_Q0}: use_dora is false, the adapter has a magnitude"),
        ({}, {f"{_Q0}.lora_B.bias": 64}, f"{_Q0}: lora_bias is false, the adapter has a bias of B"),
        ({}, {f"{_Q0}.base_layer.weight": 3}, f"base_model.model.{_Q0}.base_layer.weight: expected [64, 64], got [3]"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save names lm_head, the adapter has no lm_head.weight"),
        (
            {"trainable_token_indices": [1, 2]},
            {},
            "trainable_token_indices names tokens, the adapter has no rows for them",
        ),
        (
            {"target_modules": ["q_proj", "layers.1.mlp.up_proj"]},
            {},
            "target_modules names model.layers.1.mlp.up_proj, the adapter has no A and B for it",
        ),
        (
            {},
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": 2},
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta: expected "
            "trainable_token_indices to say which rows they are, got [2]",
        ),
        (
            {},
            {f"{_Q0}.lora_magnitude_vector": 64, f"{_Q0}.lora_magnitude_vector.weight": 64},
            f"two tensors for one place: base_model.model.{_Q0}.lora_magnitude_vector and "
            f"base_model.model.{_Q0}.lora_magnitude_vector.weight",
        ),
        (
            {},
            {"model.norm.weight": 64, "model.norm.modules_to_save.weight": 63},
            "two tensors for one place: base_model.model.model.norm.weight and "
            "base_model.model.model.norm.modules_to_save.weight",
        ),
        (
            {},
            {"model.norm.original_module.weight": 64},
            "unknown tensor: base_model.model.model.norm.original_module.weight",
        ),
        (
            {},
            {f"{_Q0}.lora_embedding_A": 1},
            f"base_model.model.{_Q0}.lora_embedding_A: no place for it beside the module's other tensors",
        ),
    ],
)
def test_tensors_and_config_that_say_different_things(
    folder: Path, config: dict[str, Any], tensors: dict[str, int], problem: str
) -> None:
    """Each contradiction has its line; vectors are given by their length."""
    edit_config(folder, **config)
    edit_tensors(folder, **{name: torch.ones(length) for name, length in tensors.items()})
    assert problem in _problems(folder)


def test_a_layer_of_another_kind_is_named(folder: Path) -> None:
    """A and B for what is no linear layer in this base, and an embedding's for what is no embedding."""
    edit_tensors(
        folder,
        **{
            "model.norm.lora_A.weight": torch.ones(4, 64),
            "model.norm.lora_B.weight": torch.ones(64, 4),
            "lm_head.lora_embedding_A": torch.ones(4, 64),
            "lm_head.lora_embedding_B": torch.ones(512, 4),
        },
    )
    assert set(_problems(folder)) == {
        "base_model.model.lm_head.lora_embedding_A: expected an embedding at lm_head, the base has a linear layer",
        "base_model.model.model.norm.lora_A.weight: expected a linear layer at model.norm, the base has something else",
    }


def test_an_adapter_of_another_base_is_refused(folder: Path) -> None:
    """Other names at once; the same names in other sizes when each change meets its parameter."""
    assert f"the base has no module {_Q0}, the adapter has 2 tensors for it" in _problems(folder, "gpt2")
    change = read(tiny_model("llama"), folder).changes[f"{_Q0}.weight"]
    assert change.problem((128, 128)) == f"{_Q0}.weight: the adapter is for [64, 64], the base has [128, 128]"


def test_modules_by_earlier_names(folder: Path) -> None:
    """`resolve` says where the model has a module; the config's patterns are held against the adapter's own path."""
    model = tiny_model("llama")
    edit_config(folder, alpha_pattern={"old.*q_proj": 80}, target_modules=["nothing"])
    tensors = load_file(folder / WEIGHTS)
    save_file({name.replace("model.layers", "old.layers"): t for name, t in tensors.items()}, folder / WEIGHTS)
    read_in = read_changes(folder, module_kinds(model), lambda path: path.replace("old.", "model."))
    assert set(read_in.changes) == {f"{_Q0}.weight", f"{_Q1}.weight"}
    assert {change.scale for change in read_in.changes.values()} == {20.0}  # type: ignore[attr-defined]


def test_a_saved_modules_tensors_by_their_second_name_alone(tmp_path: Path) -> None:
    """A file that has a fully saved module only under `modules_to_save` is read all the same."""
    model = tiny_model("roberta")
    config = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["query"])
    save_peft_adapter(model, tmp_path, config)
    expected = merged(model, tmp_path)
    renamed = {
        name.replace(".classifier.", ".classifier.modules_to_save.default."): tensor
        for name, tensor in load_file(tmp_path / WEIGHTS).items()
    }
    save_file(renamed, tmp_path / WEIGHTS)
    again = merged(model, tmp_path)
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_replication": [[0, 2]]}, "uses layer_replication, which this version cannot apply"),
        ({"target_parameters": ["experts.up"]}, "uses target_parameters, which this version cannot apply"),
        ({"alora_invocation_tokens": [1]}, "uses alora_invocation_tokens, which this version cannot apply"),
        ({"kasa_config": {"beta": 1}}, "uses kasa_config, which this version cannot apply"),
    ],
)
def test_settings_that_cannot_be_merged_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    """They make another function of the input, or another model: by name, before any tensor is looked at."""
    edit_config(folder, **changes)
    with pytest.raises(ModelError) as caught:
        read(tiny_model("llama"), folder)
    assert str(caught.value) == f"{folder / 'adapter_config.json'}: {message}"


def test_files_that_are_not_there_or_not_whole(folder: Path) -> None:
    """An adapter without weights, and one that was cut short."""
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        read(tiny_model("llama"), folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors; expected an adapter folder"):
        read(tiny_model("llama"), folder)


def test_without_the_models_parameters_a_saved_module_must_still_be_there(folder: Path) -> None:
    """What is known from the modules alone: that nothing of a saved one is in the file."""
    edit_config(folder, modules_to_save=["lm_head", "score"])
    kinds = module_kinds(tiny_model("llama"))
    with pytest.raises(ModelError, match=r"modules_to_save names lm_head, the adapter has no lm_head$"):
        read_changes(folder, kinds)
    edit_tensors(folder, **{"lm_head.weight": torch.ones(512, 64)})
    assert "lm_head.weight" in read_changes(folder, kinds, parameters=parameters(tiny_model("llama"))).changes
