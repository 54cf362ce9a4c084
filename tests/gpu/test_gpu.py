"""On a CUDA device: the same promises as on a CPU, and the ones that only a GPU can keep.

Everything here is tiny: the paged state of the largest test is a few MB.
"""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from accelerate.state import AcceleratorState

from qlora_cli.errors import Interrupted
from qlora_cli.model.adapter import save_adapter
from qlora_cli.model.base import choose_device, load_base
from qlora_cli.model.inject import inject
from qlora_cli.model.lora import LoRALinear, lora_layers
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import LoraSection, QuantizationSection, Recipe, TrainingSection
from qlora_cli.training import run as run_module
from qlora_cli.training.events import Event, StepDone
from qlora_cli.training.optim import build_optimizer, page_again
from qlora_cli.training.run import train
from tests.support.models import FAMILIES, save_tiny_model
from tests.support.runs import read_metrics, tiny_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _cuda() -> torch.device:
    return torch.device("cuda", 0)


def _gpu_recipe(folder: Path, **changes: Any) -> Recipe:
    changes["training"] = {"device": "cuda"} | changes.get("training", {})
    return tiny_recipe(folder, **changes)


def test_auto_takes_the_gpu() -> None:
    """`device: auto` is the GPU where there is one; `cpu` stays the CPU."""
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_layer_is_pefts_on_the_gpu(quant_type: str, double_quant: bool) -> None:
    """Output and gradients over a Linear4bit, float32 compute without TF32, to 1e-5 of the largest entry."""
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(
        256, 128, bias=True, compute_dtype=torch.float32, compress_statistics=double_quant, quant_type=quant_type
    ).to(_cuda())
    ours = LoRALinear(base, rank=8, alpha=16, dropout=0.0, compute_dtype=torch.float32)
    torch.nn.init.normal_(ours.lora_A, std=0.1)
    torch.nn.init.normal_(ours.lora_B, std=0.1)
    holder = torch.nn.Module()
    holder.proj = base
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["proj"])
    theirs = peft.inject_adapter_in_model(config, holder).proj
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.copy_(ours.lora_B)
    x = torch.randn(4, 9, 256, device=_cuda())
    upstream = torch.randn(4, 9, 128, device=_cuda())
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out_ours, out_theirs = ours(x_ours), theirs(x_theirs)
    out_ours.backward(upstream)
    out_theirs.backward(upstream)
    pairs = [
        (out_ours, out_theirs),
        (x_ours.grad, x_theirs.grad),
        (ours.lora_A.grad, theirs.lora_A["default"].weight.grad),
        (ours.lora_B.grad, theirs.lora_B["default"].weight.grad),
    ]
    for got, wanted in pairs:
        assert ((got - wanted).abs().max() / wanted.abs().max()).item() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_on_the_gpu(family: str, tmp_path: Path) -> None:
    """NF4, double quantisation, bfloat16, checkpointing, paged AdamW: the held-out loss falls."""
    recipe = _gpu_recipe(
        tmp_path, family=family, quantization={"compute_dtype": "bfloat16"}, training={"max_steps": 24}
    )
    finished = train(recipe)
    assert finished.first_eval_loss is not None
    assert finished.last_eval_loss is not None
    assert finished.last_eval_loss < finished.first_eval_loss - 0.2
    # The tiny models and their activations are a few MB; the rest is cuBLAS' workspace.
    assert 1e5 < finished.peak_memory_bytes < 5e8


def test_gpu_losses_are_the_cpus(tmp_path: Path) -> None:
    """float32 compute: the losses of 8 steps on both devices agree to 1e-3; they start from the same A."""
    recipe = _gpu_recipe(tmp_path, training={"optimizer": "adamw_torch"})
    losses = {}
    for device in ("cuda", "cpu"):
        data = recipe.model_dump(exclude_unset=True)
        data["training"]["device"] = device
        data["output_dir"] = str(tmp_path / device)
        train(Recipe.model_validate(data))
        AcceleratorState._reset_state(reset_partial_state=True)  # one process has one device otherwise
        losses[device] = [record["loss"] for record in read_metrics(tmp_path / device, "train")]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_8bit"])
