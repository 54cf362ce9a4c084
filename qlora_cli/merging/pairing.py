"""Which change goes to which of the base's tensors, and what is written for each: settled before a value is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qlora_cli.errors import ModelError
from qlora_cli.merging.adapter_reading import AdapterChanges
from qlora_cli.merging.adapter_tensors import AdapterTensors
from qlora_cli.merging.changes import Change, Kind
from qlora_cli.merging.replacements import Replacement
from qlora_cli.merging.skeleton import Skeleton
from qlora_cli.merging.tensor_files import StoredTensor, TensorReader, row_blocks

# What bitsandbytes stores beside a 4-bit weight, by how the names go on.
_STATE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__")

# The part of a configuration that says whether input and output embeddings are one tensor.
_TIE = "tie_word_embeddings"
# The modules that PEFT looks for then.
_PEFT_EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class PackedTensor:
    """A weight that the base's files hold in 4 bits: its parts by suffix, the packed values themselves under ``""``."""

    name: str
    parts: Mapping[str, StoredTensor]


Stored = StoredTensor | PackedTensor


@dataclass(frozen=True)
class Target:
    """One tensor of the merged model.

    Attributes:
        name: in the files.
        parameter: by the model's names; None for what the loader passes over.
        base: where the base holds it; None for one that the adapter brings along.
        shape: of the result.
        change: what the adapter does to it, if anything.
        kind: of the module whose weight it is.
        quantized: whether it was in 4 bits while the adapter was trained.
    """

    name: str
    parameter: str | None
    base: Stored | None
    shape: tuple[int, ...]
    change: Change | None = None
    kind: Kind = "other"
    quantized: bool = False


@dataclass(frozen=True)
class Pairing:
    """Everything that will be written, in the base's order, and what the configuration has to say of it.

    Attributes:
        unroundable: weights that were in 4 bits while the adapter was trained, and that the base's files hold in
            pieces: they are written as they are there.
    """

    targets: tuple[Target, ...]
    config_changes: Mapping[str, Any]
    unroundable: tuple[str, ...] = ()

    @property
    def changed(self) -> tuple[Target, ...]:
        """The tensors that the adapter changes."""
        return tuple(target for target in self.targets if target.change is not None)


def gather(stored: Mapping[str, StoredTensor]) -> dict[str, Stored]:
    """The tensors of a base by the names of its weights: what belongs to a 4-bit weight is put together."""
    states: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        for mark in _STATE:
            weight, found, rest = name.rpartition(mark)
            if found and weight in stored:
                states.setdefault(weight, {})[mark[1:] + rest] = tensor
    parts = {tensor.name for state in states.values() for tensor in state.values()}
    return {
        name: PackedTensor(name, {"": tensor, **states[name]}) if name in states else tensor
        for name, tensor in stored.items()
        if name not in parts
    }


def pair(
    stored: Mapping[str, StoredTensor],
    skeleton: Skeleton,
    adapter: AdapterChanges,
    untied: Callable[[], Skeleton],
    *,
    described: str,
) -> Pairing:
    """Find a place for every change, and a source for every tensor.

    Args:
        stored: the base's tensors by their names in its files.
        untied: the same model with its configuration's `tie_word_embeddings` off; called only if that is needed.
        described: the adapter and the base, for messages.

    Raises:
        ModelError: listing all that is missing, mis-shaped or has no place.
    """
    base = _Base(gather(stored), skeleton)
    problems = [*base.problems(adapter.changes), *base.misfits(adapter.changes)]
    if problems:
        raise ModelError(f"{described} do not fit:\n" + "\n".join(problems))
    config_changes: dict[str, Any] = {}
    ties, parted = base.ties, _parted(base.ties, adapter)
    if parted:
        ties = [both for kept in untied().ties for group in base.ties if len(both := kept & group) > 1]
        if left := _parted(ties, adapter):
            names = "\n".join(f"  {', '.join(sorted(group))}" for group in left)
            raise ModelError(
                f"{described} do not fit: these are one tensor in this architecture, whatever its configuration says, "
                f"and the adapter changes only a part of them:\n{names}"
            )
        config_changes[_TIE] = False
    # Of tensors that were one in training, the change to any is the change to all.
    following = _groups(ties) | _groups(group for group in base.ties if group not in parted)
    targets = tuple(_targets(base, adapter.changes, _groups(ties), following))
    return Pairing(targets, config_changes | _vocabulary(targets, skeleton), base.quantized_in_pieces())


