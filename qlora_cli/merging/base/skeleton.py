"""The model without its weights: what it has by which names, and which stored tensor is which of its parameters.

Built on the meta device, by transformers itself; so is the choice of what is in 4 bits, and the renaming of what is
stored. Nothing of the base but its configuration is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from qlora_cli.errors import ModelError
from qlora_cli.merging.adapters.changes import Kind
from qlora_cli.merging.base.packed import STATE
from qlora_cli.model.quantization import bitsandbytes_config
from qlora_cli.model.source import ModelSource, load_config, reading
from qlora_cli.model.storage import check_stored_quantization
from qlora_cli.recipe.schema import QuantizationSection

# The type that the model is made in: what has another one all the same is to have it.
_NARROW = torch.bfloat16

# PEFT's task types, and the model each is trained as.
_TASKS: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}


@dataclass(frozen=True)
class Skeleton:
    """A model's names and shapes.

    Attributes:
        architecture: the model's class.
        shapes: of every parameter and stored buffer by the model's names, each of several tied names too. A weight that
            training holds in 4 bits has the shape that it has without (Conv1D's: [in, out]).
        kinds: what every module is, by its path, each of several paths of a shared one too.
        ties: names that are one and the same tensor.
        optional: names of what transformers makes itself where files lack it.
        float32_under: by name, the types of model in which transformers holds this in float32 all the same.
        quantized: modules whose weight is in 4 bits in training.
        input_embedding, output_embedding: paths of these modules, None where there is none.
    """

    architecture: str
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, Kind]
    ties: tuple[frozenset[str], ...]
    optional: frozenset[str]
    float32_under: Mapping[str, frozenset[torch.dtype]]
    quantized: frozenset[str]
    input_embedding: str | None
    output_embedding: str | None
    _prefix: str = field(repr=False)  # what a model with a head puts before the names of the one without
    _renamings: Sequence[WeightRenaming] = field(repr=False, compare=False)
    _converters: Sequence[WeightConverter] = field(repr=False, compare=False)

    def stored_names(self, names: Iterable[str]) -> dict[str, str | None]:
        """The model's name of each stored tensor, as transformers' loader renames them.

        The parts of a weight that is stored in 4 bits get the weight's name and their suffix, as in
        `….q_proj.weight.absmax`. None is what the loader passes over (such as `rotary_emb.inv_freq`), and what it does
        not take as it is: see `combined`.
        """
        return {name: self._model_name(name) for name in names}

    def combined(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Of the stored tensors, those that the loader fuses, splits or reorders, with the parameters they go into."""
        found = {}
        for name in names:
            renamed, converter = self._rename(name)
            if converter is not None and renamed in self.shapes:
                first, *others = converter.target_patterns
                found[name] = (renamed, *(renamed.replace(first, other) for other in others))
        return found

    def module(self, path: str) -> str | None:
        """The path of the module that an adapter calls `path`; None where the model has none of that name.

        An adapter that was trained with an earlier version of transformers, or on the model without its head, has other
        names for the same modules.
        """
        if path in self.kinds:
            return path
        renamed, converter = self._rename(f"{path}.weight")
        if converter is not None:
            return None
        renamed = renamed.removesuffix(".weight")
        candidates = (renamed, f"{self._prefix}.{renamed}", renamed.removeprefix(f"{self._prefix}."))
        return next((candidate for candidate in candidates if candidate in self.kinds), None)

    def _model_name(self, name: str) -> str | None:
        if (state := STATE.fullmatch(name)) and name not in self.shapes:
            weight = self._model_name(state["weight"])
            return f"{weight}.{state['part']}" if weight else None
        renamed, converter = self._rename(name)
        return renamed if converter is None and renamed in self.shapes else None

    def _rename(self, name: str) -> tuple[str, WeightConverter | None]:
        """The name after renaming, and what fuses or splits the tensor, if anything does."""
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.shapes)
        if renamed not in self.shapes and name in self.shapes:
            # The loader does the same: what is there under its own name was not meant by a renaming.
            renamed, pattern = rename_source_key(name, [], [], self._prefix, self.shapes)
        if pattern is None:
            return renamed, None
        return renamed, next(each for each in self._converters if pattern in each.source_patterns)


