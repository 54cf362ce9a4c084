"""The keys and values of rows that are written on: with room to grow, and rows that leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# Columns that are added at a time: the cache is copied once for so many tokens, not once for each.
BLOCK = 64


class RowLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values of all rows, in a buffer that is longer than what it holds.

    transformers' own layer joins old and new keys into a new tensor at every token, which for many long rows costs
    as much as the attention itself.

    Args:
        keys, values: [rows, heads, room, width]; what lies behind the filled columns is overwritten.
        columns: how many are filled.
    """

    def __init__(self, keys: Tensor, values: Tensor, columns: int) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._hold(_Buffer(keys, columns), _Buffer(values, columns))

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new columns, [rows, heads, new columns, width] each; returns all keys and values there are."""
        self._hold(self._key_buffer.extended(key_states), self._value_buffer.extended(value_states))
        return self.keys, self.values

    def keep(self, rows: Tensor, first_column: int) -> None:
        """Drop all but these rows (indices, [rows kept], int64), and the columns before `first_column`."""
        self._hold(self._key_buffer.of(rows, first_column), self._value_buffer.of(rows, first_column))

    def _hold(self, keys: _Buffer, values: _Buffer) -> None:
        self._key_buffer, self._value_buffer = keys, values
        self.keys, self.values = keys.filled, values.filled


class RowCache(Cache):  # type: ignore[misc]
    """What a model has read of several rows, padded on the left to one length.

    Args:
        layers: keys and values of each layer, [rows, heads, room, width]; what lies behind the filled columns is
            overwritten.
        columns: how many are filled.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], columns: int) -> None:
        super().__init__(layers=[RowLayer(keys, values, columns) for keys, values in layers])

    def keep(self, rows: Tensor, first_column: int) -> None:
        """Drop all but these rows (indices, [rows kept], int64), and the columns before `first_column`."""
        for layer in self.layers:
            layer.keep(rows.to(layer.device), first_column)


class _Buffer:
    """A tensor [rows, heads, room, width] of which the first `columns` of `room` are filled."""

    def __init__(self, room: Tensor, columns: int) -> None:
        self._room = room
        self._columns = columns

    @property
    def filled(self) -> Tensor:
        return self._room[:, :, : self._columns]

    def of(self, rows: Tensor, first_column: int) -> _Buffer:
        return _Buffer(self._room[:, :, first_column:].index_select(0, rows), self._columns - first_column)

    def extended(self, new: Tensor) -> _Buffer:
        end = self._columns + new.shape[2]
        room = self._room
        if end > room.shape[2]:
            rows, heads, _, width = room.shape
            room = torch.empty((rows, heads, end + BLOCK - 1, width), dtype=room.dtype, device=room.device)
            room[:, :, : self._columns] = self.filled
        room[:, :, self._columns : end] = new
        return _Buffer(room, end)
