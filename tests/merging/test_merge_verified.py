"""Merges that are measured: of a run in 4 bits, of every kind of adapter, and of adapters that do nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from qlora_cli.errors import MergeError
from qlora_cli.merging.card import card_of
from qlora_cli.merging.events import Event, Measured, Merged, Planned, Written
from qlora_cli.merging.merge import merge
from qlora_cli.merging.plan import make_plan
from qlora_cli.merging.request import MergeRequest
from qlora_cli.model.adapter import load_adapter
from qlora_cli.model.base import load_base
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection, Recipe
from qlora_cli.training.events import Notice
from qlora_cli.training.run import train
from tests.support.merges import (
    Bases,
    adapt,
    load_model,
    merge_adapter,
    model_logits,
    read_config,
    save_masked_model,
    stored_tensors,
)
from tests.support.models import TASK_TYPES
from tests.support.peft_adapters import WEIGHTS, save_peft_adapter
from tests.support.runs import read_metrics, tiny_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Of a run that has learned something, over NF4 with double quantisation."""
    folder = tmp_path_factory.mktemp("run")
    recipe = tiny_recipe(folder, training={"max_steps": 24})
    train(recipe)
    return recipe


def test_both_bases_are_measured(recipe: Recipe, tmp_path: Path) -> None:
    """On the rows that the run held out: merged onto what training had, the model is the trained one to rounding; the
    original weights are off by what 4 bits cost. The lower loss is kept, and table, report and README say so."""
    events: list[Event] = []
    output, run = tmp_path / "merged", Path(recipe.output_dir)
    merged = merge(MergeRequest(adapter=run, output=output, device="cpu"), listeners=[events.append])
    found = merged.report.verification
    assert found is not None
    assert (found.rows, found.held_out) == ("8 validation rows of the run", True)
    evaluated = [record["eval_loss"] for record in read_metrics(run, "eval")]
    assert found.reference.trained_loss == pytest.approx(evaluated[-1], abs=1e-4)
    assert found.reference.base_loss == pytest.approx(evaluated[0], abs=1e-4)
    exact, original = found.merges["dequantized"], found.merges["original"]
    assert exact.mean_kl < 1e-6
    assert exact.top1_agreement == 1
    assert exact.loss == pytest.approx(found.reference.trained_loss, abs=1e-4)
    assert 1e-6 < original.mean_kl < found.reference.effect
    losses = {name: fidelity.loss for name, fidelity in found.merges.items()}
    assert found.winner == merged.report.merged_onto == min(losses, key=lambda name: losses[name])
    report = json.loads((output / "merge_report.json").read_text())
    assert report["merged_onto"] == found.winner
    assert report["verification"]["merges"]["dequantized"]["mean_kl"] == exact.mean_kl
    assert 0 <= report["verification"]["mean_kl_of_rounding"] < 1e-6  # float32
    assert "| merged onto the original weights |" in (output / "README.md").read_text().replace("**", "")
    assert [event.what for event in events if isinstance(event, Measured)] == ["original", "dequantized"]
    assert isinstance(events[-1], Merged)
    planned = next(event for event in events if isinstance(event, Planned))
    assert planned.onto == ("original", "dequantized")
    assert sum(event.bytes for event in events if isinstance(event, Written)) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def test_it_writes_what_the_trained_model_writes(recipe: Recipe, tmp_path: Path) -> None:
    """Plain transformers on the merged folder alone gives the text that base in 4 bits and adapter give."""
    run = Path(recipe.output_dir)
    merge_adapter(run, tmp_path / "merged", base="dequantized")
    trained = load_base(ModelSource(recipe.base_model), recipe.quantization, CPU)
    load_adapter(trained, run / "adapter", compute_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "green green"}], add_generation_prompt=True, return_tensors="pt"
    )
    written = [
        model.eval().generate(**text, max_new_tokens=24, do_sample=False)
        for model in (trained, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    ]
    assert torch.equal(*written)


@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_down_again(form: str, recipe: Recipe, tmp_path: Path) -> None:
    """In 4 bits once more: what transformers makes of the merged folder, tensor by tensor, with its own measure."""
    run = Path(recipe.output_dir)
    merged = merge_adapter(run, tmp_path / "4", base="original", quantize=form, verify=True, verify_rows=4)
    merge_adapter(run, tmp_path / "16", base="original")
    section = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=form,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = load_model(tmp_path / "16", quantization_config=section)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = stored_tensors(tmp_path / "4"), stored_tensors(tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert torch.equal(model_logits(load_model(tmp_path / "4")), model_logits(theirs))
    report, found = merged.report, merged.report.verification
    assert report.quantized == f"{form.upper()} with double quantisation"
    assert found is not None
    # Rounding again costs more than nothing.
    assert found.quantized["original"].mean_kl > 1e-6
    assert found.quantized["original"].mean_kl != found.merges["original"].mean_kl
    assert "| original, in 4 bits again |" in (tmp_path / "4" / "README.md").read_text()
    written = json.loads((tmp_path / "4" / "merge_report.json").read_text())
    assert written["verification"]["quantized"]["original"]["mean_kl"] == found.quantized["original"].mean_kl


def test_both_merges_are_rounded_again(recipe: Recipe, tmp_path: Path) -> None:
    """With `auto`, what is kept is the better one of what is stored, in 4 bits, whatever was better before that; what
    was dequantised is on the grid of 4 bits, and rounding to it again takes a part of the adapter away."""
    merged = merge_adapter(Path(recipe.output_dir), tmp_path / "4", base="auto", quantize="nf4", verify=True)
    found = merged.report.verification
    assert found is not None
    assert set(found.quantized) == {"original", "dequantized"}
    passed = {name: each.loss for name, each in found.quantized.items() if name not in found.refused}
    assert found.winner == merged.report.merged_onto == min(passed, key=lambda name: passed[name] or 0.0)
    kept = found.quantized["dequantized"].effect_kept
    assert kept is not None
    assert kept < (found.merges["dequantized"].effect_kept or 0.0)
    assert not any(path.name.startswith(".") for path in (tmp_path / "4").iterdir())


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora, Conv1D": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}),
    "saved modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    "saved in 4 bits": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["o_proj"]}),
    "all biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "biases of B": ("opt", {"target_modules": ["q_proj", "fc1", "fc2"], "lora_bias": True}),
    "embeddings": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "tied head": ("gemma", {"target_modules": ["lm_head", "q_proj"]}),
    "some tokens": ("gemma", {"target_modules": ["q_proj"], "trainable_token_indices": [60, 70, 80, 90, 100]}),
    "rslora": ("gpt_neox", {"target_modules": ["dense"], "use_rslora": True}),
    "qwen2": ("qwen2", {"target_modules": ["v_proj", "down_proj"]}),
    "bert": ("bert", {"target_modules": ["query"]}),
    "roberta": ("roberta", {"target_modules": ["query", "dense"]}),
    "t5": ("t5", {"target_modules": ["q", "wo"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_verified(kind: str, bases: Bases, tmp_path: Path) -> None:
    """What the comparison takes for the trained model, a base in 4 bits and an adapter from elsewhere beside it, is
    what was merged onto the same weights, but for rounding."""
    family, settings = KINDS[kind]
    adapter = adapt(bases[family], tmp_path / "adapter", task=TASK_TYPES.get(family, "CAUSAL_LM"), **settings)
    options = {"base": "dequantized", "trained_base": "nf4-double", "verify": True, "verify_rows": 2}
    found = merge_adapter(adapter, tmp_path / "merged", **options).report.verification
    assert found is not None
    assert found.reference.effect > 1e-5
    assert found.merges["dequantized"].mean_kl < 1e-3 * found.reference.effect
    assert found.merges["dequantized"].effect_kept == pytest.approx(1, abs=1e-2)
    assert not found.refused


def test_a_module_with_parameters_beside_its_layers_is_verified(tmp_path: Path) -> None:
    """BERT's head has a bias of its own and a layer that is changed as well: both are in the trained model."""
    settings = {"task": None, "bias": "all", "target_modules": ["query"]}
    adapter = adapt(save_masked_model(tmp_path / "base"), tmp_path / "adapter", **settings)
    options = {"base": "dequantized", "trained_base": "nf4", "verify": True, "verify_rows": 2}
    found = merge_adapter(adapter, tmp_path / "merged", **options).report.verification
    assert found is not None
    assert found.merges["dequantized"].mean_kl < 1e-3 * found.reference.effect


# Families over which each kind of head is trained: over the plain layers of a language model, or in place of another.
HEADS = {
    "labels, over a language model": ("opt", AutoModelForSequenceClassification, "SEQ_CLS", {"num_labels": 5}),
    "more labels than the base has": ("bert", AutoModelForSequenceClassification, "SEQ_CLS", {"num_labels": 5}),
    "fewer labels": ("bert", AutoModelForSequenceClassification, "SEQ_CLS", {"num_labels": 2}),
    "labels of tokens": ("bert", AutoModelForTokenClassification, "TOKEN_CLS", {"num_labels": 5}),
    # Its head would be in 4 bits in training, if the base had one.
    "answers": ("opt", AutoModelForQuestionAnswering, "QUESTION_ANS", {}),
    "features": ("bert", AutoModel, "FEATURE_EXTRACTION", {}),
}


@pytest.mark.parametrize("head", HEADS)
def test_models_with_another_head_are_verified(head: str, bases: Bases, tmp_path: Path) -> None:
    """Set against a base that has no such head, with both merges measured; nothing is refused for what a base lacks."""
    family, automatic, task, labels = HEADS[head]
    model = automatic.from_pretrained(bases[family], ignore_mismatched_sizes=True, **labels)
    targets = {"opt": ["fc1", "v_proj"], "bert": ["query"]}[family]
    config = peft.LoraConfig(r=4, lora_alpha=10, task_type=task, target_modules=targets)
    adapter = save_peft_adapter(model, tmp_path / "adapter", config)
    found = merge_adapter(
        adapter, tmp_path / "merged", trained_base="nf4-double", verify=True, verify_rows=2
    ).report.verification
    assert found is not None
    assert found.merges["dequantized"].mean_kl < 1e-3 * found.reference.effect
    assert not found.refused
    written = automatic.from_pretrained(tmp_path / "merged")
    assert written.config.num_labels == model.config.num_labels
    assert type(written) is type(model)


def _scale(adapter: Path, factor: float) -> None:
    """Multiply every B of an adapter."""
    tensors = load_file(adapter / WEIGHTS)
    scaled = {name: tensor * factor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(scaled, adapter / WEIGHTS)


def test_an_adapter_that_does_nothing_is_refused(bases: Bases, tmp_path: Path) -> None:
    """B is zero, as before training: every weight is named before anything is written, unless it is what is wanted."""
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj", "k_proj", "v_proj"])
    _scale(adapter, 0)
    with pytest.raises(MergeError) as caught:
        merge_adapter(adapter, tmp_path / "merged")
    layers = [f"  model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "kqv"]
    shown = "\n".join(layers[:5])
    assert str(caught.value) == (
        f"{adapter}: A or B is zero, as before training. These weights would not change by a bit, 6 in all:\n{shown}\n"
        "  … and 1 more\n"
        "Is it the adapter that was meant, and was it trained? --allow-unchanged merges it all the same"
    )
    assert not (tmp_path / "merged").exists()
    merge_adapter(adapter, tmp_path / "merged", allow_unchanged=True, verify=True, verify_rows=2)
    before, after = stored_tensors(bases["llama"]), stored_tensors(tmp_path / "merged")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_effect_lost_in_rounding_is_refused(bases: Bases, tmp_path: Path) -> None:
    """Sums that round to what was there name the weights; nothing is left, unless it is what is wanted."""
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    _scale(adapter, 1e-9)
    with pytest.raises(MergeError) as caught:
        merge_adapter(adapter, tmp_path / "merged", dtype="bfloat16")
    assert str(caught.value) == (
        "what the adapter adds is lost in rounding in bfloat16. These weights would not change by a bit, 2 in all:\n"
        "  model.layers.0.self_attn.q_proj.weight\n"
        "  model.layers.1.self_attn.q_proj.weight\n"
        "Is it the adapter that was meant, and was it trained? --allow-unchanged merges it all the same"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    merge_adapter(adapter, tmp_path / "merged", dtype="bfloat16", allow_unchanged=True)
    assert read_config(tmp_path / "merged")["dtype"] == "bfloat16"


def test_an_effect_that_is_not_in_the_outputs_is_refused(bases: Bases, tmp_path: Path) -> None:
    """Every weight changes by a bit or more, and yet no token's probability does: the comparison sees it."""
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    _scale(adapter, 3e-4)
    options = {"base": "dequantized", "trained_base": "nf4", "dtype": "bfloat16", "verify": True, "verify_rows": 2}
    with pytest.raises(MergeError, match=r"^merged onto the dequantized weights: the merged model cannot be told from"):
        merge_adapter(adapter, tmp_path / "merged", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    events: list[Event] = []
    request = MergeRequest(adapter=adapter, output=tmp_path / "merged", device="cpu", allow_unchanged=True, **options)
    report = merge(request, listeners=[events.append]).report
    assert report.verification is not None
    assert list(report.verification.refused) == ["dequantized"]
    assert any("cannot be told from its base" in event.text for event in events if isinstance(event, Notice))


def test_what_was_changed_has_to_be_read(bases: Bases, tmp_path: Path) -> None:
    """A client may pass over what it passes over in the base, but no weight that has the adapter in it."""
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    plan = make_plan(MergeRequest(adapter=adapter, output=tmp_path / "merged"))
    assert "model.layers.0.self_attn.k_proj.weight" in plan.unchanged
    assert "model.layers.0.self_attn.q_proj.weight" not in plan.unchanged


@pytest.mark.parametrize(
    ("quantization", "exact"),
    [
        ({"bits": 16, "compute_dtype": "float32"}, True),
        ({"bits": 16, "compute_dtype": "bfloat16"}, False),
        ({"compute_dtype": "float32"}, False),
    ],
)
def test_whether_training_had_the_original_weights(
    quantization: dict[str, Any], exact: bool, bases: Bases, tmp_path: Path
) -> None:
    """float32 weights that training rounded to bfloat16 are not those that it had, as little as 4 bits are."""
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    plan = make_plan(MergeRequest(adapter=adapter, output=tmp_path / "merged"))
    section = QuantizationSection.model_validate(quantization)
    assert replace(plan, source=replace(plan.source, quantization=section)).trained_over_originals == exact


def test_leave_to_run_code_is_asked_only_where_there_is_some(bases: Bases, tmp_path: Path) -> None:
    """A recipe may give it to a model that has no code of its own: whoever loads the merged one need not."""
    adapter = adapt(bases["llama"], tmp_path / "adapter", target_modules=["q_proj"])
    made = merge_adapter(adapter, tmp_path / "merged")
    plan = make_plan(MergeRequest(adapter=adapter, output=tmp_path / "other"))
    trusting = replace(plan.source, base=replace(plan.source.base, trust_remote_code=True))
    assert not card_of(replace(plan, source=trusting), made.report, "merged").custom_code
