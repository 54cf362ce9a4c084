"""What a model writes after a prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.evaluation.answering.borrowed_generation import write_rows
from qlora_cli.evaluation.answering.decoding import GreedyRows
from qlora_cli.evaluation.answering.greedy_rules import is_greedy, repetition_penalty, unusual_settings
from qlora_cli.evaluation.answering.prefill import read_rows
from qlora_cli.evaluation.answering.questions import Progress, Prompt
from qlora_cli.evaluation.answering.row_limits import RowLimits
from qlora_cli.evaluation.answering.rows import Row
from qlora_cli.evaluation.answering.stops import Stops, end_tokens


class Generator:
    """Answers prompts, many at once.

    Greedy answers are written by a loop of our own where the model allows it: prompts that begin alike are read
    once, and a row that is complete leaves the batch. All else goes through transformers' `generate`.

    Args:
        model: a causal language model in eval mode, on its device.
        tokenizer: decodes what the model writes.
        batch_size: at most so many rows at once; None goes by the memory there is.
        stop_ids: tokens that end an answer; None for those of the model's generation configuration.
        seed: of sampling; the process' own random state is left alone.
        remark: called with whole sentences that a person should know, such as that memory did not suffice.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int | None = None,
        stop_ids: Collection[int] | None = None,
        seed: int = 1234,
        remark: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._stop_ids = end_tokens(model) if stop_ids is None else frozenset(stop_ids)
        self._seed = seed
        self._limits = RowLimits(model, batch_size, remark)
        self.why = _why_borrowed(model)

    @property
    def name(self) -> str:
        """Who writes greedy answers."""
        return "our own loop" if self.why is None else "transformers' generate"

    def generate(self, prompts: Sequence[Prompt], progress: Progress) -> Iterator[tuple[int, str]]:
        """The answers, as soon as they are known: the index into `prompts`, and the text before the first stop text.

        Args:
            prompts: may be equal: a greedy answer is written once, a sampled one as often as it is asked for.
            progress: called with tokens that are done, of all that are read or may be written; an answer that ends
                early counts in full.

        Raises:
            EvaluationError: one row alone does not fit into memory, or transformers refuses sampling arguments.
        """
        tally = _Tally(prompts, progress)
        for rows in self._kinds(prompts):
            for row in self._answered(rows, tally):
                tally.finish(row)
                text = row.text
                for index in row.questions:
                    yield index, text

    def _kinds(self, prompts: Sequence[Prompt]) -> list[list[Row]]:
        """Rows by their sampling arguments, as only the same can be written together; greedy ones first."""
        stops: dict[tuple[str, ...], Stops] = {}
        same: dict[tuple[tuple[int, ...], tuple[str, ...], int], Row] = {}
        drawn: dict[str, list[Row]] = {}
        for index, prompt in enumerate(prompts):
            ends = stops.setdefault(prompt.until, Stops(self._tokenizer, prompt.until, self._stop_ids))
            if not is_greedy(prompt.sampling):
                drawn.setdefault(repr(sorted(prompt.sampling.items())), []).append(Row(prompt, ends, [index]))
                continue
            key = (prompt.tokens, prompt.until, prompt.max_new_tokens)
            same.setdefault(key, Row(prompt, ends, [])).questions.append(index)
        return [rows for rows in (list(same.values()), *drawn.values()) if rows]

    def _answered(self, rows: list[Row], tally: _Tally) -> Iterator[Row]:
        """Every one of these rows, once it is complete; half as many at once whenever memory does not suffice."""
        yield from (row for row in rows if row.complete)
        queue = deque(sorted((row for row in rows if not row.complete), key=lambda row: -row.length))
        while queue:
            batch = self._limits.take(queue)
            open_rows = dict.fromkeys(map(id, batch))
            try:
                for row in self._written(batch, tally):
                    del open_rows[id(row)]
                    yield row
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            if open_rows:
                self._limits.halve(batch)
                left = [row for row in batch if id(row) in open_rows]
                for row in left:
                    row.written.clear()
                queue.extendleft(reversed(left))

    def _written(self, batch: list[Row], tally: _Tally) -> Iterator[Row]:
        if self.why is None and is_greedy(batch[0].prompt.sampling):
            cache, logits = read_rows(self._model, batch)
            rows = GreedyRows(self._model, batch, cache, logits, repetition_penalty(self._model))
            while unfinished := rows.unfinished:
                tally.tell(unfinished)
                yield from rows.advance()
        else:
            write_rows(
                self._model,
                self._tokenizer,
                batch,
                stop_ids=self._stop_ids,
                seed=self._seed + batch[0].questions[0],
            )
            yield from batch


class _Tally:
    """Tokens that are done, of all that are read or may be written."""

    def __init__(self, prompts: Sequence[Prompt], progress: Progress) -> None:
        self._progress = progress
        self._all = sum(len(prompt.tokens) + prompt.max_new_tokens for prompt in prompts)
        self._finished = 0

    def finish(self, row: Row) -> None:
        self._finished += row.most * len(row.questions)
        self.tell(())

    def tell(self, unfinished: Sequence[Row]) -> None:
        """With what the rows in the making have come to."""
        begun = sum((row.length + len(row.written)) * len(row.questions) for row in unfinished)
        self._progress(self._finished + begun, self._all)


def _why_borrowed(model: PreTrainedModel) -> str | None:
    """Why greedy answers go through transformers' `generate`, None where they need not."""
    if settings := unusual_settings(model):
        return f"the model's generation configuration sets {', '.join(settings)}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    import torch
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
