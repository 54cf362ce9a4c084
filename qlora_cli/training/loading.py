"""From the sections of a recipe to what a loop trains: rows and a model."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.data.units import make_units
from qlora_cli.model.base import checkpoint_activations, load_base
from qlora_cli.model.inject import inject
from qlora_cli.model.lora import lora_parameters
from qlora_cli.model.packing import prepare_packing
from qlora_cli.model.quantization import measure_storage
from qlora_cli.model.source import load_config
from qlora_cli.model.storage import compute_dtype, describe_storage
from qlora_cli.recipe.schema import DatasetSection, LoraSection, QuantizationSection
from qlora_cli.training.context import RunContext
from qlora_cli.training.doubts import doubts
from qlora_cli.training.events import EncodingProgress, ModelReady, Notice, Stage
from qlora_cli.training.loop_parts import LoopData
from qlora_cli.training.preparation import prepare


def load_data(run: RunContext, section: DatasetSection, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> LoopData:
    """The rows of the recipe, encoded; what is doubtful about them is said.

    Raises what `preparation.prepare` raises.
    """
    config = load_config(run.source)
    run.emit(Stage("reading and encoding the rows"))
    train, validation = prepare(
        section,
        tokenizer,
        config,
        seed=seed,
        today=run.record.started_on,
        report=lambda progress: run.emit(EncodingProgress(*progress)),
    )
    for split in (train, validation):
        if split is not None:
            run.emit(split.ready())
    for doubt in doubts(train, validation, section, tokenizer):
        run.emit(Notice(doubt))
    pad_token_id = int(tokenizer.pad_token_id or 0)
    pack_to = section.pack_to
    held_out = None if validation is None else make_units(validation.kept, pack_to, seed)
    return LoopData(make_units(train.kept, pack_to, seed), held_out, pad_token_id)


def load_model(
    run: RunContext,
    quantization: QuantizationSection,
    lora: LoraSection,
    *,
    seed: int,
    packed: bool,
    gradient_checkpointing: bool,
) -> PreTrainedModel:
    """The frozen base with LoRA layers on it, ready to train.

    Raises:
        ModelError: if it cannot be had, or not trained so.
        HubUnreachableError: if it is on the hub and that gives no answer.
    """
    run.emit(Stage(f"loading {run.source.name}"))
    model = load_base(run.source, quantization, run.accelerator.device)
    storage = measure_storage(model)
    targets = inject(model, lora, compute_dtype=compute_dtype(quantization), seed=seed)
    packing = prepare_packing(model) if packed else None
    if gradient_checkpointing:
        checkpoint_activations(model)
    run.emit(
        ModelReady(
            name=run.source.name,
            architecture=type(model).__name__,
            device=str(run.accelerator.device),
            storage=describe_storage(quantization),
            total_parameters=storage.parameters,
            trainable_parameters=sum(p.numel() for p in lora_parameters(model)),
            quantized_parameters=storage.quantized_parameters,
            bits_per_quantized_parameter=storage.bits_per_quantized_parameter,
            base_bytes=storage.bytes,
            adapted_layers=len(targets),
            packing=packing,
        )
    )
    return model
