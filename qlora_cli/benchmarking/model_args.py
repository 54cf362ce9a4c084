"""A target as lm-eval's command line would name it, for tools that look for it there in a results file."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_cli.benchmarking.target import Target


def model_args(target: Target) -> str:
    """What `--model_args` of its `hf` backend would say: `pretrained=org/base,peft=run,dtype=bfloat16`.

    No folder in it tells whose machine it was, and a comma in a name, which would end it, is an underscore.
    """
    facts = target.facts()
    told = {
        "pretrained": model_name(target) if target.adapter is None else facts["base_model"],
        "peft": None if target.adapter is None else model_name(target),
        "revision": target.base.revision,
        "dtype": target.form.compute_dtype,
        **dict(_quantization(target)),
    }
    return ",".join(f"{name}={str(value).replace(',', '_')}" for name, value in told.items() if value is not None)


def model_name(target: Target) -> str:
    """A hub name, or what the folder is called; a checkpoint is called by its run."""
    if target.kind == "hub model":
        return target.base.name
    step = None if target.adapter is None else target.adapter.step
    return target.called if step is None else f"{target.called}/checkpoints/step-{step:06d}"


def _quantization(target: Target) -> Iterator[tuple[str, str | bool]]:
    form = target.form
    if form.bits == 8:
        yield "load_in_8bit", True
    if form.bits == 4:
        yield "load_in_4bit", True
        yield "bnb_4bit_quant_type", form.quant_type
        yield "bnb_4bit_use_double_quant", form.double_quant
        yield "bnb_4bit_compute_dtype", form.compute_dtype
