"""Which modules a config names is decided as PEFT decides it."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from qlora_cli.merging.adapters.targets import saved_by, targeted_modules
from tests.support.models import tiny_model

_PATHS = {family: [path for path, _ in tiny_model(family).named_modules() if path] for family in ("llama", "t5")}


@pytest.mark.parametrize("family", _PATHS)
@pytest.mark.parametrize(
    ("fields", "some"),
    [
        ({"target_modules": ["q_proj", "q"]}, True),
        ({"target_modules": ["self_attn.q_proj", "SelfAttention.q", "proj"]}, True),
        ({"target_modules": r".*\.0\..*(q_proj|v_proj|\.q|\.v)"}, True),
        ({"target_modules": "q_proj"}, False),
        ({"target_modules": ["q_proj", "q"], "exclude_modules": r".*\.1\..*"}, True),
        ({"target_modules": ["q_proj", "q"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, True),
        ({"target_modules": ["lm_head", "q"], "modules_to_save": ["lm_head"]}, None),
        ({"target_modules": ["q_proj", "q"], "modules_to_save": ["self_attn", "SelfAttention"]}, None),
        ({"target_modules": ["q_proj", "q"], "layers_to_transform": 1}, True),
        ({"target_modules": ["q_proj", "q"], "layers_to_transform": [0]}, True),
        ({"target_modules": ["q_proj", "q"], "layers_to_transform": []}, True),
        ({"target_modules": ["q_proj", "q"], "layers_to_transform": [0], "layers_pattern": ["layers", "block"]}, True),
        ({"target_modules": ["q_proj", "q"], "layers_to_transform": [0], "layers_pattern": "h"}, False),
    ],
)
def test_the_same_modules_as_peft(family: str, fields: dict[str, Any], some: bool | None) -> None:
    """Lists by the end of the path, expressions for all of it; what is excluded, saved whole, or in other layers."""
    config = peft.LoraConfig(**fields)
    theirs = [path for path in _PATHS[family] if check_target_module_exists(config, path)]
    assert targeted_modules(fields, _PATHS[family]) == theirs
    assert some is None or bool(theirs) == some


def test_no_modules_are_named() -> None:
    """Nothing, or the shorthand that PEFT replaces by names when it trains."""
    assert targeted_modules({"target_modules": None}, _PATHS["llama"]) == []
    assert targeted_modules({"target_modules": "all-linear"}, _PATHS["llama"]) == []


@pytest.mark.parametrize("name", ["norm", "model.norm", "lm_head", "mlp", "classifier"])
def test_the_same_saved_modules_as_peft(name: str) -> None:
    """The end of a path, a part of a word too, with everything that the module holds."""
    model = tiny_model("llama")
    paths = [path for path, module in model.named_modules() if path and not list(module.children())]
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[name])
    adapted = peft.get_peft_model(model, config).base_model.model
    theirs = {
        path
        for path in paths
        if any(
            f"{parent}.original_module" in dict(adapted.named_modules())
            for parent in (path, *(path.rsplit(".", n)[0] for n in range(1, path.count(".") + 1)))
        )
    }
    assert {path for path in paths if saved_by(path, name)} == theirs
