"""The model as it was trained: the base stored as it was then, and the adapter beside it, not merged into anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_cli.errors import ModelError
from qlora_cli.merging.adapters.changes import BiasUpdate, Change, LowRank
from qlora_cli.merging.adapters.reading import SUPPORTED, AdapterChanges, read_changes
from qlora_cli.merging.adapters.replacements import Replacement, TokenRows
from qlora_cli.merging.adapters.source import AdapterSource
from qlora_cli.merging.base.skeleton import Skeleton, build_skeleton
from qlora_cli.merging.fidelity.reference_layers import Beside, EmbeddingUpdate, LinearUpdate, with_parameters
from qlora_cli.model.adapter_config import read_adapter_config
from qlora_cli.model.base import load_base
from qlora_cli.model.lora import LoRALinear, adapters_disabled
from qlora_cli.model.quantization import frozen_weight
from qlora_cli.model.storage import StorageForm, compute_dtype


def trained_model(adapter: AdapterSource, device: torch.device, form: StorageForm | None = None) -> PreTrainedModel:
    """The base as it was stored in training, with the adapter on it, in eval mode; `adapter_off` takes it away.

    Args:
        form: how the base is stored now, if not as in training.

    Raises:
        ModelError: if the base or the adapter cannot be read, or they do not fit each other.
        HubUnreachableError: if the base is on the hub and that gives no answer.
    """
    return with_adapter(adapter, *_read(adapter), device, form)


def with_adapter(
    adapter: AdapterSource,
    skeleton: Skeleton,
    read: AdapterChanges,
    device: torch.device,
    form: StorageForm | None = None,
) -> PreTrainedModel:
    """The same for an adapter that was read before, and is known to fit.

    Args:
        skeleton: of its base.
        read: what it changes there.
        form: how the base is stored now, if not as in training.

    Raises:
        ModelError: if the base cannot be read.
        HubUnreachableError: if the base is on the hub and that gives no answer.
    """
    stored = form or adapter.quantization
    model = load_base(
        adapter.base,
        stored,
        device,
        model_class=_class_of(skeleton, read.config.get("task_type")),
        supplied=read.changes,
    )
    with torch.no_grad():
        # What lies within a module before it: both that answer in its place have the same within.
        grouped = _by_module(_followed(read, skeleton))
        for path, changes in sorted(grouped.items(), key=lambda item: -item[0].count(".")):
            building = _Building(read, compute_dtype(stored), skeleton.kinds[path] == "conv1d", device)
            model.set_submodule(path, building.layer(model.get_submodule(path), changes))
    return model.requires_grad_(False).eval()


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model answers as its base without the adapter."""
    modules = [module for module in model.modules() if isinstance(module, Beside) and module.enabled]
    for module in modules:
        module.enabled = False
    try:
        with adapters_disabled(model):
            yield
    finally:
        for module in modules:
            module.enabled = True


@contextmanager
def adapter_stronger(model: nn.Module, share: float) -> Iterator[None]:
    """Inside, what is added to weights is larger by this share."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALinear | LinearUpdate | EmbeddingUpdate)]
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale *= 1 + share
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale


def _read(adapter: AdapterSource) -> tuple[Skeleton, AdapterChanges]:
    """The model's modules, and what the adapter does to them."""
    config = read_adapter_config(adapter.folder, SUPPORTED)
    skeleton = build_skeleton(adapter.base, config.get("task_type"), adapter.quantization)
    read = read_changes(adapter.folder, skeleton.kinds, skeleton.module, skeleton.shapes)
    shapes = skeleton.shapes
    problems = [problem for name, change in read.changes.items() if (problem := change.problem(shapes.get(name)))]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ModelError(f"{adapter.folder}: the adapter does not fit {adapter.base.name}:\n{lines}")
    return skeleton, read


def _class_of(skeleton: Skeleton, task_type: str | None) -> Any:
    """What loads the model; classes that come with a model are known to the automatic ones alone."""
    if task_type == "CAUSAL_LM":
        return AutoModelForCausalLM
    return getattr(transformers, skeleton.architecture, AutoModelForCausalLM)


def _followed(read: AdapterChanges, skeleton: Skeleton) -> dict[str, Change]:
    """The changes by parameter; one that holds for a tensor under all its names is there under each of them."""
    changes = dict(read.changes)
    for name, change in read.changes.items():
        if change.follows_ties:
            tied = next((names for names in skeleton.ties if name in names), frozenset())
            changes |= {other: change for other in tied if other not in changes}
    return changes


def _by_module(changes: dict[str, Change]) -> dict[str, dict[str, Change]]:
    """By module path, then by the parameter's own name."""
    grouped: dict[str, dict[str, Change]] = {}
    for name, change in changes.items():
        path, _, own = name.rpartition(".")
        grouped.setdefault(path, {})[own] = change
    return grouped


