"""What the tensors of a PEFT LoRA are called, and which module of the model each belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qlora_cli.merging.adapters.changes import Kind
from qlora_cli.merging.adapters.tensors import AdapterTensors

PREFIX = "base_model.model."

# What belongs to the adapter, by what stands behind the module's path.
LORA_A, LORA_B, LORA_B_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
MAGNITUDE, TOKEN_ROWS = "lora_magnitude_vector", "token_adapter.trainable_tokens_delta"
_PARTS = {
    **{part: part for part in (LORA_A, LORA_B, LORA_B_BIAS, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, TOKEN_ROWS)},
    f"{MAGNITUDE}.weight": MAGNITUDE,  # as some versions wrote it
}
_OWN_WORDS = ("lora_", "trainable_tokens_", "token_adapter")

# Where a parameter of the base was saved as well, between its module's path and its name.
_WRAPPERS = (".token_adapter.base_layer.", ".base_layer.")
# A fully saved module's parameters have their own names. In some cases (bias: all, a grown vocabulary) PEFT writes them
# once more under the first of these, and under the second what they were before training.
_COPY, _BEFORE = ".modules_to_save.", ".original_module."


@dataclass
class Module:
    """A module of the model, and the tensors that the adapter has for it.

    Attributes:
        written: its path in the adapter, which the config's patterns are meant for.
        path: its path in the model.
        parts: the adapter's own tensors by what they are (`lora_A.weight`).
        saved: tensors that are parameters of the module, by these (`weight`).
    """

    written: str
    path: str
    kind: Kind
    parts: dict[str, str] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)


@dataclass
class Grouping:
    """The tensors of an adapter by modules.

    Attributes:
        modules: by their paths in the model, in the order of the file.
        unused: tensors that say nothing that others do not say.
        problems: a line for each tensor that has no place, and for each module that is not there.
    """

    modules: dict[str, Module]
    unused: tuple[str, ...]
    problems: list[str]


def group_tensors(tensors: AdapterTensors, kinds: Mapping[str, Kind], resolve: Callable[[str], str | None]) -> Grouping:
    """Give every tensor to its module.

    Args:
        kinds: what each module of the model is.
        resolve: the model's path of a module that the adapter names, None if there is none.
    """
    modules: dict[str, Module] = {}
    absent: dict[str, int] = {}
    unused: list[str] = []
    problems: list[str] = []
    # Second ones last, when their firsts are known.
    for name in sorted(tensors.names, key=lambda name: _COPY in name or _BEFORE in name):
        readings = _readings(name)
        if not readings:
            problems.append(f"unknown tensor: {name}")
            continue
        written, key = next((reading for reading in readings if resolve(reading[0]) is not None), readings[0])
        path = resolve(written)
        if path is None:
            absent[written] = absent.get(written, 0) + 1
            continue
        module = modules.setdefault(path, Module(written, path, kinds[path]))
        place = module.parts if key in _PARTS.values() else module.saved
        if _BEFORE in name and key in place:
            unused.append(name)
        elif _BEFORE in name:
            problems.append(f"unknown tensor: {name}")
        elif key not in place:
            place[key] = name
        elif _COPY in name and tensors.same(place[key], name):
            unused.append(name)
        else:
            problems.append(f"two tensors for one place: {place[key]} and {name}")
    problems += [
        f"the base has no module {path}, the adapter has {count} tensor{'s' if count > 1 else ''} for it"
        for path, count in absent.items()
    ]
    return Grouping(modules, tuple(unused), problems)


def _readings(name: str) -> list[tuple[str, str]]:
    """The path of a tensor's module, and which part or parameter of it this is; none for what is not PEFT's.

    Two where a word may be a module or the name that PEFT gave the adapter (`classifier.modules_to_save.default.bias`).
    """
    if not name.startswith(PREFIX):
        return []
    rest = name.removeprefix(PREFIX)
    for suffix, part in _PARTS.items():
        if rest.endswith(f".{suffix}"):
            return [(rest.removesuffix(f".{suffix}"), part)]
    for wrapper in (*_WRAPPERS, _BEFORE):
        rest = rest.replace(wrapper, ".")
    if any(word.startswith(_OWN_WORDS) for word in rest.split(".")):
        return []
    path, copied, parameter = rest.partition(_COPY)
    names = [f"{path}.{parameter}", f"{path}.{parameter.partition('.')[2]}"] if copied else [rest]
    return [(path, parameter) for path, _, parameter in (name.rpartition(".") for name in names) if path]