def _groups(ties: Iterable[frozenset[str]]) -> dict[str, frozenset[str]]:
    return {name: group for group in ties for name in group}


def _targets(
    base: _Base,
    changes: Mapping[str, Change],
    sharing: Mapping[str, frozenset[str]],
    following: Mapping[str, frozenset[str]],
) -> Iterator[Target]:
    """What is written: all that the base holds, then what it does not.

    Args:
        sharing: by name, the names that are one tensor in the merged model.
        following: by name, the names whose change is its own.
    """
    written: set[str] = set()

    def target(name: str, parameter: str | None, held: Stored | None) -> Target:
        change = None
        if parameter is not None:
            written.update(sharing.get(parameter, {parameter}))
            alike = following.get(parameter, frozenset({parameter}))
            change = next((changes[other] for other in sorted(alike) if other in changes), None)
        return base.target(name, parameter, held, change)

    for name, held in base.held.items():
        yield target(name, base.parameters[name], held)
    # What is no longer tied to what the base holds, also where the adapter changes neither.
    parted = [name for group in base.ties for name in sorted(group)]
    for parameter in [*parted, *changes]:
        if parameter not in written:
            yield target(parameter, parameter, base.holding(parameter))


def _parted(ties: Iterable[frozenset[str]], adapter: AdapterChanges) -> list[frozenset[str]]:
    """Of tensors that are one in the model, those that are no longer one with the adapter on it."""
    parted = []
    for group in ties:
        present = [adapter.changes[name] for name in sorted(group) if name in adapter.changes]
        if not present or _kept_tied(group, adapter) or any(each.follows_ties for each in present):
            continue
        if len(present) < len(group) or not _alike(present, adapter.tensors):
            parted.append(group)
    return parted


def _kept_tied(group: frozenset[str], adapter: AdapterChanges) -> bool:
    """Whether PEFT trained these as one: `ensure_weight_tying` is heard for embeddings of the usual names alone."""
    modules = {name.rpartition(".")[0].rpartition(".")[2] for name in group & adapter.changes.keys()}
    return bool(adapter.config.get("ensure_weight_tying")) and (
        not modules.isdisjoint(_PEFT_EMBEDDINGS) or group <= adapter.changes.keys()
    )


def _alike(changes: list[Change], tensors: AdapterTensors) -> bool:
    """Whether all put the same values in place: an adapter may hold a tied tensor once for each of its names."""
    if not all(isinstance(change, Replacement) for change in changes):
        return False
    first, *others = (tensors.whole(change.sources[0]) for change in changes)
    return all(torch.equal(first, other) for other in others)


def _vocabulary(targets: Iterable[Target], skeleton: Skeleton) -> dict[str, Any]:
    """The number of tokens, where the adapter brought embeddings of another number."""
    for target in targets:
        if target.parameter != f"{skeleton.input_embedding}.weight" or target.change is None:
            continue
        if target.shape != skeleton.shapes.get(target.parameter):
            return {"vocab_size": target.shape[0]}
    return {}


def _same(one: Stored | None, other: Stored | None) -> bool:
    """Whether two tensors of the base hold the same values."""
    if not isinstance(one, StoredTensor) or not isinstance(other, StoredTensor):
        return False
    if one.shape != other.shape:
        return False
    with TensorReader() as reader:
        blocks = row_blocks(one.shape)
        return all(torch.equal(reader.rows(one, *block), reader.rows(other, *block)) for block in blocks)


