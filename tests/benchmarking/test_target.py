"""A target is found, described and loaded: each kind of it, in each form, held against transformers and PEFT."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertForMaskedLM, BitsAndBytesConfig, PreTrainedModel

from qlora_cli.benchmarking.target import Target, find_target
from qlora_cli.data.templates import PLAIN
from qlora_cli.errors import ModelError
from qlora_cli.model.base import load_base
from qlora_cli.model.quantization import keep_layout
from qlora_cli.model.source import ModelSource
from qlora_cli.model.storage import WeightForm
from qlora_cli.recipe.schema import QuantizationSection
from tests.support.adapters import write_adapter, write_run
from tests.support.merge_runs import merge_run, save_adapter
from tests.support.models import save_tiny_model, tiny_config
from tests.support.peft_adapters import LAYERS, save_peft_adapter
from tests.support.runs import tiny_recipe

CPU = torch.device("cpu")
ASSUMED = "nothing tells how the base was stored while this adapter was trained: 16 bits are assumed"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "llama")


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(5, 29).reshape(2, 12)
    with torch.no_grad():
        said: Tensor = model(input_ids=ids).logits
    return said.float()


def with_peft(base: Path, adapter: Path, form: Any) -> PreTrainedModel:
    """PEFT's model of the adapter over the base in this form."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: PreTrainedModel = peft.PeftModel.from_pretrained(load_base(ModelSource(str(base)), form, CPU), adapter)
        return model.eval()


def set_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    data = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