def test_paged_state_is_paged_and_stays_so(name: str) -> None:
    """State of a large parameter is in pageable memory, also after it was restored, and the next step is the same."""
    section = TrainingSection.model_validate({"optimizer": name})
    torch.manual_seed(0)
    start, gradients = torch.randn(512, 512, device=_cuda()), torch.randn(2, 512, 512, device=_cuda())
    parameter = torch.nn.Parameter(start.clone())
    optimizer = build_optimizer(section, [parameter], _cuda())
    parameter.grad = gradients[0].clone()
    optimizer.step()
    assert optimizer.state[parameter]["state1"].is_paged
    copy = torch.nn.Parameter(parameter.detach().clone())
    restored = build_optimizer(section, [copy], _cuda())
    restored.load_state_dict(optimizer.state_dict())
    page_again(restored)
    assert restored.state[copy]["state1"].is_paged
    for each, owner in ((parameter, optimizer), (copy, restored)):
        each.grad = gradients[1].clone()
        owner.step()
    assert torch.equal(parameter, copy)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_a_resumed_gpu_run_ends_in_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    """Stopped after 3 of 6 steps and gone on with, with dropout: the adapter of the run that was never stopped. At
    these lengths the GPU's attention has no atomic additions, whose order is open; what long rows need is not shown."""
    changes = {"lora": {"dropout": 0.1, "rank": 64}, "training": {"optimizer": optimizer, "max_steps": 6}}

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    digests = []
    for name in ("whole", "stopped"):
        recipe = _gpu_recipe(tmp_path, **changes).model_copy(update={"output_dir": str(tmp_path / name)})
        if name == "stopped":
            with pytest.raises(Interrupted):
                train(recipe, listeners=[stop])
            train(recipe, resume=True)
        else:
            train(recipe)
        digests.append(hashlib.sha256((tmp_path / name / "adapter/adapter_model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]


def test_a_resumed_run_keeps_its_state_paged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2048 makes each A large enough to page (1e5 values): before and after --resume the state is in pages."""
    built: list[torch.optim.Optimizer] = []

    def spy(*args: Any) -> torch.optim.Optimizer:
        built.append(build_optimizer(*args))
        return built[-1]

    monkeypatch.setattr(run_module, "build_optimizer", spy)
    recipe = _gpu_recipe(tmp_path, lora={"rank": 2048, "target_modules": ["q_proj"]}, training={"max_steps": 2})
    train(recipe)
    data = recipe.model_dump(exclude_unset=True)
    data["training"]["max_steps"] = 4
    train(Recipe.model_validate(data), resume=True)
    for optimizer in built:
        large = [state for parameter, state in optimizer.state.items() if parameter.numel() >= 1e5]
        assert large
        assert all(state[name].is_paged for state in large for name in ("state1", "state2"))


def test_peft_reads_a_gpu_adapter(tmp_path: Path) -> None:
    """Logits over the same NF4 base agree within bf16 noise: a few units in the last place of the largest logit."""
    base = save_tiny_model(tmp_path / "base")
    model = load_base(ModelSource(str(base)), QuantizationSection(), _cuda())
    inject(model, LoraSection(rank=4), compute_dtype=torch.bfloat16, seed=0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    (tmp_path / "adapter").mkdir()
    save_adapter(model.eval(), tmp_path / "adapter", ModelSource(str(base)))
    theirs = peft.PeftModel.from_pretrained(
        load_base(ModelSource(str(base)), QuantizationSection(), _cuda()), tmp_path / "adapter"
    ).eval()
    ids = torch.arange(5, 29, device=_cuda()).reshape(2, 12)
    with torch.no_grad():
        ours_logits, theirs_logits = model(input_ids=ids).logits.float(), theirs(input_ids=ids).logits.float()
    scale = theirs_logits.abs().max()
    assert ((ours_logits - theirs_logits).abs().max() / scale).item() < 8 * torch.finfo(torch.bfloat16).eps


def test_nothing_large_is_kept_on_the_gpu() -> None:
    """Between the passes a layer holds its input, x Aᵀ and no dequantised weight."""
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(1024, 4096, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to(_cuda())
    layer = LoRALinear(base, rank=8, alpha=16, dropout=0.0, compute_dtype=torch.bfloat16)
    x = torch.randn(64, 1024, dtype=torch.bfloat16, device=_cuda(), requires_grad=True)
    layer(x).sum().backward()  # cuBLAS takes its workspace at the first product
    before = torch.cuda.memory_allocated()
    out = layer(x)
    held = torch.cuda.memory_allocated() - before
    output_bytes = out.numel() * out.element_size()
    # The weight alone would be 8 MB; x Aᵀ is 1 kB, and the allocator rounds each block up to 512 bytes.
    assert held <= output_bytes + 64 * 8 * 2 + 4096
