"""What an adapter does to one parameter of its base: what every change tells, and those that add to the base.

Each gives what PEFT's `merge_and_unload` gives in float32, bit for bit: the same products over whole matrices, the same
additions in the same order. What can go by blocks of rows does; held whole is only the product B A.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qlora_cli.merging.adapters.tensors import AdapterTensors

# What a module of the model is, which says how its weight lies: linear [out, in], Conv1D [in, out], embedding [rows,
# width].
Kind = Literal["linear", "conv1d", "embedding", "other"]

Shape = tuple[int, ...]

# Consecutive rows of a parameter of the base from the first on, float32, [n, ...] each. A block is the change's own to
# write into. Each call begins anew.
Base = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Change(ABC):
    """What becomes of one parameter.

    Attributes:
        parameter: its name in the model, `model.layers.0.self_attn.q_proj.weight`.
        sources: the adapter's tensors that it is made of, each of them belonging to this change alone.
    """

    parameter: str

    # Whether PEFT makes the change to an input embedding that to what is tied to it as well; else it is for one name.
    follows_ties: ClassVar[bool] = False

    @property
    @abstractmethod
    def sources(self) -> tuple[str, ...]: ...

    @property
    @abstractmethod
    def replaces(self) -> bool:
        """Whether the base's own values have no part in the result."""

    @abstractmethod
    def shape(self, base: Shape | None) -> Shape:
        """Of the result. `base` is the parameter's shape in the base, None where the base has none of that name."""

    @abstractmethod
    def problem(self, base: Shape | None) -> str | None:
        """One line that says why this cannot be done to such a parameter; None if it can."""

    @abstractmethod
    def merged(self, adapter: AdapterTensors, base: Base) -> Iterator[Tensor]:
        """Consecutive rows of the result, float32, together all of it. A change that replaces the parameter does not
        call `base`.

        Raises:
            ModelError: if the adapter's file can no longer be read.
        """

    @abstractmethod
    def does_nothing(self, adapter: AdapterTensors) -> bool:
        """Whether it is plain from the adapter alone that every parameter would stay as it is."""


@dataclass(frozen=True)
class LowRank(Change):
    """W + scale · B A, and with a magnitude m (DoRA) m / ‖W + scale · B A‖ times that, a norm for each output.

    Source of the latter: DoRA (Liu et al. 2024, arXiv 2402.09353), equation 5.

    Attributes:
        a, b: names of A [rank, in] and B [out, rank]; of an embedding, A [rank, rows] and B [width, rank].
        kind: of the module; Conv1D and embeddings hold the transpose of B A.
        result: shape of the weight that A and B are for, as the module holds it.
        magnitude: name of m [out].
        over: name of a whole weight in the adapter that takes the base's place first.
        resizable: whether that may have more or fewer rows than the base's (tokens).
    """

    a: str
    b: str
    scale: float
    kind: Kind
    result: Shape
    magnitude: str | None = None
    over: str | None = None
    resizable: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for name in (self.a, self.b, self.magnitude, self.over) if name is not None)

    @property
    def transposed(self) -> bool:
        """Whether the module holds W as [in, out]."""
        return self.kind != "linear"

    @property
    def replaces(self) -> bool:
        return self.over is not None

    def shape(self, base: Shape | None) -> Shape:
        return self.result

    def problem(self, base: Shape | None) -> str | None:
        return misfit(self.parameter, self.result, base, resizable=self.resizable)

    def merged(self, adapter: AdapterTensors, base: Base) -> Iterator[Tensor]:
        blocks = adapter.blocks(self.over) if self.over is not None else base()
        with adapter.memory(math.prod(self.result)) as memory:
            added = _added(blocks, self._update(adapter, memory))
            if self.magnitude is None:
                yield from added
            elif self.transposed:
                yield from _scaled_columns(added, adapter.whole(self.magnitude), self.result)
            else:
                yield from _scaled_rows(added, adapter.whole(self.magnitude))

    def _update(self, adapter: AdapterTensors, memory: Tensor) -> Tensor:
        """scale · B A as the module holds it, [*result], float32; not contiguous where that is the transpose."""
        a, b = adapter.whole(self.a), adapter.whole(self.b)
        product = memory.view(len(b), a.shape[1])
        if abs(math.frexp(self.scale)[0]) == 0.5:
            # A power of two changes no digit, wherever it is multiplied in; B is the smaller by far.
            torch.mm(b.mul_(self.scale), a, out=product)
        else:
            torch.mm(b, a, out=product).mul_(self.scale)
        return product.t() if self.transposed else product

    def does_nothing(self, adapter: AdapterTensors) -> bool:
        if self.magnitude is not None or self.over is not None:
            return False
        return self.scale == 0 or any(not adapter.whole(name).any() for name in (self.b, self.a))


@dataclass(frozen=True)
class BiasUpdate(Change):
    """b + scale · c, where c is the bias that was trained along with B (`lora_bias`).

    Attributes:
        delta: name of c [out].
        over: name of a whole bias in the adapter that takes the base's place first.
    """

    delta: str
    scale: float
    result: Shape
    over: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.delta,) if self.over is None else (self.delta, self.over)

    @property
    def replaces(self) -> bool:
        return self.over is not None

    def shape(self, base: Shape | None) -> Shape:
        return self.result

    def problem(self, base: Shape | None) -> str | None:
        return misfit(self.parameter, self.result, base)

    def merged(self, adapter: AdapterTensors, base: Base) -> Iterator[Tensor]:
        blocks = adapter.blocks(self.over) if self.over is not None else base()
        return _added(blocks, adapter.whole(self.delta).mul_(self.scale))

    def does_nothing(self, adapter: AdapterTensors) -> bool:
        return self.over is None and (self.scale == 0 or not adapter.whole(self.delta).any())


def _added(blocks: Iterator[Tensor], update: Tensor) -> Iterator[Tensor]:
    start = 0
    for rows in blocks:
        yield rows.add_(update[start : start + len(rows)])
        start += len(rows)


def _scaled_rows(blocks: Iterator[Tensor], magnitude: Tensor) -> Iterator[Tensor]:
    start = 0
    for rows in blocks:
        factor = magnitude[start : start + len(rows)] / torch.linalg.norm(rows, dim=1)
        yield rows.mul_(factor.view(-1, 1))
        start += len(rows)


def _scaled_columns(blocks: Iterator[Tensor], magnitude: Tensor, shape: Shape) -> Iterator[Tensor]:
    """The norms run down the columns, so that all of the sum has to be there before the first row of the result."""
    whole = torch.empty(shape, dtype=torch.float32)
    cuts = [0]
    for rows in blocks:
        cuts.append(cuts[-1] + len(rows))
        whole[cuts[-2] : cuts[-1]] = rows
    # The layout is PEFT's; along rows the squares would be summed in another order.
    factor = magnitude / torch.linalg.norm(whole.t(), dim=1)
    for start, stop in pairwise(cuts):
        yield whole[start:stop].mul_(factor)


def misfit(parameter: str, adapter: Shape, base: Shape | None, *, resizable: bool = False) -> str | None:
    """Why what the adapter has for a parameter does not fit the base's; `resizable`: the number of rows may differ."""
    if base is None:
        return f"{parameter}: the adapter changes it, the base has no parameter of that name"
    if resizable and len(adapter) == len(base) > 0 and adapter[1:] == base[1:]:
        return None
    if base != adapter:
        return f"{parameter}: the adapter is for {list(adapter)}, the base has {list(base)}"
    return None