def refusal(target: Path | str, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        find_target(str(target), **options)
    return str(caught.value)


# Runs, checkpoints, adapters.


def test_a_run_is_scored_as_it_was_trained(here: Path) -> None:
    """On its base, in its 4-bit form, with what PEFT says of both; without the adapter, it is the base."""
    merge_run(here)
    target = find_target("run")
    assert (target.name, target.kind) == ("run", "run")
    assert target.storage == "NF4, double quantisation, float32 compute"
    assert target.remarks == ()
    assert target.base.name == str(here / "llama")
    model = target.load(CPU)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    form = QuantizationSection(compute_dtype="float32")
    expected, plain = logits(with_peft(here / "llama", here / "run/adapter", form)), _base_logits(here / "llama", form)
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with target.without_adapter(model):
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def _base_logits(base: Path, form: Any) -> Tensor:
    return logits(load_base(ModelSource(str(base)), form, CPU).eval())


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_run_in_another_form(here: Path, bits: Any) -> None:
    """What is asked for is what is loaded: the base in those bits, the adapter over it as PEFT has it; it is remarked
    where that is not as it was trained."""
    merge_run(here)
    target = find_target("run", bits=bits)
    form = WeightForm(bits, compute_dtype="float32")
    words = {
        4: "NF4, double quantisation, float32 compute",
        8: "LLM.int8(), float32 compute",
        16: "unquantised, float32",
    }[bits]
    assert target.storage == words
    if bits == 4:
        assert target.remarks == ()
    else:
        assert target.remarks == (
            "the adapter was trained over a base in another form (NF4, double quantisation, float32 compute) than it "
            f"is scored over ({words}): --bits {bits} asks for that",
        )
    model = target.load(CPU)
    expected = logits(with_peft(here / "llama", here / "run/adapter", form))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    with target.without_adapter(model):
        torch.testing.assert_close(logits(model), _base_logits(here / "llama", form), rtol=1e-4, atol=1e-4)


def test_four_bits_are_those_of_training(here: Path) -> None:
    """An adapter trained over FP4 is scored over FP4 if 4 bits are asked for."""
    merge_run(here, quantization={"quant_type": "fp4", "double_quant": False})
    assert find_target("run", bits=4).storage == "FP4, float32 compute"


def test_a_checkpoint(here: Path) -> None:
    """By its folder or by the adapter in it; of a run that did not finish, the newest is taken, and it is said."""
    write_run(tiny_recipe(here), steps=(2, 4), status="interrupted", adapter=False)
    for path in ("run/checkpoints/step-000002", "run/checkpoints/step-000002/adapter"):
        target = find_target(path)
        assert (target.name, target.kind, target.remarks) == ("run, step 2", "checkpoint", ())
        assert target.adapter is not None
        assert target.adapter.folder.parent.name == "step-000002"
    target = find_target("run")
    assert (target.name, target.kind) == ("run, step 4", "checkpoint")
    assert target.remarks == (
        "the run in run did not finish (interrupted): its newest whole checkpoint, step-000004, is taken",
    )


def test_an_adapter_from_elsewhere(here: Path, base: Path) -> None:
    """Nothing tells how its base was stored: 16 bits are assumed, and said, unless it is told."""
    save_adapter(base, here / "lora")
    target = find_target("lora")
    assert (target.name, target.kind, target.storage) == ("lora", "adapter", "unquantised, float32")
    assert target.remarks[0].startswith(ASSUMED)
    expected = logits(with_peft(base, here / "lora", WeightForm(16, compute_dtype="float32")))
    torch.testing.assert_close(logits(target.load(CPU)), expected, rtol=1e-4, atol=1e-4)
    told = find_target("lora", trained_base="nf4")
    assert (told.storage, told.remarks) == ("NF4, float32 compute", ())


def test_a_base_that_has_moved(here: Path, base: Path) -> None:
    """It is told where it was looked for; `base_model` says where it is."""
    save_adapter(base, here / "lora")
    base.rename(here / "moved")
    assert "there is no such folder" in refusal("lora")
    assert "--base-model" in refusal("lora")
    base = base.parent / "moved"
    base.rename(here / "llama2")
    asked = "there is no such folder; did you mean llama2? If it is elsewhere now, say where with --base-model"
    assert refusal("lora").endswith(asked)
    (here / "llama2").rename(base)
    assert find_target("lora", base_model="moved").base.name == str(here / "moved")


def test_an_adapter_that_does_not_fit_is_told_when_loaded(here: Path) -> None:
    save_tiny_model(here / "opt", "opt")
    write_adapter(here / "lora", str(here / "opt"))
    with pytest.raises(ModelError, match="q_proj"):
        find_target("lora").load(CPU)


def test_a_damaged_checkpoint_is_told(here: Path) -> None:
    run = write_run(tiny_recipe(here), steps=(2,), adapter=False)
    (run.checkpoints / "step-000002/adapter/adapter_model.safetensors").write_bytes(b"x")
    assert "the checkpoint is damaged" in refusal("run/checkpoints/step-000002")


# Whole models.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("said", ["dtype", "torch_dtype", None])
def test_a_model_has_its_own_dtype(here: Path, base: Path, dtype: str, said: str | None) -> None:
    """As its configuration says, in today's word or yesterday's, else as its weights are: it answers as plain
    transformers has it with dtype="auto"."""
    wanted: torch.dtype = getattr(torch, dtype)
    tensors = {name: tensor.to(wanted) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    set_config(base, **({"dtype": None, "torch_dtype": None} | ({said: dtype} if said else {})))
    target = find_target("llama")
    assert (target.name, target.kind, target.storage) == ("llama", "model folder", f"unquantised, {dtype}")
    model = target.load(CPU)
    assert model.dtype == wanted
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bits", "config"),
    [
        (4, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
        (8, BitsAndBytesConfig(load_in_8bit=True)),
    ],
)
def test_a_model_in_fewer_bits(here: Path, base: Path, bits: Any, config: BitsAndBytesConfig) -> None:
    """As transformers and bitsandbytes round it and compute with it."""
    target = find_target("llama", bits=bits)
    config.bnb_4bit_compute_dtype = torch.float32
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config).eval()
    keep_layout(theirs)
    torch.testing.assert_close(logits(target.load(CPU)), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "config", "words"),
    [
        (
            4,
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
            "NF4, bfloat16 compute, as stored",
        ),
        (
            4,
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
            "FP4, double quantisation, float32 compute, as stored",
        ),
        (8, {"load_in_8bit": True}, "LLM.int8(), as stored"),
    ],
)
def test_a_quantised_model_is_scored_as_it_is_stored(
    here: Path, base: Path, bits: Any, config: dict[str, Any], words: str
) -> None:
    """Whatever is stored is what answers; other bits cannot be had from it."""
    made = AutoModelForCausalLM.from_pretrained(base, quantization_config=BitsAndBytesConfig(**config))
    made.save_pretrained(here / "small")
    shutil.copy(base / "tokenizer.json", here / "small")
    target = find_target("small")
    assert target.storage == words
    assert find_target("small", bits=bits).form == target.form
    theirs = AutoModelForCausalLM.from_pretrained(here / "small", dtype="auto").eval()
    keep_layout(theirs)
    torch.testing.assert_close(logits(target.load(CPU)), logits(theirs), rtol=1e-5, atol=1e-5)
    stored = words.removesuffix(", as stored")
    assert refusal("small", bits=16) == (
        f"--bits 16: the weights of {here / 'small'} are stored quantised ({stored}), and are scored as they are. "
        "Leave --bits out, or name the model that they were made from"
    )


def test_another_way_of_quantising_is_left_to_transformers(here: Path, base: Path) -> None:
    """What is needed for it is not here: told when the model is loaded."""
    set_config(base, quantization_config={"quant_method": "gptq", "bits": 4})
    target = find_target("llama")
    assert target.storage == "gptq, as stored"
    with pytest.raises(ModelError, match=rf"^TARGET: the model in {base} cannot be read: "):
        target.load(CPU)
    assert refusal("llama", bits=4).startswith(f"--bits 4: the weights of {base} are stored quantised (gptq)")


