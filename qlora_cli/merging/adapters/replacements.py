"""Values of an adapter that take the base's place: whole parameters, and single rows of embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qlora_cli.merging.adapters.changes import Base, Change, Shape, misfit
from qlora_cli.merging.adapters.tensors import AdapterTensors


@dataclass(frozen=True)
class Replacement(Change):
    """A parameter that the adapter holds whole: of a fully saved module, a trained bias, a grown embedding.

    Attributes:
        source: its name in the adapter.
        result: its shape there.
        resizable: whether its rows may be more or fewer than the base's (tokens, labels).
    """

    source: str
    result: Shape
    resizable: bool

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    @property
    def replaces(self) -> bool:
        return True

    def shape(self, base: Shape | None) -> Shape:
        return self.result

    def problem(self, base: Shape | None) -> str | None:
        return None if base is None else misfit(self.parameter, self.result, base, resizable=self.resizable)

    def merged(self, adapter: AdapterTensors, base: Base) -> Iterator[Tensor]:
        return adapter.blocks(self.source)

    def does_nothing(self, adapter: AdapterTensors) -> bool:
        return False


@dataclass(frozen=True)
class TokenRows(Change):
    """Rows of an embedding that were trained by themselves (`trainable_token_indices`) and take the base's place.

    Attributes:
        source: name of the rows [len(indices), width] in the adapter.
        indices: which rows they are, in that order.
        over: name of a whole embedding in the adapter that takes the base's place first.
        over_shape: its shape.
    """

    source: str
    indices: tuple[int, ...]
    width: int
    over: str | None = None
    over_shape: Shape | None = None

    follows_ties: ClassVar[bool] = True

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if self.over is None else (self.source, self.over)

    @property
    def replaces(self) -> bool:
        return self.over is not None

    def shape(self, base: Shape | None) -> Shape:
        if self.over_shape is not None:
            return self.over_shape
        return base if base is not None else (max(self.indices) + 1, self.width)

    def problem(self, base: Shape | None) -> str | None:
        if base is None or len(base) != 2 or base[1] != self.width:
            return misfit(self.parameter, (self.shape(base)[0], self.width), base)
        rows = self.shape(base)[0]
        beyond = [index for index in self.indices if not 0 <= index < rows]
        if beyond:
            return f"{self.parameter}: the adapter has a row for token {beyond[0]}, the base has {rows} rows"
        return None

    def merged(self, adapter: AdapterTensors, base: Base) -> Iterator[Tensor]:
        trained = adapter.whole(self.source)
        start = 0
        for rows in adapter.blocks(self.over) if self.over is not None else base():
            for place, index in enumerate(self.indices):
                if start <= index < start + len(rows):
                    rows[index - start] = trained[place]
            start += len(rows)
            yield rows

    def does_nothing(self, adapter: AdapterTensors) -> bool:
        return False
