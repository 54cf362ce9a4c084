"""What a model writes after a prompt."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.evaluation.answering.borrowed_generation import write_rows
from qlora_cli.evaluation.answering.decoding import GreedyRows
from qlora_cli.evaluation.answering.decoding_trial import fault_in_decoding
from qlora_cli.evaluation.answering.greedy_rules import is_greedy, repetition_penalty, unusual_settings
from qlora_cli.evaluation.answering.memory import counted, within_memory
from qlora_cli.evaluation.answering.prefill import PromptReader
from qlora_cli.evaluation.answering.questions import Progress, Prompt
from qlora_cli.evaluation.answering.row_limits import RowLimits
from qlora_cli.evaluation.answering.rows import Row
from qlora_cli.evaluation.answering.sizes import size
from qlora_cli.evaluation.answering.stops import Stops, end_tokens
from qlora_cli.evaluation.answering.together import Together, written_together
from qlora_cli.evaluation.answering.trial import Verdict, examine, rope_reach


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
        self._remark = remark
        self._told = False
        self._limits = RowLimits(model, batch_size, remark)

    @functools.cached_property
    def why(self) -> str | None:
        """Why greedy answers go through transformers' `generate`; None where they need not."""
        if settings := unusual_settings(self._model):
            return f"the model's generation configuration sets {', '.join(settings)}"
        return self._verdict.fault or fault_in_decoding(self._model, self._tokenizer)

    @functools.cached_property
    def _together(self) -> Together:
        """Which rows may share a batch of `generate`."""
        together = written_together(self._model)
        if together != "any":
            which = "only prompts of one length" if together == "one length" else "only one prompt"
            self._remark(
                f"Answers are written to {which} at a time, which takes longer: in a trial the model did not go on "
                "from prompts of several lengths together as it does from each alone"
            )
        return together

    @functools.cached_property
    def _verdict(self) -> Verdict:
        return examine(self._model)

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
                alike = drawn.setdefault(repr(sorted(prompt.sampling.items())), [])
                alike.append(Row(prompt, ends, [index], number=len(alike)))
                continue
            key = (prompt.tokens, prompt.until, prompt.max_new_tokens)
            same.setdefault(key, Row(prompt, ends, [])).questions.append(index)
        return [rows for rows in (list(same.values()), *drawn.values()) if rows]

    def _answered(self, rows: list[Row], tally: _Tally) -> Iterator[Row]:
        """Every one of these rows, once it is complete; half as many at once whenever memory does not suffice."""
        yield from (row for row in rows if row.complete)
        for writer in self._writers([row for row in rows if not row.complete], tally):
            queue = deque(writer.rows)
            while queue:
                batch = self._limits.take(queue)
                unanswered = dict.fromkeys(batch)
                for row in writer.write(batch):
                    del unanswered[row]
                    yield row
                if unanswered:
                    self._limits.halve(batch)
                    for row in unanswered:
                        row.written.clear()
                    queue.extendleft(reversed(unanswered))

    def _writers(self, rows: list[Row], tally: _Tally) -> Iterator[_OwnWriter | _BorrowedWriter]:
        """Who writes these rows, which have the same sampling arguments."""
        if rows and is_greedy(rows[0].prompt.sampling):
            own = [row for row in rows if self._fits_own(row)]
            if own:
                yield _OwnWriter(self._model, own, tally)
            rows = [row for row in rows if not self._fits_own(row)]
            self._tell_borrowed(rows)
        for together in self._alike(rows):
            for group in self._within_context(together):
                yield _BorrowedWriter(
                    self._model, self._tokenizer, group, tally, stop_ids=self._stop_ids, seed=self._seed
                )

    def _alike(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Rows that may share a batch, padded to one length, without changing each other's answers."""
        if len(rows) == 1 or (rows and self._together == "none"):
            yield from ([row] for row in rows)
            return
        padded: list[Row] = []
        by_length: dict[int, list[Row]] = {}
        reach = rope_reach(self._model)
        for row in rows:
            free = self._together == "any" and (reach is None or row.most <= reach)
            (padded if free else by_length.setdefault(row.length, [])).append(row)
        # The longest first, as in the hf backend: dynamic frequencies stay those of the longest row before.
        yield from filter(None, (padded, *(by_length[length] for length in sorted(by_length, reverse=True))))

    def _within_context(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Rows that `generate` can read on together: complete ones for as long as the longest answer takes."""
        context = size(self._model.config.get_text_config(decoder=True), "max_position_embeddings", 0)
        limits = [limit for limit in (context, rope_reach(self._model)) if limit]
        limit = max([min(limits, default=sum(row.most for row in rows)), *(row.most for row in rows)])
        while rows:
            longest = max(row.prompt.max_new_tokens for row in rows)
            yield [row for row in rows if row.length + longest <= limit]
            rows = [row for row in rows if row.length + longest > limit]

    def _fits_own(self, row: Row) -> bool:
        """Whether this greedy answer can be written by our own loop, to its longest."""
        return self.why is None and (self._verdict.reach is None or row.most <= self._verdict.reach)

    def _tell_borrowed(self, rows: Sequence[Row]) -> None:
        """Say once why greedy answers take longer than they might."""
        if not rows or self._told:
            return
        self._told = True
        if self.why is not None:
            told = f"Greedy answers are written by transformers' generate, which takes longer: {self.why}"
        else:
            told = (
                f"{counted(len(rows), 'answer')} may become longer than the {self._verdict.reach:,} tokens that every "
                "layer of the model looks back on; written by transformers' generate, which takes longer"
            )
        self._remark(told)


class _OwnWriter:
    """Writes greedy answers with the loop of our own.

    Attributes:
        rows: in the order in which batches are to be cut from them.
    """

    def __init__(self, model: PreTrainedModel, rows: list[Row], tally: _Tally) -> None:
        self._model = model
        self._reader = PromptReader(model, rows)
        self._tally = tally
        self.rows = self._reader.rows

    def write(self, batch: list[Row]) -> Iterator[Row]:
        """The rows of a batch, once they are complete; memory did not suffice for those that do not come."""
        rows = within_memory(self._begun, batch)
        while rows is not None and (unfinished := rows.unfinished):
            self._tally.write({row: len(row.written) for row in unfinished})
            completed = within_memory(rows.advance)
            if completed is None:
                return
            yield from completed

    def _begun(self, batch: list[Row]) -> GreedyRows:
        return GreedyRows(self._model, batch, *self._reader.read(batch), repetition_penalty(self._model))


class _BorrowedWriter:
    """Writes answers with transformers' `generate`.

    Attributes:
        rows: in the order in which batches are to be cut from them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[Row],
        tally: _Tally,
        *,
        stop_ids: Collection[int],
        seed: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._tally = tally
        self._stop_ids = stop_ids
        self._seed = seed
        self.rows = sorted(rows, key=lambda row: -row.length)

    def write(self, batch: list[Row]) -> Iterator[Row]:
        """The rows of a batch; none of them if memory does not suffice."""
        written = within_memory(
            write_rows,
            self._model,
            self._tokenizer,
            batch,
            stop_ids=self._stop_ids,
            # Another for each batch: they would all be drawn with the same luck.
            seed=self._seed + batch[0].number,
            each_token=lambda count: self._tally.write(dict.fromkeys(batch, count)),
        )
        if written:
            yield from batch


class _Tally:
    """Tokens that are done, of all that are read or may be written."""

    def __init__(self, prompts: Sequence[Prompt], progress: Progress) -> None:
        self._progress = progress
        self._all = sum(len(prompt.tokens) + prompt.max_new_tokens for prompt in prompts)
        self._finished = 0
        self._told = 0
        self._writing: dict[Row, int] = {}

    def write(self, rows: Mapping[Row, int]) -> None:
        """These are the rows in the making, and how many tokens of each are written."""
        self._writing = dict(rows)
        self._tell()

    def finish(self, row: Row) -> None:
        """This row is complete."""
        self._writing.pop(row, None)
        self._finished += row.most * len(row.questions)
        self._tell()

    def _tell(self) -> None:
        begun = sum(min(row.length + count, row.most) * len(row.questions) for row, count in self._writing.items())
        # What is written anew because memory ran out has been told already.
        self._told = max(self._told, self._finished + begun)
        self._progress(self._told, self._all)
