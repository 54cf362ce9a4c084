"""Scores on benchmarks while a model is trained."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.errors import Interrupted
from qlora_cli.evaluation.events import Asking, Remark
from qlora_cli.evaluation.store import AnswerStore
from qlora_cli.model.lora import lora_layers
from qlora_cli.model.packing import without_packing
from qlora_cli.training.benchmark_plan import BenchmarkPlan, is_due
from qlora_cli.training.best_checkpoint import Measured
from qlora_cli.training.events import BenchmarkRecord, Emitter, Notice
from qlora_cli.training.score_names import flatten


class Benchmarks:
    """Scores the model of a run, and knows what was scored.

    Every process of a run has one, and all of them have the same scores. Weights, random state and training mode are
    afterwards as they were.
    """

    def __init__(
        self,
        plan: BenchmarkPlan,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        emit: Emitter,
        *,
        answers: Path,
        model_facts: str,
    ) -> None:
        """Nothing is scored yet.

        Args:
            answers: a folder of the run's own for what was answered before a kill; it is gone once a scoring is done.
            model_facts: what decides the answers beside the trained weights, in any words.
        """
        self.best = plan.best
        self.section = plan.section
        self._plan = plan
        self._tokenizer = tokenizer
        self._accelerator = accelerator
        self._emit = emit
        self._answers = answers
        self._model_facts = model_facts
        self._known: dict[int, BenchmarkRecord] = {}
        self._scored: set[int] = set()
        self._told: set[str] = set()

    def go_on(self, records: Sequence[BenchmarkRecord], step: int) -> list[Measured]:
        """Take over what the first part of a run has scored, which goes on from `step`; returns what chooses the
        checkpoint to keep.

        What it scored later is taken where the run comes by the same weights again.
        """
        self._known = {record.step: record for record in records}
        self._scored = {record.step for record in records if record.step <= step}
        return [self.measured(record) for record in records if record.step <= step]

    def measured(self, record: BenchmarkRecord) -> Measured:
        """What of a record chooses the checkpoint to keep; no number where none is to be kept."""
        name = "" if self.best is None else self.best.name
        return Measured(record.step, {**record.members, **record.scores}.get(name))

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether the model is to be scored after `step` steps, and was not."""
        return step not in self._scored and is_due(self.section, step, total_steps)

    def score(self, model: PreTrainedModel, step: int, stopping: Callable[[], bool]) -> BenchmarkRecord:
        """Score the model as it is after `step` steps.

        Args:
            model: with LoRA layers, not wrapped for data parallelism.
            stopping: asked now and then, by a process that is alone, whether to leave off. What was answered is kept.

        Raises:
            EvaluationError: if it cannot be scored.
            Interrupted: if it was left off.
        """
        started = time.monotonic()
        weights = trained_digest(model)
        record = self._known.get(step)
        if record is None or record.weights != weights:
            results = self._results(model, weights, stopping)
            record = self._record(step, results, weights, time.monotonic() - started)
        self._scored.add(step)
        return record

    def _results(
        self, model: PreTrainedModel, weights: str, stopping: Callable[[], bool]
    ) -> Mapping[str, Mapping[str, Any]]:
        """What lm-eval makes of the answers, for every task and group."""
        from qlora_cli.evaluation.harness import score_tasks
        from qlora_cli.evaluation.scoring import AnsweringModel

        def report(event: Asking | Remark) -> None:
            if isinstance(event, Remark):
                self._tell(event.text)
            else:
                self._emit(event)
            if self._accelerator.num_processes == 1 and stopping():  # several would wait for the one that left
                raise Interrupted("left off scoring; what was answered is kept")

        section, accelerator = self.section, self._accelerator
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()  # what training holds in reserve would look like memory that is taken
        with without_packing(model), AnswerStore(self._answers, f"{self._model_facts}\n{weights}") as store:
            batch_size = section.per_device_batch_size
            lm = AnsweringModel(
                model, self._tokenizer, batch_size=batch_size, store=store, report=report, accelerator=accelerator
            )
            scores = score_tasks(lm, self._plan.loaded, limit=section.limit, chat_template=section.apply_chat_template)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(self._answers, ignore_errors=True)
        return {**scores.results["results"], **scores.results.get("groups", {})}

    def _record(
        self, step: int, results: Mapping[str, Mapping[str, Any]], weights: str, seconds: float
    ) -> BenchmarkRecord:
        scores: dict[str, float | None] = {}
        for name in self._plan.names:
            scores |= flatten(results, name)
        members: dict[str, float | None] = {}
        for name in results.keys() - set(self._plan.names):
            members |= flatten(results, name)
        partly = {name: self._plan.loaded.partly(name) for name in (*self._plan.names, *sorted(results))}
        partial = {name: told for name, told in partly.items() if told is not None}
        return BenchmarkRecord(step, scores, dict(sorted(members.items())), weights, seconds, partial)

    def _tell(self, text: str) -> None:
        """A remark, once in a run."""
        if text not in self._told:
            self._told.add(text)
            self._emit(Notice(text))


def trained_digest(model: nn.Module) -> str:
    """SHA-256 of the trained tensors, by their names."""
    digest = hashlib.sha256()
    for name, layer in sorted(lora_layers(model).items()):
        digest.update(name.encode())
        for tensor in (layer.lora_A, layer.lora_B):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
