"""On SmolLM2-135M-Instruct: what we train PEFT reads, what PEFT trains we read, and both score the same; so does what
is merged."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_cli.data.batches import collate
from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.units import row_units
from qlora_cli.merging.merge import merge
from qlora_cli.merging.request import MergeRequest
from qlora_cli.model.adapter import load_adapter
from qlora_cli.model.base import load_base
from qlora_cli.model.source import ModelSource, load_tokenizer
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import QuantizationSection, Recipe
from qlora_cli.training.run import train
from tests.support.encoded import encode_training_rows

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
CPU = torch.device("cpu")
HELD_OUT_ROWS = 8
TRAINING_ROWS = 16

pytestmark = [
    pytest.mark.real,
    # Processors without bfloat16 of their own take minutes for the steps that others take seconds for.
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (MODEL / "model.safetensors").exists(),
        reason=f"no demo model: python scripts/get_demo_model.py {MODEL.relative_to(ROOT)}",
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """Four steps of the shipped demo recipe, evaluated on 8 held-out rows: the shortest, which take a third of the time
    that any others do."""
    folder = tmp_path_factory.mktemp("smollm2")
    for name, count in (("train", TRAINING_ROWS), ("test", HELD_OUT_ROWS)):
        rows = (ROOT / f"recipes/data/gsm8k/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(sorted(rows, key=len)[:count]) + "\n", encoding="utf-8")
    changes = ["training.max_steps=4", "training.warmup_steps=0", "training.per_device_train_batch_size=2"]
    paths = [f"dataset.train={folder / 'train.jsonl'}", f"dataset.validation={folder / 'test.jsonl'}"]
    paths.append(f"output_dir={folder / 'run'}")
    recipe = load_recipe(ROOT / "recipes/smollm2-gsm8k.yaml", [*changes, *paths])
    train(recipe, rehearse=False)  # which takes as long as steps do
    return recipe, folder / "run"


@pytest.fixture(scope="module")
def held_out(run: tuple[Recipe, Path]) -> EncodedRows:
    recipe, _ = run
    section = recipe.dataset.model_copy(update={"train": recipe.dataset.validation})
    return encode_training_rows(section, load_tokenizer(ModelSource(recipe.base_model)))


def _base(recipe: Recipe, dtype: str = "bfloat16") -> PreTrainedModel:
    return load_base(ModelSource(recipe.base_model), QuantizationSection(compute_dtype=dtype), CPU)


@pytest.fixture(scope="module")
def our_losses(run: tuple[Recipe, Path], held_out: EncodedRows) -> torch.Tensor:
    """Per-token losses of the trained adapter on its base, both loaded here."""
    recipe, folder = run
    model = _base(recipe)
    load_adapter(model, folder / "adapter", compute_dtype=torch.bfloat16)
    return _token_losses(model, held_out)


@torch.no_grad()
def _token_losses(model: nn.Module, rows: EncodedRows, count: int = HELD_OUT_ROWS) -> torch.Tensor:
    """The loss of every supervised token of the first `count` rows, float32; plain logits and cross entropy."""
    model.eval()
    losses = []
    for start in range(0, count, 4):
        batch = collate(row_units(rows), range(start, start + 4), 0)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        targets = batch.labels[:, 1:]
        keep = targets != -100
        losses.append(nn.functional.cross_entropy(logits[keep].float(), targets[keep], reduction="none"))
    return torch.cat(losses)


def test_both_directions_agree_with_peft_within_bf16_noise(
    run: tuple[Recipe, Path], held_out: EncodedRows, our_losses: torch.Tensor, tmp_path: Path
) -> None:
    """Our adapter in PEFT, and the same adapter as PEFT saves it back here, over one NF4 base. The yardstick is the
    noise of bfloat16 itself: what PEFT's own losses move by between bfloat16 and float32 compute."""
    recipe, folder = run
    assert len(held_out) == HELD_OUT_ROWS
    assert len(our_losses) == held_out.supervised_tokens

    theirs = peft.PeftModel.from_pretrained(_base(recipe), folder / "adapter")
    their_losses = _token_losses(theirs, held_out)
    exact = peft.PeftModel.from_pretrained(_base(recipe, "float32"), folder / "adapter")
    noise = _token_losses(exact, held_out) - their_losses
    difference = our_losses - their_losses
    assert difference.abs().mean() <= 1.5 * noise.abs().mean()
    assert difference.abs().max() <= 2 * noise.abs().max()
    # Of the mean, what noise of that size comes to over so many tokens: three standard errors, about 0.01.
    assert difference.mean().abs() <= 3 * noise.std() / len(noise) ** 0.5

    theirs.save_pretrained(tmp_path / "from-peft")
    back = _base(recipe)
    load_adapter(back, tmp_path / "from-peft", compute_dtype=torch.bfloat16)
    first = _token_losses(back, held_out, count=4)
    assert torch.equal(first, our_losses[: len(first)])


def test_the_run_recorded_what_a_plain_computation_gives(
    run: tuple[Recipe, Path], held_out: EncodedRows, our_losses: torch.Tensor
) -> None:
    """The run's last held-out loss is the mean of the plain per-token losses, and lower than the base's."""
    recipe, folder = run
    before = _token_losses(_base(recipe), held_out).mean().item()
    after = our_losses.mean().item()
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    # Rows fall into other batches there, so that bfloat16 rounds differently: of the mean of so many tokens, three
    # standard errors of its noise are about 0.01.
    assert record["first_eval"]["eval_loss"] == pytest.approx(before, abs=1e-2)
    assert record["last_eval"]["eval_loss"] == pytest.approx(after, abs=1e-2)
    assert after < before - 0.1


def test_the_model_is_stored_as_the_paper_says(run: tuple[Recipe, Path]) -> None:
    """4.127 bits for each of the 106,168,320 weights of the linear layers; rank 16 on all of them trains 4,884,480."""
    record = json.loads((run[1] / "run.json").read_text(encoding="utf-8"))
    assert record["model"]["quantized_parameters"] == 106_168_320
    assert record["model"]["bits_per_quantized_parameter"] == pytest.approx(4.127, abs=1e-3)
    assert record["model"]["trainable_parameters"] == 4_884_480
    assert record["model"]["total_parameters"] == 134_515_008


def test_the_merged_model_is_the_trained_one(run: tuple[Recipe, Path], tmp_path: Path) -> None:
    """Both merges have the adapter's effect; onto what training had it is the trained model, to bfloat16. The
    embeddings stay tied, and plain transformers loads what is written."""
    _, folder = run
    request = MergeRequest(folder, tmp_path / "merged", device="cpu", verify_rows=4, base="auto")
    found = merge(request).report.verification
    assert found is not None
    assert not found.refused
    assert found.reference.effect > 0.01
    exact = found.merges["dequantized"]
    # Four short rows alone, and weights rounded to bfloat16.
    assert exact.loss == pytest.approx(found.reference.trained_loss, abs=5e-2)
    assert exact.mean_kl < 0.2 * min(found.merges["original"].mean_kl, found.reference.effect)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
