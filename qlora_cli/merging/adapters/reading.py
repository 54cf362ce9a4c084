"""A PEFT LoRA folder as changes to the parameters of its base: every tensor of it used exactly once, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.merging.adapters.changes import BiasUpdate, Change, Kind, LowRank
from qlora_cli.merging.adapters.names import (
    EMBEDDING_A,
    EMBEDDING_B,
    LORA_A,
    LORA_B,
    LORA_B_BIAS,
    MAGNITUDE,
    TOKEN_ROWS,
    Module,
    group_tensors,
)
from qlora_cli.merging.adapters.replacements import Replacement, TokenRows
from qlora_cli.merging.adapters.targets import ends_with, saved_by, targeted_modules
from qlora_cli.merging.adapters.tensors import AdapterTensors
from qlora_cli.model.adapter_config import WEIGHTS_FILE, rank_of, read_adapter_config, scale_of

# Settings that change what the tensors mean or which there are, beyond plain LoRA's.
SUPPORTED = frozenset({"use_dora", "lora_bias", "bias", "modules_to_save", "trainable_token_indices"})

_KIND_NAMES: dict[Kind, str] = {
    "linear": "a linear layer",
    "conv1d": "a Conv1D layer",
    "embedding": "an embedding",
    "other": "something else",
}


@dataclass(frozen=True)
class AdapterChanges:
    """What an adapter does to its base.

    Attributes:
        config: the parsed `adapter_config.json`.
        changes: by the model's names of the parameters, in the order of the adapter's tensors.
        tensors: what they read from.
        unused: tensors that only repeat others, or hold what was before training; every other one is a source of one
            change.
    """

    config: dict[str, Any]
    changes: dict[str, Change]
    tensors: AdapterTensors
    unused: tuple[str, ...]


def read_changes(
    folder: Path,
    kinds: Mapping[str, Kind],
    resolve: Callable[[str], str | None] | None = None,
    parameters: Collection[str] = (),
) -> AdapterChanges:
    """The changes that the adapter in `folder` makes to a model with these modules.

    Args:
        kinds: what each module of the model is, by its path; all modules, containers too.
        resolve: the model's path of the module that a path in the adapter means, None if there is none; by default the
            path itself where it is among `kinds`.
        parameters: names of the model's parameters. Given these, each that the config has trained whole (by
            `modules_to_save` or `bias`) must be among the tensors; without, one of each module that was saved.

    Raises:
        ModelError: if the folder is no LoRA adapter or uses what cannot be merged; else listing all that is wrong with
            its tensors: unknown, incomplete, not finite, for modules that are not there, of other ranks than the config
            says; and everything that the config names and the tensors leave out.
    """
    config = read_adapter_config(folder, SUPPORTED)
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{folder}: no {WEIGHTS_FILE}; expected an adapter folder")
    tensors = AdapterTensors(folder / WEIGHTS_FILE)
    grouping = group_tensors(tensors, kinds, resolve or (lambda path: path if path in kinds else None))
    reading = _Reading(config, tensors, list(grouping.modules.values()), grouping.problems)
    changes = {change.parameter: change for module in reading.modules for change in reading.of_module(module)}
    reading.check_targets(kinds)
    reading.check_whole(kinds, parameters, {name for name, change in changes.items() if change.replaces})
    reading.check_values()
    if reading.problems:
        lines = "\n".join(f"  {problem}" for problem in reading.problems)
        raise ModelError(f"{folder}: the adapter cannot be applied:\n{lines}")
    return AdapterChanges(config, changes, tensors, grouping.unused)


@dataclass
class _Reading:
    """Modules and their tensors on the way to changes; what is wrong is gathered."""

    config: dict[str, Any]
    tensors: AdapterTensors
    modules: list[Module]
    problems: list[str]

    def of_module(self, module: Module) -> Iterator[Change]:
        parts, saved = dict(module.parts), dict(module.saved)
        if LORA_A in parts or LORA_B in parts:
            yield from self._low_rank(module, parts, saved, LORA_A, LORA_B)
        elif EMBEDDING_A in parts or EMBEDDING_B in parts:
            yield from self._low_rank(module, parts, saved, EMBEDDING_A, EMBEDDING_B)
        elif TOKEN_ROWS in parts:
            yield from self._tokens(module, parts.pop(TOKEN_ROWS), saved.pop("weight", None))
        self.problems += [f"{name}: no place for it beside the module's other tensors" for name in parts.values()]
        for parameter, name in saved.items():
            yield Replacement(
                f"{module.path}.{parameter}", name, self.tensors.shape(name), self._resizable(module, parameter)
            )

    def check_targets(self, kinds: Mapping[str, Kind]) -> None:
        """Modules and tokens that the config names and the tensors leave out."""
        trained = {module.path for module in self.modules if module.parts.keys() - {TOKEN_ROWS}}
        targets = targeted_modules(self.config, [path for path, kind in kinds.items() if kind != "other"])
        self.problems += [
            f"target_modules names {path}, the adapter has no A and B for it" for path in targets if path not in trained
        ]
        if self.config.get("trainable_token_indices") and not any(TOKEN_ROWS in m.parts for m in self.modules):
            self.problems.append("trainable_token_indices names tokens, the adapter has no rows for them")

    def check_whole(self, kinds: Mapping[str, Kind], parameters: Collection[str], replaced: Collection[str]) -> None:
        """Parameters that the config has trained whole and the tensors leave out."""
        for name in self.config.get("modules_to_save") or ():
            wanted = [parameter for parameter in parameters if saved_by(parameter.rpartition(".")[0], name)]
            missing = [parameter for parameter in wanted if parameter not in replaced]
            # PEFT names both of the usual heads of a classifier, whichever the model has.
            there = not wanted and any(saved_by(path, name) for path in kinds)
            if there and not any(module.saved and saved_by(module.written, name) for module in self.modules):
                missing = [name]
            self.problems += [f"modules_to_save names {name}, the adapter has no {one}" for one in missing]
        bias = self.config.get("bias") or "none"
        owners = {module.path for module in self.modules if LORA_A in module.parts} if bias == "lora_only" else None
        if bias != "none":
            self.problems += [
                f"bias is {bias}, the adapter has no {parameter}"
                for parameter in parameters
                if parameter.endswith(".bias") and parameter not in replaced
                if owners is None or parameter.removesuffix(".bias") in owners
            ]

    def check_values(self) -> None:
        """Every tensor is read once, block by block."""
        for name in self.tensors.names:
            if not (dtype := self.tensors.stored(name).dtype).is_floating_point:
                self.problems.append(f"{name}: expected floating-point values, got {str(dtype).removeprefix('torch.')}")
            elif not all(bool(rows.isfinite().all()) for rows in self.tensors.blocks(name)):
                self.problems.append(f"{name}: has values that are NaN or infinite")

    def _low_rank(
        self, module: Module, parts: dict[str, str], saved: dict[str, str], role_a: str, role_b: str
    ) -> Iterator[Change]:
        """The changes to a module's weight, and to its bias if that has a part in it; what they use is taken out."""
        name_a, name_b = parts.pop(role_a, None), parts.pop(role_b, None)
        magnitude, delta = parts.pop(MAGNITUDE, None), parts.pop(LORA_B_BIAS, None)
        if name_a is None or name_b is None:
            self.problems.append(f"A without B: {name_a}" if name_a else f"B without A: {name_b}")
            return
        if fault := self._misfit(module, name_a, name_b, embedding=role_a == EMBEDDING_A):
            self.problems.append(fault)
            return
        (_, inner), (outer, _) = self.tensors.shape(name_a), self.tensors.shape(name_b)
        scale, weight = scale_of(self.config, module.written), saved.pop("weight", None)
        result = (outer, inner) if module.kind == "linear" else (inner, outer)
        resizable = weight is not None and _outside_layers(module.path)
        yield LowRank(f"{module.path}.weight", name_a, name_b, scale, module.kind, result, magnitude, weight, resizable)
        expected: dict[str | None, tuple[int, ...]] = {magnitude: (outer,), weight: result}
        if delta is not None:
            bias = saved.pop("bias", None)
            expected |= {delta: (outer,), bias: (outer,)}
            yield BiasUpdate(f"{module.path}.bias", delta, scale, (outer,), bias)
        self._check_setting(module, "use_dora", magnitude, "magnitude")
        self._check_setting(module, "lora_bias", delta, "bias of B")
        self.problems += [
            f"{name}: expected {list(shape)}, got {list(self.tensors.shape(name))}"
            for name, shape in expected.items()
            if name is not None and self.tensors.shape(name) != shape
        ]

    def _check_setting(self, module: Module, setting: str, tensor: str | None, what: str) -> None:
        """The config has to say of each layer whether it has this tensor: else either of them is not the other's."""
        if bool(self.config.get(setting)) != (tensor is not None):
            said = "true" if tensor is None else "false"
            self.problems.append(
                f"{module.written}: {setting} is {said}, the adapter has {'no' if tensor is None else 'a'} {what}"
            )

    def _misfit(self, module: Module, name_a: str, name_b: str, *, embedding: bool) -> str | None:
        """Why A and B do not make one update of this module."""
        shape_a, shape_b = self.tensors.shape(name_a), self.tensors.shape(name_b)
        if module.kind not in (("embedding",) if embedding else ("linear", "conv1d")):
            wanted = "an embedding" if embedding else "a linear layer"
            return f"{name_a}: expected {wanted} at {module.path}, the base has {_KIND_NAMES[module.kind]}"
        if len(shape_a) != 2 or len(shape_b) != 2:
            return f"{name_a}, {name_b}: expected two matrices, got {list(shape_a)} and {list(shape_b)}"
        rank = rank_of(self.config, module.written)
        if shape_a[0] != rank or shape_b[1] != rank:
            return (
                f"{module.written}: rank {rank} by the config, expected A [{rank}, in] and B [out, {rank}], "
                f"got {list(shape_a)} and {list(shape_b)}"
            )
        return None

    def _tokens(self, module: Module, name: str, over: str | None) -> Iterator[Change]:
        """The change to an embedding of which single rows were trained."""
        given = self.config.get("trainable_token_indices")
        if isinstance(given, dict):
            given = next((indices for key, indices in given.items() if ends_with(module.written, key)), None)
        shape = self.tensors.shape(name)
        if not given or len(shape) != 2 or shape[0] != len(given):
            expected = f"[{len(given)}, width]" if given else "trainable_token_indices to say which rows they are"
            self.problems.append(f"{name}: expected {expected}, got {list(shape)}")
            return
        whole = self.tensors.shape(over) if over else None
        if whole is not None and (len(whole) != 2 or whole[1] != shape[1]):
            self.problems.append(f"{over}: expected [rows, {shape[1]}], got {list(whole)}")
            return
        yield TokenRows(f"{module.path}.weight", name, tuple(given), shape[1], over, whole)

    def _resizable(self, module: Module, parameter: str) -> bool:
        """Whether the rows are tokens or labels: of embeddings and heads."""
        saved_whole = any(saved_by(module.written, name) for name in self.config.get("modules_to_save") or ())
        counted = module.kind in ("embedding", "linear") and (parameter == "weight" or saved_whole)
        return counted and not module.parts and _outside_layers(module.path)


def _outside_layers(path: str) -> bool:
    """Whether a module stands in no numbered layer, as embeddings and heads do."""
    return not any(part.isdecimal() for part in path.split("."))
