"""Which change goes to which of the base's tensors, and what is written for each: settled before a value is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qlora_cli.errors import ModelError
from qlora_cli.merging.adapters.changes import Change, Kind
from qlora_cli.merging.adapters.reading import AdapterChanges
from qlora_cli.merging.adapters.replacements import Replacement, TokenRows
from qlora_cli.merging.adapters.tensors import AdapterTensors
from qlora_cli.merging.base.packed import PackedTensor, Stored, gather
from qlora_cli.merging.base.skeleton import Skeleton
from qlora_cli.merging.tensors.files import StoredTensor, TensorReader, row_blocks

_SUMMABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# The part of a configuration that says whether input and output embeddings are one tensor.
_TIE = "tie_word_embeddings"
# The modules that PEFT looks for then.
_PEFT_EMBEDDINGS = ("embed_tokens", "lm_head")


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
        float32_under: in a model of one of these types, transformers holds it in float32 all the same.
    """

    name: str
    parameter: str | None
    base: Stored | None
    shape: tuple[int, ...]
    change: Change | None = None
    kind: Kind = "other"
    quantized: bool = False
    float32_under: frozenset[torch.dtype] = frozenset()


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
    problems = [*base.problems(adapter.changes), *base.misfits(adapter.changes), *_mixed(base.ties, adapter)]
    if problems:
        raise ModelError(f"{described} do not fit:\n" + "\n".join(problems))
    config_changes: dict[str, Any] = {}
    embedding = f"{skeleton.input_embedding}.weight"
    ties, parted = base.ties, _parted(base.ties, adapter, embedding)
    if parted:
        ties = [both for kept in untied().ties for group in base.ties if len(both := kept & group) > 1]
        if left := _parted(ties, adapter, embedding):
            names = "\n".join(f"  {', '.join(sorted(group))}" for group in left)
            raise ModelError(
                f"{described} do not fit: these are one tensor in this architecture, whatever its configuration says, "
                f"and the adapter changes only a part of them:\n{names}"
            )
        config_changes[_TIE] = False
    # Of tensors that were one in training, the change to any is the change to all.
    following = _groups(ties) | _groups(group for group in base.ties if group not in parted)
    targets = tuple(_targets(base, adapter.changes, _groups(ties), following))
    return Pairing(targets, config_changes, base.quantized_in_pieces())


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


def _parted(ties: Iterable[frozenset[str]], adapter: AdapterChanges, embedding: str) -> list[frozenset[str]]:
    """Of tensors that are one in the model, those that are no longer one with the adapter on it."""
    parted = []
    for group in ties:
        present = _changes_of(group, adapter)
        if not present or _kept_tied(group, adapter):
            continue
        # PEFT has rows of the input embedding trained for the output too, and none of the output for the input.
        if len(present) == 1 and present[0].follows_ties and present[0].parameter == embedding:
            continue
        if len(present) < len(group) or not _alike(present, adapter.tensors):
            parted.append(group)
    return parted


def _mixed(ties: Iterable[frozenset[str]], adapter: AdapterChanges) -> Iterator[str]:
    """Tied tensors of which one has single rows trained, and another something else: PEFT lays one over the other."""
    for group in ties:
        present = _changes_of(group, adapter)
        if len({each.follows_ties for each in present}) > 1:
            names = " and ".join(each.parameter for each in present)
            yield f"  {names}: one tensor, and the adapter has single tokens of it trained and something else as well"


def _changes_of(group: frozenset[str], adapter: AdapterChanges) -> list[Change]:
    return [adapter.changes[name] for name in sorted(group) if name in adapter.changes]


def _kept_tied(group: frozenset[str], adapter: AdapterChanges) -> bool:
    """Whether PEFT trained these as one: `ensure_weight_tying` is heard for embeddings of the usual names alone."""
    modules = {name.rpartition(".")[0].rpartition(".")[2] for name in group & adapter.changes.keys()}
    return bool(adapter.config.get("ensure_weight_tying")) and (
        not modules.isdisjoint(_PEFT_EMBEDDINGS) or group <= adapter.changes.keys()
    )


def _alike(changes: list[Change], tensors: AdapterTensors) -> bool:
    """Whether all put the same values in place: an adapter may hold a tied tensor once for each of its names."""
    first, *others = changes
    if not isinstance(first, Replacement | TokenRows):
        return False
    # But for the names of parameter and tensors; these are compared by what they hold.
    nameless = {"parameter": "", "source": "", "over": None}
    return all(
        type(other) is type(first)
        and len(other.sources) == len(first.sources)
        and {**vars(first), **nameless} == {**vars(other), **nameless}
        and all(map(tensors.same, first.sources, other.sources))
        for other in others
    )


def _same(one: Stored | None, other: Stored | None) -> bool:
    """Whether two tensors of the base hold the same values."""
    if not isinstance(one, StoredTensor) or not isinstance(other, StoredTensor):
        return False
    if one.shape != other.shape:
        return False
    with TensorReader() as reader:
        blocks = row_blocks(one.shape)
        return all(torch.equal(reader.rows(one, *block), reader.rows(other, *block)) for block in blocks)


def _unusable(parameter: str, held: StoredTensor) -> Iterator[str]:
    """Why a sum cannot be made of a tensor's values: they would have to be scaled first."""
    if held.dtype not in _SUMMABLE:
        dtype = str(held.dtype).removeprefix("torch.")
        yield f"  {parameter}: the base's files hold it as {dtype}; expected bfloat16, float16 or float32"


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
        return None if held is None else self._as_laid(held, parameter)

    def _as_laid(self, held: Stored, parameter: str) -> tuple[int, ...]:
        """The shape in which the model has it: in 4 bits, a Conv1D's weight lies the other way."""
        turned = isinstance(held, PackedTensor) and self._kind(parameter) == "conv1d"
        return held.shape[::-1] if turned else held.shape

    def _kind(self, parameter: str | None) -> Kind:
        return self.skeleton.kinds.get((parameter or "").rpartition(".")[0], "other")

    def target(self, name: str, parameter: str | None, held: Stored | None, change: Change | None) -> Target:
        before = self.shape(parameter) if parameter is not None else None if held is None else held.shape
        module, _, last = (parameter or "").rpartition(".")
        return Target(
            name=name,
            parameter=parameter,
            base=held,
            shape=change.shape(before) if change is not None else before or (),
            change=change,
            kind=self._kind(parameter),
            quantized=last == "weight" and module in self.skeleton.quantized,
            float32_under=self.skeleton.float32_under.get(parameter or "", frozenset()),
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
            if held is None and parameter not in changes and parameter not in self.skeleton.optional:
                yield f"  {parameter}: missing from the base's files"
            elif held is not None and (got := self._as_laid(held, parameter)) != shape:
                yield f"  {parameter}: expected {[*shape]} by the base's config.json, got {[*got]} in its files"
            elif isinstance(held, StoredTensor) and (parameter in changes or held.dtype.is_floating_point):
                yield from _unusable(parameter, held)

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