def test_an_adapter_over_a_model_stored_in_four_bits(here: Path, base: Path) -> None:
    """Is scored over that; not over anything else."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(here / "small")
    write_adapter(here / "lora", str(here / "small"), target_modules=["0.self_attn.q_proj"])
    target = find_target("lora")
    assert target.storage == "NF4, float32 compute"
    assert logits(target.load(CPU)).isfinite().all()
    assert refusal("lora", bits=8).startswith(f"--bits 8: the weights of {here / 'small'} are stored quantised (NF4")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_an_adapter_over_eight_bits_answers_as_pefts(here: Path, family: str) -> None:
    """Of every kind of layer, also Conv1D and layers with biases: bitsandbytes' own products, and the update."""
    base = save_tiny_model(here / family, family)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules=LAYERS[family], task_type="CAUSAL_LM")
    save_peft_adapter(model, here / "lora", config)
    target, form = find_target("lora", bits=8), WeightForm(8, compute_dtype="float32")
    theirs = with_peft(base, here / "lora", form)
    assert (logits(theirs) - _base_logits(base, form)).abs().max() > 0.01
    ours = target.load(CPU)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    with target.without_adapter(ours):
        torch.testing.assert_close(logits(ours), _base_logits(base, form), rtol=1e-4, atol=1e-4)


def test_dora_over_eight_bits(here: Path, base: Path) -> None:
    """Near PEFT's: the magnitude is of the 8-bit weight made plain; PEFT rounds the inputs, too, of a part of it."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", use_dora=True)
    save_peft_adapter(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), here / "lora", config)
    form = WeightForm(8, compute_dtype="float32")
    theirs, plain = logits(with_peft(base, here / "lora", form)), _base_logits(base, form)
    target = find_target("lora", bits=8)
    ours = target.load(CPU)
    first = logits(ours)
    torch.testing.assert_close(first, theirs, rtol=0, atol=0.02)
    assert (theirs - plain).abs().max() > 0.1
    with target.without_adapter(ours):
        torch.testing.assert_close(logits(ours), plain, rtol=1e-4, atol=1e-4)
    # The base's layers have put their weights elsewhere by now.
    torch.testing.assert_close(logits(ours), first, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("t5", "(T5ForConditionalGeneration) is an encoder-decoder; only causal language models can be scored yet"),
        ("bert", "(BertForSequenceClassification) is a classifier of texts; only causal language models can be scored"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(here: Path, family: str, message: str) -> None:
    save_tiny_model(here / family, family)
    assert refusal(family).startswith(f"{here / family} {message}")


def test_a_model_that_fills_gaps_is_refused(here: Path) -> None:
    BertForMaskedLM(tiny_config("bert", 512)).save_pretrained(here / "bert")
    assert "(BertForMaskedLM) is a model that fills gaps" in refusal("bert")


def test_a_classifiers_adapter_is_refused(here: Path, base: Path) -> None:
    write_adapter(here / "lora", str(base), task_type="SEQ_CLS")
    assert refusal("lora") == (
        f"{here / 'lora'}: the adapter was trained to classify texts (task_type SEQ_CLS); only causal language models "
        "can be scored yet"
    )


def test_a_model_that_sees_is_none(here: Path, base: Path) -> None:
    set_config(base, model_type="vit", architectures=["ViTModel"])
    assert "(ViTModel): transformers has no causal language model of this kind" in refusal("llama")


def test_arguments_of_adapters_are_refused_for_models(base: Path) -> None:
    assert refusal("llama", base_model="x", trained_base="nf4") == (
        "--base-model, --trained-base: for adapters, and llama is a whole model: leave it out"
    )
    assert refusal("llama", revision="main") == (
        "--revision: for models of the hub, and llama is a local folder: leave it out"
    )


def test_weights_that_are_not_there(base: Path) -> None:
    """No weights, or only as pickle: told before or when they are loaded, never a random model."""
    shutil.move(base / "model.safetensors", base / "pytorch_model.bin")
    assert refusal("llama").startswith(f"TARGET: {base} has its weights only as pickle (.bin)")
    (base / "pytorch_model.bin").unlink()
    assert refusal("llama") == f"TARGET: {base} holds no weights: no *.safetensors beside its config.json"


def test_a_weight_that_is_missing(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"^TARGET: .* lacks 1 of the model's weights: model.layers.1.mlp.up_proj"):
        find_target("llama").load(CPU)


def test_a_whole_model_has_no_base_to_take_away_to(base: Path) -> None:
    target = find_target("llama")
    with pytest.raises(ModelError, match="llama is a whole model"), target.without_adapter(target.load(CPU)):
        pass


# Tokenizers.


def template(target: Target) -> str | None:
    found = target.tokenizer().chat_template
    return found if isinstance(found, str) else None


def test_the_adapters_own_tokenizer(here: Path) -> None:
    """It is the one that was trained with; of a checkpoint, the finished run's."""
    recipe = tiny_recipe(here)
    run = write_run(recipe, steps=(2,))
    tokenizer = find_target(recipe.base_model).tokenizer()
    tokenizer.chat_template = "{{ messages }}own"
    tokenizer.save_pretrained(run.adapter)
    for path in ("run", "run/checkpoints/step-000002"):
        target = find_target(path)
        assert target.has_own_tokenizer
        assert template(target) == "{{ messages }}own"


