"""`adapter_config.json` is read as PEFT means it, and refused with what was expected where it cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.utils.other import get_pattern_key

from qlora_cli.errors import ModelError
from qlora_cli.model.adapter_config import alpha_of, rank_of, read_adapter_config, scale_of


def _write(folder: Path, **fields: Any) -> Path:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | fields))
    return folder


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("r", None, "a positive integer"),
        ("r", 0, "a positive integer"),
        ("r", True, "a positive integer"),
        ("lora_alpha", "8", "a number"),
        ("lora_alpha", math.inf, "a number"),
        ("lora_dropout", "0.1", "a number"),
        ("rank_pattern", {"q_proj": 0}, "ranks by expression"),
        ("rank_pattern", {"(": 4}, "ranks by expression"),
        ("alpha_pattern", ["q_proj"], "numbers by expression"),
        ("target_modules", [1], "a list of names or an expression"),
        ("target_modules", "(", "a list of names or an expression"),
        ("exclude_modules", 7, "a list of names or an expression"),
        ("layers_to_transform", "1", "layer numbers"),
        ("rank_pattern", {"a)(b": 4}, "ranks by expression"),
        ("alpha_pattern", {"(?i)q_proj": 4}, "numbers by expression"),
        ("r", 10**400, "a positive integer"),
        ("lora_alpha", -(10**400), "a number"),
        ("layers_pattern", {}, "names"),
        ("layers_pattern", ["h", "("], "names"),
        ("use_rslora", "false", "true or false"),
        ("use_dora", 1, "true or false"),
        ("lora_bias", [], "true or false"),
        ("bias", True, "none, all or lora_only"),
        ("bias", "lora", "none, all or lora_only"),
        ("task_type", ["CAUSAL_LM"], "text"),
        ("base_model_name_or_path", 7, "text"),
        ("revision", {}, "text"),
        ("revision", "\ud800", "text"),
        ("modules_to_save", "lm_head", "a list of names"),
        ("trainable_token_indices", {"wte": 4}, "token numbers, or a list of them for each module"),
    ],
)
def test_a_field_of_another_type_is_told(tmp_path: Path, field: str, value: object, expected: str) -> None:
    """What PEFT would have written, and what is there."""
    folder = _write(tmp_path, **{field: value})
    with pytest.raises(ModelError) as caught:
        read_adapter_config(folder, {"modules_to_save", "trainable_token_indices"})
    assert str(caught.value) == f"{tmp_path / 'adapter_config.json'}: expected {expected} for {field}, got {value!r}"


def test_all_wrong_fields_are_told_at_once(tmp_path: Path) -> None:
    """One line each; a field that the file has not counts if it has no default."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": -1}')
    with pytest.raises(ModelError) as caught:
        read_adapter_config(tmp_path)
    assert [line.partition(": ")[2] for line in str(caught.value).split("\n")] == [
        "expected a positive integer for r, got -1",
        "expected a number for lora_alpha, got None",
    ]


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{", '"LORA"'])
def test_what_is_no_config_is_told(tmp_path: Path, content: str) -> None:
    """Broken, nested without end, or another JSON value: a message, never a traceback of the parser's."""
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"not valid JSON|expected peft_type LORA"):
        read_adapter_config(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").mkdir()
    with pytest.raises(ModelError, match="cannot be read"):
        read_adapter_config(tmp_path)


def test_only_what_the_caller_applies_passes(tmp_path: Path) -> None:
    """A setting is refused by one caller and read by another; set to its default it says nothing."""
    folder = _write(tmp_path, use_dora=True, bias="none", modules_to_save=None)
    with pytest.raises(ModelError, match="uses use_dora, which this version cannot apply"):
        read_adapter_config(folder)
    assert read_adapter_config(folder, {"use_dora"})["use_dora"] is True


@pytest.mark.parametrize("start", ["pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_a_start_that_took_from_the_base_is_refused(tmp_path: Path, start: str) -> None:
    """The base would have to be changed in the same way again."""
    with pytest.raises(ModelError, match=rf"was trained from a changed base \(init_lora_weights: {start}\)"):
        read_adapter_config(_write(tmp_path, init_lora_weights=start))


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.q_proj", "model.layers.10.q_proj", "q_proj", "lm_head"])
def test_ranks_and_scales_are_those_of_peft(tmp_path: Path, path: str) -> None:
    """Patterns are expressions for the end of the path, the first that fits counts; rank-stabilised or not."""
    ranks, alphas = {"layers.0.*q_proj": 2, "q_proj": 6, "lm": 9}, {r"layers\.\d+\..*": 5, "lm_head": 7.5}
    for rslora in (False, True):
        config = read_adapter_config(_write(tmp_path, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora))
        rank = ranks.get(get_pattern_key(list(ranks), path), 4)
        alpha = alphas.get(get_pattern_key(list(alphas), path), 8)
        assert (rank_of(config, path), alpha_of(config, path)) == (rank, alpha)
        assert scale_of(config, path) == alpha / (math.sqrt(rank) if rslora else rank)


def test_every_config_that_peft_writes_by_default_is_read(tmp_path: Path) -> None:
    """All of LoraConfig's fields at their defaults: none of them is taken for something that cannot be applied."""
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert read_adapter_config(tmp_path)["r"] == 8
