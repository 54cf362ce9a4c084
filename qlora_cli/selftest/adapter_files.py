"""An adapter that is saved and loaded again is the adapter that was saved."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from qlora_cli.model.adapter import adapter_tensors, load_adapter, save_adapter
from qlora_cli.model.base import load_base
from qlora_cli.model.source import ModelSource
from qlora_cli.model.storage import compute_dtype
from qlora_cli.selftest.events import Measured
from qlora_cli.selftest.lora_model import lora_model
from qlora_cli.selftest.workbench import Workbench

_TOKENS = 48


def check_adapter_files(bench: Workbench) -> Measured:
    """Save random LoRA layers, load them onto the base read anew, and compare every bit of tensors and logits."""
    recipe = bench.recipe("adapter-files", rows=1)
    source = ModelSource(recipe.base_model)
    saved = lora_model(recipe, bench.device)
    folder = bench.folder / "adapter-files"
    folder.mkdir()
    save_adapter(saved, folder, source)
    loaded = load_base(source, recipe.quantization, bench.device)
    load_adapter(loaded, folder, compute_dtype=compute_dtype(recipe.quantization))

    wanted, got = adapter_tensors(saved), adapter_tensors(loaded)
    changed = [key for key in wanted.keys() | got.keys() if not _same_bits(wanted.get(key), got.get(key))]
    off = float((_logits(loaded) - _logits(saved)).abs().max())
    return Measured(
        not changed and off == 0,
        figure={"changed tensors": len(changed), "logits": off},
        bound={"changed tensors": 0, "logits": 0.0},
        detail=f"saved, and loaded onto the base read anew: {len(changed)} of {len(wanted)} tensors have other bits, "
        f"and the logits of {_TOKENS} tokens differ by {off:.1g} at most",
    )


def _same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Bits, not values: 0 and -0 are two things, and NaN may be one."""
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _logits(model: PreTrainedModel) -> torch.Tensor:
    """Float32 [tokens, vocabulary] of random tokens, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, _TOKENS), generator=generator).to(model.device)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return logits[0].float().cpu()