def test_the_runs_template_on_the_bases_tokenizer(here: Path) -> None:
    """A checkpoint of a run that did not finish has no tokenizer with it: the recipe tells what was used."""
    write_run(tiny_recipe(here, dataset={"chat_template": "{{ messages }}!"}), steps=(2,), adapter=False)
    target = find_target("run/checkpoints/step-000002")
    assert target.facts()["target"] == "run, step 2"
    assert not target.has_own_tokenizer
    assert template(target) == "{{ messages }}!"


def test_conversations_without_a_template_were_rendered_with_the_plain_one(here: Path) -> None:
    write_run(tiny_recipe(here, dataset={"format": "messages"}), adapter=True)
    (here / "llama/chat_template.jinja").unlink(missing_ok=True)
    assert template(find_target("run")) == PLAIN
    assert template(find_target("llama")) is None


def test_a_broken_tokenizer_is_told(here: Path) -> None:
    run = write_run(tiny_recipe(here))
    (run.adapter / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer cannot be read"):
        find_target("run").tokenizer()


# What is the same model.


def test_the_fingerprint_is_of_what_answers(here: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another adapter, form, base file or tokenizer is another model; the same adapter elsewhere is the same one; and
    the base of two adapters is one base."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nobody knocks for x/y again and again
    save_adapter(base, here / "one")
    save_adapter(base, here / "two", seed=2)
    one, two = find_target("one"), find_target("two")
    first = one.fingerprint(CPU)
    assert len(first) == 64
    assert find_target("one").fingerprint(CPU) == first
    shutil.copytree(here / "one", here / "copy")
    assert find_target("copy").fingerprint(CPU) == first
    moved = here / "copy/adapter_config.json"
    moved.write_text(
        json.dumps(json.loads(moved.read_text()) | {"base_model_name_or_path": "x/y", "lora_dropout": 0.5})
    )
    assert find_target("copy", base_model="llama").fingerprint(CPU) == first
    moved.write_text(json.dumps(json.loads(moved.read_text()) | {"lora_alpha": 640}))
    assert find_target("copy", base_model="llama").fingerprint(CPU) != first, "the same tensors, another scale"
    assert two.fingerprint(CPU) != first
    baseline = one.fingerprint(CPU, with_adapter=False)
    assert baseline == two.fingerprint(CPU, with_adapter=False) != first
    assert find_target("one", bits=8).fingerprint(CPU) != first
    assert find_target("one", trained_base="nf4").fingerprint(CPU) != find_target("one", bits=4).fingerprint(CPU)
    tokenizer = base / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert find_target("one").fingerprint(CPU) != first
    tokenizer.write_text(tokenizer.read_text()[:-1])
    assert find_target("one").fingerprint(CPU) == first
    weights = base / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert find_target("one").fingerprint(CPU) != first


def test_a_models_own_code_and_ours_decide_its_answers(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code in the model's folder that is changed, or a newer version of this package, is another model."""
    (base / "modeling_own.py").write_text("x = 1\n")
    first = find_target("llama").fingerprint(CPU)
    (base / "modeling_own.py").write_text("x = 2\n")
    second = find_target("llama").fingerprint(CPU)
    assert second != first
    monkeypatch.setattr("qlora_cli.benchmarking.fingerprint.__version__", "99")
    assert find_target("llama").fingerprint(CPU) != second


def test_facts_are_for_a_results_file(here: Path) -> None:
    """What was scored, without the folders of whoever scored it."""
    merge_run(here)
    facts = find_target("run").facts()
    assert json.loads(json.dumps(facts)) == facts
    assert str(here) not in json.dumps(facts)
    assert (facts["target"], facts["base_model"]) == ("run", "llama")
    for folder, name in (("run", "run"), ("llama", "llama")):  # from inside it is still called what it is
        os.chdir(here / folder)
        assert find_target(".").facts()["target"] == name
    assert facts["storage"] == "NF4, double quantisation, float32 compute"
    assert len(facts["adapter_sha256"]) == 64
