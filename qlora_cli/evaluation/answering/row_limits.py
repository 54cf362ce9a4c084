"""How many rows are written at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from transformers import PreTrainedModel

from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.answering.memory import free_bytes
from qlora_cli.evaluation.answering.rows import Row
from qlora_cli.evaluation.answering.sizes import size

# More rows than these cost as much time as they save.
_MOST_ROWS = {"cpu": 32, "cuda": 256}
_CPU_CACHE_BYTES = 2 * 2**30
# Of what is free on a GPU: the rest is for activations, logits, and the copy that is made when rows leave.
_CACHE_SHARE = 0.4


class RowLimits:
    """Cuts batches out of a queue by what keys and values take; halved whenever memory does not suffice.

    Args:
        model: its configuration says what a token takes.
        batch_size: at most so many rows at once, None for as many as are worth it.
        remark: called with a whole sentence when a limit is lowered.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int | None, remark: Callable[[str], None]) -> None:
        self._device = model.device
        self._rows = batch_size or _MOST_ROWS.get(self._device.type, _MOST_ROWS["cpu"])
        self._token_bytes = cache_bytes_per_token(model)
        self._tokens: int | None = None  # of all rows at once, once memory did not suffice for more
        self._remark = remark

    def take(self, queue: deque[Row]) -> list[Row]:
        """The next batch off the front of the queue: one row at least."""
        batch = [queue.popleft()]
        widest = batch[0].most
        while queue:
            widest = max(widest, queue[0].most)
            if len(batch) >= self.room(widest):
                break
            batch.append(queue.popleft())
        return batch

    def room(self, width: int) -> int:
        """How many rows of so many tokens are written at once: 1 at least."""
        tokens = self._budget() // self._token_bytes
        if self._tokens is not None:
            tokens = min(tokens, self._tokens)
        return max(1, min(self._rows, tokens // width))

    def halve(self, batch: list[Row]) -> None:
        """From now on, at most half as many rows of its length at once as in this batch, which memory did not hold.

        Raises:
            EvaluationError: there was one row only.
        """
        if len(batch) == 1:
            row = batch[0]
            raise EvaluationError(
                f"a prompt of {row.length} tokens and its answer of up to {row.prompt.max_new_tokens} do not fit into "
                f"the memory of {self._device}, even alone\n    Free memory there, load the model in fewer bits "
                "(`--bits 4`), or shorten the prompts (`--num-fewshot`); answers that were given are kept."
            )
        rows = len(batch) // 2
        self._tokens = rows * max(row.most for row in batch)  # short ones may be more
        self._remark(
            f"Memory did not suffice to write {len(batch)} answers at once on {self._device}; going on with "
            f"at most {rows} of their length at once."
        )

    def _budget(self) -> int:
        """Bytes for keys and values."""
        if self._device.type != "cuda":
            return _CPU_CACHE_BYTES
        return int(free_bytes(self._device) * _CACHE_SHARE)


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """What the keys and values of one token take in all layers, by the model's configuration.

    A model that keeps fewer, behind a window or in a state of fixed size, is over-estimated.
    """
    config = model.config.get_text_config(decoder=True)
    heads = size(config, "num_attention_heads", 1)
    key_heads = size(config, "num_key_value_heads", heads)
    width = size(config, "head_dim", max(1, size(config, "hidden_size", 4096) // heads))
    return 2 * size(config, "num_hidden_layers", 32) * key_heads * width * int(model.dtype.itemsize)