class _Base:
    """The base's tensors, as its files name them and as the model does."""

    def __init__(self, held: dict[str, Stored], skeleton: Skeleton) -> None:
        self.held = held
        self.skeleton = skeleton
        self.parameters = skeleton.stored_names(held)
        self._pieces: dict[str, str] = {}
        for piece, made in skeleton.combined(held).items():
            for whole in made:
                self._pieces.setdefault(whole, piece)
        self._holders: dict[str, str] = {}
        for name, parameter in self.parameters.items():
            if parameter is not None:
                self._holders.setdefault(parameter, name)
        self.ties = [tied for group in skeleton.ties if len(tied := self._as_loaded(group)) > 1]
        self._tied = _groups(self.ties)

    def holding(self, parameter: str) -> Stored | None:
        """Where a parameter's values are, under its own name or one that it is tied to."""
        if parameter in self._holders:
            return self.held[self._holders[parameter]]
        tied = sorted(self._tied.get(parameter, frozenset()) & self._holders.keys())
        return self.held[self._holders[tied[0]]] if tied else None

    def _as_loaded(self, group: frozenset[str]) -> frozenset[str]:
        """Those of the names that are one tensor once the base is loaded.

        Whatever its configuration says, transformers does not tie what the files hold with different values.
        """
        embedding = f"{self.skeleton.input_embedding}.weight"
        first, *others = sorted(group & self._holders.keys(), key=lambda name: (name != embedding, name)) or [""]
        return group - {name for name in others if not _same(self.holding(first), self.holding(name))}

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """The shape of a parameter in the base; None if it has no such parameter."""
        held = self.holding(parameter)
        if isinstance(held, PackedTensor):
            return self.skeleton.shapes.get(parameter)
        return None if held is None else held.shape

    def target(self, name: str, parameter: str | None, held: Stored | None, change: Change | None) -> Target:
        before: tuple[int, ...] | None
        before = held.shape if parameter is None and isinstance(held, StoredTensor) else self.shape(parameter or name)
        module, _, last = (parameter or "").rpartition(".")
        return Target(
            name=name,
            parameter=parameter,
            base=held,
            shape=change.shape(before) if change is not None else before or (),
            change=change,
            kind=self.skeleton.kinds.get(module, "other"),
            quantized=last == "weight" and module in self.skeleton.quantized,
        )

    def problems(self, changes: Mapping[str, Change]) -> Iterator[str]:
        """What is wrong with the base's files by themselves, and with what the adapter asks of them."""
        for name, parameter in self.parameters.items():
            if parameter is not None and self._holders[parameter] != name:
                yield f"  {parameter}: the base holds it twice, as {self._holders[parameter]} and as {name}"
        for parameter, shape in self.skeleton.shapes.items():
            held = self.holding(parameter)
            if held is None and parameter in self._pieces:
                continue
            if held is None and parameter not in changes:
                yield f"  {parameter}: missing from the base's files"
            elif isinstance(held, StoredTensor) and held.shape != shape:
                yield f"  {parameter}: expected {[*shape]} by the base's config.json, got {[*held.shape]} in its files"

    def quantized_in_pieces(self) -> tuple[str, ...]:
        """Weights that training has in 4 bits once their pieces are put together."""
        weights = {f"{module}.weight" for module in self.skeleton.quantized}
        return tuple(parameter for parameter in self._pieces if parameter in weights)

    def misfits(self, changes: Mapping[str, Change]) -> Iterator[str]:
        """Changes that do not fit what they are to change."""
        for parameter, change in changes.items():
            if parameter in self._pieces:
                yield (
                    f"  {parameter}: the base's files hold it in pieces, such as {self._pieces[parameter]}, which are "
                    "put together when it is loaded: a change to it cannot be written"
                )
            elif problem := change.problem(self.shape(parameter)):
                yield f"  {problem}"
