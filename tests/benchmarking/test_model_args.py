"""A results file names the model as lm-eval's command line would, without folders of this machine's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker

from qlora_cli.benchmarking.model_args import model_args, model_name
from qlora_cli.benchmarking.target import find_target
from qlora_cli.model.source import ModelSource
from tests.support.adapters import write_adapter, write_run
from tests.support.models import save_tiny_model
from tests.support.runs import tiny_recipe

_NF4 = "load_in_4bit=True,bnb_4bit_quant_type=nf4,bnb_4bit_use_double_quant=True,bnb_4bit_compute_dtype=float32"


@pytest.fixture
def targets(here: Path) -> Path:
    """A run with a checkpoint, over a base in `llama`."""
    write_run(tiny_recipe(here), steps=(2,))
    return here


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("llama", "pretrained=llama,dtype=float32"),
        ("run", f"pretrained=llama,peft=run,dtype=float32,{_NF4}"),
        (
            "run/checkpoints/step-000002",
            f"pretrained=llama,peft=run/checkpoints/step-000002,dtype=float32,{_NF4}",
        ),
    ],
)
def test_folders(targets: Path, target: str, told: str) -> None:
    """By their own names, wherever they lie; lm-eval reads our name of the model out of it."""
    for path in (target, str(targets / target)):
        found = find_target(path)
        assert model_args(found) == told
        assert GeneralConfigTracker._get_model_name(told) == model_name(found)


def test_other_forms(targets: Path) -> None:
    """8 bits, and none."""
    assert model_args(find_target("run", bits=8)).endswith("peft=run,dtype=float32,load_in_8bit=True")
    assert model_args(find_target("run", bits=16)) == "pretrained=llama,peft=run,dtype=float32"


def test_a_comma_in_a_name_does_not_end_it(here: Path) -> None:
    base = save_tiny_model(here / "a,b=c")
    write_adapter(here / "d,e", str(base))
    told = model_args(find_target("d,e"))
    assert dict(item.split("=", 1) for item in told.split(","))["pretrained"] == "a_b=c"
    assert ",peft=d_e,dtype=" in told


def test_the_hub(targets: Path) -> None:
    """A revision has its own place, and is no part of the name."""
    found = replace(find_target("llama"), name="org/m, revision v1", kind="hub model", base=ModelSource("org/m", "v1"))
    assert (model_name(found), model_args(found)) == ("org/m", "pretrained=org/m,revision=v1,dtype=float32")
