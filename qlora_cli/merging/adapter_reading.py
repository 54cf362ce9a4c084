"""A PEFT LoRA folder as changes to the parameters of its base: every tensor of it used exactly once, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.merging.adapter_tensors import AdapterTensors
from qlora_cli.merging.changes import BiasUpdate, Change, Kind, LowRank, Replacement, TokenRows
from qlora_cli.merging.targets import ends_with, targeted_modules, within
from qlora_cli.model.adapter_config import WEIGHTS_FILE, rank_of, read_adapter_config, scale_of

# Settings that change what the tensors mean or which there are, beyond plain LoRA's.
SUPPORTED = frozenset({"use_dora", "lora_bias", "bias", "modules_to_save", "trainable_token_indices"})

_PREFIX = "base_model.model."

# What PEFT calls the tensors beside a module's own, longest first where one ends in another.
_A, _B, _B_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_EMBEDDING_A, _EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
_MAGNITUDE, _TOKENS = "lora_magnitude_vector", "token_adapter.trainable_tokens_delta"
_ROLES = {
    _A: _A,
    _B: _B,
    _B_BIAS: _B_BIAS,
    _EMBEDDING_A: _EMBEDDING_A,
    _EMBEDDING_B: _EMBEDDING_B,
    _MAGNITUDE: _MAGNITUDE,
    f"{_MAGNITUDE}.weight": _MAGNITUDE,  # as some versions wrote it
    _TOKENS: _TOKENS,
}
_KIND_NAMES: dict[Kind, str] = {
    "linear": "a linear layer",
    "conv1d": "a Conv1D layer",
    "embedding": "an embedding",
    "other": "something else",
}
# Between a module and a parameter of the base that was saved along with the adapter.
_WRAPPED = (".token_adapter.base_layer.", ".base_layer.")


@dataclass(frozen=True)
class AdapterChanges:
    """What an adapter does to its base.

    Attributes:
        config: the parsed `adapter_config.json`.
        changes: by the model's names of the parameters, in the order of the adapter's tensors.
        tensors: what they read from.
    """

    config: dict[str, Any]
    changes: dict[str, Change]
    tensors: AdapterTensors


def read_changes(
    folder: Path, kinds: Mapping[str, Kind], resolve: Callable[[str], str | None] | None = None
) -> AdapterChanges:
    """The changes that the adapter in `folder` makes to a model with these modules.

    Args:
        kinds: what each module of the model is, by its path; all modules, containers too.
        resolve: the model's path of the module that a path in the adapter means, None if there is none; by default the
            path itself where it is among `kinds`.

    Raises:
        ModelError: if the folder is no LoRA adapter or uses what cannot be merged; else listing all that is wrong with
            its tensors: unknown, incomplete, not finite, for modules that are not there, of other ranks than the config
            says; and every module that the config targets and the tensors leave out.
    """
    config = read_adapter_config(folder, SUPPORTED)
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{folder}: no {WEIGHTS_FILE}; expected an adapter folder")
    tensors = AdapterTensors(folder / WEIGHTS_FILE)
    reading = _Reading(config, tensors, kinds, resolve or (lambda path: path if path in kinds else None))
    reading.sort()
    changes = {change.parameter: change for module in reading.modules.values() for change in reading.of_module(module)}
    reading.check_named()
    reading.check_values()
    if reading.problems:
        lines = "\n".join(f"  {problem}" for problem in reading.problems)
        raise ModelError(f"{folder}: the adapter cannot be merged:\n{lines}")
    return AdapterChanges(config, changes, tensors)


@dataclass
class _Module:
    """The tensors that belong to one module, by what they are."""

    written: str  # the path in the adapter, which the config's patterns are meant for
    path: str
    kind: Kind
    parts: dict[str, str] = field(default_factory=dict)  # role to tensor
    saved: dict[str, str] = field(default_factory=dict)  # parameter of the module to tensor


@dataclass
class _Reading:
    config: dict[str, Any]
    tensors: AdapterTensors
    kinds: Mapping[str, Kind]
    resolve: Callable[[str], str | None]
    modules: dict[str, _Module] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def sort(self) -> None:
        """Give every tensor to its module."""
        absent: dict[str, int] = {}
        for name in self.tensors.names:
            written, role, parameter = _parse(name)
            if not written:
                self.problems.append(f"unknown tensor: {name}")
                continue
            path = self.resolve(written)
            if path is None:
                absent[written] = absent.get(written, 0) + 1
                continue
            module = self.modules.setdefault(path, _Module(written, path, self.kinds[path]))
            place, key = (module.saved, parameter) if role is None else (module.parts, role)
            if key in place:
                self.problems.append(f"twice the same: {place[key]} and {name}")
            place[key] = name
        self.problems += [
            f"the base has no module {path}, the adapter has {count} tensor{'s' if count > 1 else ''} for it"
            for path, count in absent.items()
        ]

    def of_module(self, module: _Module) -> Iterator[Change]:
        parts, saved = dict(module.parts), dict(module.saved)
        if _A in parts or _B in parts:
            yield from self._low_rank(module, parts, saved, _A, _B)
        elif _EMBEDDING_A in parts or _EMBEDDING_B in parts:
            yield from self._low_rank(module, parts, saved, _EMBEDDING_A, _EMBEDDING_B)
        elif _TOKENS in parts:
            yield from self._tokens(module, parts.pop(_TOKENS), saved.pop("weight", None))
        self.problems += [f"{name}: no place for it beside the module's other tensors" for name in parts.values()]
        for parameter, name in saved.items():
            yield Replacement(
                f"{module.path}.{parameter}", name, self.tensors.shape(name), self._resizable(module, parameter)
            )

    def check_named(self) -> None:
        """What the config names and the tensors leave out."""
        trained = {module.written for module in self.modules.values() if module.parts.keys() - {_TOKENS}}
        targets = [path for path in self.kinds if self.kinds[path] != "other"]
        resolved = {self.resolve(path) for path in trained}
        missing = [path for path in targeted_modules(self.config, targets) if path not in resolved]
        self.problems += [f"target_modules names {path}, the adapter has no A and B for it" for path in missing]
        for name in self.config.get("modules_to_save") or ():
            if not any(module.saved and within(module.written, name) for module in self.modules.values()):
                self.problems.append(f"modules_to_save names {name}, the adapter has no tensor of it")
        if self.config.get("trainable_token_indices") and not any(_TOKENS in m.parts for m in self.modules.values()):
            self.problems.append("trainable_token_indices names tokens, the adapter has no rows for them")

    def check_values(self) -> None:
        """Every tensor is read once, block by block."""
        for name in self.tensors.names:
            if not (dtype := self.tensors.stored(name).dtype).is_floating_point:
                self.problems.append(f"{name}: expected floating-point values, got {str(dtype).removeprefix('torch.')}")
            elif not all(bool(rows.isfinite().all()) for rows in self.tensors.blocks(name)):
                self.problems.append(f"{name}: has values that are NaN or infinite")

    def _low_rank(
        self, module: _Module, parts: dict[str, str], saved: dict[str, str], role_a: str, role_b: str
    ) -> Iterator[Change]:
        """The changes to a module's weight, and to its bias if that has a part in it; what they use is taken out."""
        name_a, name_b = parts.pop(role_a, None), parts.pop(role_b, None)
        magnitude, delta = parts.pop(_MAGNITUDE, None), parts.pop(_B_BIAS, None)
        if name_a is None or name_b is None:
            self.problems.append(f"A without B: {name_a}" if name_a else f"B without A: {name_b}")
            return
        if fault := self._misfit(module, name_a, name_b, embedding=role_a == _EMBEDDING_A):
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

    def _check_setting(self, module: _Module, setting: str, tensor: str | None, what: str) -> None:
        """The config has to say of each layer whether it has this tensor: else either of them is not the other's."""
        if bool(self.config.get(setting)) != (tensor is not None):
            said = "true" if tensor is None else "false"
            self.problems.append(
                f"{module.written}: {setting} is {said}, the adapter has {'no' if tensor is None else 'a'} {what}"
            )

    def _misfit(self, module: _Module, name_a: str, name_b: str, *, embedding: bool) -> str | None:
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

    def _tokens(self, module: _Module, name: str, over: str | None) -> Iterator[Change]:
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

    def _resizable(self, module: _Module, parameter: str) -> bool:
        """Whether the rows are tokens or labels: of embeddings and heads."""
        saved_whole = any(within(module.written, name) for name in self.config.get("modules_to_save") or ())
        counted = module.kind in ("embedding", "linear") and (parameter == "weight" or saved_whole)
        return counted and not module.parts and _outside_layers(module.path)


def _outside_layers(path: str) -> bool:
    """Whether a module stands in no numbered layer, as embeddings and heads do."""
    return not any(part.isdecimal() for part in path.split("."))


def _parse(name: str) -> tuple[str, str | None, str]:
    """A tensor's module path, its role in the adapter, and the parameter that it is of, if it has no role; an empty
    path for what is not PEFT's."""
    if not name.startswith(_PREFIX):
        return "", None, ""
    rest = name[len(_PREFIX) :]
    for suffix, role in _ROLES.items():
        if rest.endswith(f".{suffix}"):
            return rest[: -len(suffix) - 1], role, ""
    for wrapped in _WRAPPED:
        rest = rest.replace(wrapped, ".")
    path, _, parameter = rest.rpartition(".")
    if any(part.startswith(("lora_", "trainable_tokens_")) for part in rest.split(".")):
        return "", None, ""
    return path, None, parameter