def build_skeleton(
    base: ModelSource,
    task_type: str | None,
    quantization: QuantizationSection,
    *,
    config_changes: Mapping[str, Any] | None = None,
) -> Skeleton:
    """The model that an adapter was trained on, without its weights.

    Args:
        base: where its configuration is.
        task_type: PEFT's, such as `CAUSAL_LM` or `SEQ_CLS`; None is what the configuration's `architectures` says, a
            causal language model where that says nothing. So is `CAUSAL_LM` where transformers has no such model.
        quantization: how its weights were stored in training.
        config_changes: what the trained model has otherwise than the base, such as `num_labels` or `vocab_size`.

    Raises:
        ModelError: if the task is unknown, the base has no such model, or its weights are stored otherwise.
        HubUnreachableError: if it is on the hub and that gives no answer.
    """
    if task_type is not None and task_type not in _TASKS:
        raise ModelError(f"task_type: expected one of {', '.join(_TASKS)}, got {task_type}")
    config = load_config(base)
    for name, value in (config_changes or {}).items():
        # The vocabulary of a model that also sees or hears is that of its language model.
        holder = config if hasattr(config, name) else config.get_text_config()
        # As a client will read it: some configurations do not take every value (T5's embeddings are always tied).
        read = type(holder).from_dict({**holder.to_dict(), name: value})
        setattr(holder, name, getattr(read, name))
    check_stored_quantization(getattr(config, "quantization_config", None), quantization)
    with reading("model", base), torch.device("meta"):
        model = _build(config, task_type, base)
    return _describe(model, quantization)


def _build(config: PreTrainedConfig, task_type: str | None, base: ModelSource) -> PreTrainedModel:
    model: PreTrainedModel
    # Attention needs no weights; the kernel that the configuration asks for may not be here.
    config._attn_implementation = "eager"
    # Models that also see or hear are often adapted as CAUSAL_LM, and have a class that is none of those.
    unheard_of = task_type == "CAUSAL_LM" and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    if (task_type is None or unheard_of) and not base.trust_remote_code:
        architecture = next(iter(config.architectures or ()), "")
        known = getattr(transformers, architecture, None)
        if isinstance(known, type) and issubclass(known, PreTrainedModel):
            named: Any = known
            model = named._from_config(config, dtype=_NARROW)
            return model
    automatic = _TASKS[task_type or "CAUSAL_LM"]
    model = automatic.from_config(config, dtype=_NARROW, trust_remote_code=base.trust_remote_code)
    return model


def _describe(model: PreTrainedModel, quantization: QuantizationSection) -> Skeleton:
    transforms = get_model_conversion_mapping(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    kinds = {path: _kind(module) for path, module in model.named_modules(remove_duplicate=False) if path}
    described = {
        "architecture": type(model).__name__,
        "shapes": shapes,
        "kinds": kinds,
        "ties": _ties(model),
        "optional": _named(shapes, model._keys_to_ignore_on_load_missing or ()),
        "float32_under": _float32_under(model),
        "input_embedding": _path_of(model, model.get_input_embeddings),
        "output_embedding": _path_of(model, model.get_output_embeddings),
        "_prefix": model.base_model_prefix,
        "_renamings": [each for each in transforms if isinstance(each, WeightRenaming)],
        "_converters": [each for each in transforms if isinstance(each, WeightConverter)],
    }
    # Last: it puts other modules in place of those that are described.
    return Skeleton(**described, quantized=_quantized(model, shapes, quantization))


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else "other"


def _ties(model: nn.Module) -> tuple[frozenset[str], ...]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(frozenset(tied) for tied in names.values() if len(tied) > 1)


def _named(names: Iterable[str], patterns: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in names if any(re.search(pattern, name) for pattern in patterns))


def _float32_under(model: PreTrainedModel) -> dict[str, frozenset[torch.dtype]]:
    tensors = model.state_dict()
    # Made in float32, though the model was to be narrower.
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        # The loader takes each for an expression in which * is any text.
        patterns = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
        found[dtype] = wide | _named(tensors, patterns)
    return {name: frozenset(dtype for dtype, names in found.items() if name in names) for name in tensors}


def _path_of(model: nn.Module, ask: Any) -> str | None:
    with suppress(NotImplementedError):  # an architecture that has none, or does not tell
        wanted = ask()
        return next((path for path, module in model.named_modules() if path and module is wanted), None)
    return None


def _quantized(model: PreTrainedModel, names: Iterable[str], quantization: QuantizationSection) -> frozenset[str]:
    """The modules that transformers makes 4-bit layers of, which it does here with those of `model`."""
    stored = getattr(model.config, "quantization_config", None)
    wanted = stored or bitsandbytes_config(quantization)
    if wanted is None:
        return frozenset()
    quantizer = AutoHfQuantizer.from_config(wanted, pre_quantized=stored is not None)
    quantizer.preprocess_model(model, device_map={"": "cpu"})
    return frozenset(name.rpartition(".")[0] for name in names if quantizer.param_needs_quantization(model, name))