@dataclass(frozen=True)
class _Building:
    """Makes one layer."""

    read: AdapterChanges
    dtype: torch.dtype
    transposed: bool  # whether the module holds its weight as [in, out] before it is quantised
    device: torch.device = field(repr=False)

    def layer(self, base: nn.Module, changes: dict[str, Change]) -> nn.Module:
        """What takes the module's place."""
        weight = changes.get("weight")
        if isinstance(weight, LowRank):
            if len(changes) == 1 and weight.kind != "embedding" and weight.magnitude is None and weight.over is None:
                return self._plain(base, weight)
            others = {name: change for name, change in changes.items() if name != "weight"}
            return Beside(self._base(base, weight), self._updated(base, weight, others))
        values = self._values(base, changes)
        return Beside(_with_as_many_rows(base, values), with_parameters(base, values))

    def _base(self, base: nn.Module, change: LowRank) -> nn.Module:
        """What answers without the adapter."""
        if change.over is None or change.kind != "embedding":
            return base
        return _with_as_many_rows(base, {"weight": self._whole(change.over)})

    def _plain(self, base: nn.Module, change: LowRank) -> LoRALinear:
        """The layer that it was trained with."""
        a, b = self._whole(change.a), self._whole(change.b)
        rank = a.shape[0]
        layer = LoRALinear(base, rank=rank, alpha=change.scale * rank, dropout=0.0, compute_dtype=self.dtype)
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)
        return layer

    def _updated(self, base: nn.Module, change: LowRank, others: dict[str, Change]) -> nn.Module:
        a, b = self._whole(change.a), self._whole(change.b)
        magnitude = None if change.magnitude is None else self._whole(change.magnitude)
        values = self._values(base, others)
        if change.kind == "embedding":
            if change.over is not None:
                values["weight"] = self._whole(change.over).to(self.dtype)
            return EmbeddingUpdate(with_parameters(base, values), a, b, change.scale, magnitude=magnitude)
        weight = None if change.over is None else self._whole(change.over)
        if weight is not None and self.transposed:
            weight = weight.t()
        return LinearUpdate(
            base, a, b, change.scale, self.dtype, magnitude=magnitude, weight=weight, bias=values.get("bias")
        )

    def _values(self, base: nn.Module, changes: dict[str, Change]) -> dict[str, Tensor]:
        """What the module's own parameters are with these changes, none of which is low-rank."""
        return {name: self._value(base, name, change) for name, change in changes.items()}

    def _value(self, base: nn.Module, name: str, change: Change) -> Tensor:
        own = getattr(base, name, None)
        dtype = own.dtype if isinstance(own, Tensor) and own.is_floating_point() else self.dtype
        match change:
            case Replacement():
                value = self._whole(change.source)
            case BiasUpdate():
                given = own if change.over is None else self._whole(change.over)
                value = change.scale * self._whole(change.delta)
                value = value if given is None else value + given.float()
            case TokenRows():
                value = base.get_parameter(name).float() if change.over is None else self._whole(change.over)
                value = value.clone()
                value[list(change.indices)] = self._whole(change.source)
            case _:
                raise ModelError(f"{change.parameter}: {type(change).__name__} cannot be set beside the base")
        if name == "weight" and self.transposed and isinstance(base, nn.Linear):
            value = value.t()
        return value.to(dtype).contiguous()

    def _whole(self, name: str) -> Tensor:
        """A tensor of the adapter, float32."""
        return self.read.tensors.whole(name).to(self.device)


def _with_as_many_rows(base: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """The module with as many rows as the adapter's: of tokens or labels that the base does not know, rows of 0."""
    resized = {}
    for name, value in values.items():
        own, as_it_is = _own(base, name, value.dtype)
        if own is None or own.shape[1:] != value.shape[1:] or (as_it_is and len(own) == len(value)):
            continue
        known = own[: len(value)]
        resized[name] = torch.cat([known, known.new_zeros(len(value) - len(known), *known.shape[1:])])
    return with_parameters(base, resized) if resized else base


def _own(base: nn.Module, name: str, dtype: torch.dtype) -> tuple[Tensor | None, bool]:
    """A parameter of a module, out of 4 or 8 bits, and whether the module can compute with what it has."""
    own = base._parameters.get(name)
    if own is None or name != "weight" or not isinstance(base, nn.Linear) or type(base) is nn.Linear:
        return own, True
    if own.dtype is torch.int8:
        return frozen_weight(base, dtype), True
    state = getattr(own, "quant_state", None)
    # What the base's files lack was never rounded.
    return (own.data, False) if state is None else (frozen_weight(base, state.dtype), True)
