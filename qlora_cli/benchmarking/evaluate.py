"""A whole evaluation: from the name of a target to a table, with the base beside it, and a results file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator_utils import get_sample_size
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.benchmarking.dataset_loss import DatasetRows, DatasetScore, dataset_loss, read_dataset
from qlora_cli.benchmarking.dataset_section import dataset_section
from qlora_cli.benchmarking.events import Evaluated, Event, Listener, Prepared, Turn, Who
from qlora_cli.benchmarking.request import EvalRequest
from qlora_cli.benchmarking.results_file import write_files
from qlora_cli.benchmarking.rows import loss_row, metrics_of, score_rows
from qlora_cli.benchmarking.target import Target, find_target
from qlora_cli.benchmarking.unscored import unscored
from qlora_cli.errors import EvaluationError, RequestError
from qlora_cli.evaluation.answering.memory import ran_out
from qlora_cli.evaluation.events import Asking, Remark
from qlora_cli.evaluation.harness import TaskScores, score_tasks
from qlora_cli.evaluation.scoring import AnsweringModel
from qlora_cli.evaluation.store import AnswerStore, answers_folder
from qlora_cli.evaluation.tasks.build import build_tasks
from qlora_cli.evaluation.tasks.index import load_index
from qlora_cli.evaluation.tasks.loaded import LoadedTasks, TaskOptions
from qlora_cli.evaluation.tasks.names import choose
from qlora_cli.training.devices import make_accelerator
from qlora_cli.training.events import EncodingProgress, EvaluationProgress, Notice, Stage


def evaluate(request: EvalRequest, *, listeners: Sequence[Listener] = ()) -> Evaluated:
    """Score a target on tasks, on a dataset's rows, or on both, and the base beside it if that is asked for.

    What a killed evaluation was answered is kept: the same request goes on from there. Under `accelerate launch` or
    `torchrun` the documents are shared by all processes; the first of them tells and writes.

    Args:
        listeners: told of every event, on the first process only.

    Raises:
        RequestError: if it cannot be done as asked, before any weight is read.
        EvaluationError: if it began and could not be finished.
        RunError: if the results cannot be written.
    """
    began = time.monotonic()
    request = replace(request, system_instruction=request.system_instruction or None)
    accelerator = make_accelerator(request.device, asked_with="--device")
    job = _Job(request, accelerator, tuple(listeners) if accelerator.is_main_process else ())
    target = job.find_target()
    loaded = job.load_tasks()
    tokenizer = target.tokenizer()
    rows = job.read_rows(target, tokenizer)
    prepared = _prepared(request, target, loaded, rows)
    job.emit(prepared)
    job.emit(Stage(f"loading {target.name}"))
    with _telling_of_memory(target, accelerator.device):
        asked = _Asked(job, target, loaded, rows, tokenizer, target.load(accelerator.device))
        ours = asked.ask("target")
        job.tell_unscored(loaded, ours)
        theirs = asked.ask("base") if request.baseline else _Answers()
    evaluated = replace(
        _evaluated(prepared, loaded, ours, theirs, rows),
        seconds=time.monotonic() - began,
        limit=request.limit,
        seed=request.seed,
        system_instruction=request.system_instruction,
    )
    job.emit(evaluated)  # before anything is written, which may fail
    return _write(job, target, loaded, ours, theirs, evaluated)


@dataclass(frozen=True)
class _Answers:
    """What one of the two models said."""

    tasks: TaskScores | None = None
    rows: DatasetScore | None = None


@dataclass(frozen=True)
class _Job:
    """What the parts of one evaluation share."""

    request: EvalRequest
    accelerator: Any
    listeners: tuple[Listener, ...]

    def emit(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)

    def report(self, event: Asking | Remark) -> None:
        self.emit(Notice(event.text) if isinstance(event, Remark) else event)

    def find_target(self) -> Target:
        request = self.request
        self.emit(Stage(f"looking at {request.target}"))
        target = find_target(
            request.target,
            bits=request.bits,
            base_model=request.base_model,
            revision=request.revision,
            trained_base=request.trained_base,
            trust_remote_code=request.trust_remote_code,
        )
        if request.baseline and target.adapter is None:
            raise RequestError(
                f"--baseline: {target.name} is a whole model, and has no base to set beside it. Leave it out, or score "
                "both models, each with --output FILE"
            )
        for remark in target.remarks:
            self.emit(Notice(remark))
        return target

    def load_tasks(self) -> LoadedTasks:
        request = self.request
        if not request.tasks:
            return LoadedTasks({}, {})
        self.emit(Stage("reading the tasks' documents"))
        index = load_index(request.task_paths)
        options = TaskOptions(
            data_root=request.data_root,
            allow_partial=request.allow_partial,
            trust_remote_code=request.trust_remote_code,
            run_unsafe_code=request.run_unsafe_code,
            num_fewshot=request.num_fewshot,
            seed=request.seed,
        )
        loaded = build_tasks(choose(request.tasks, index), index, options)
        for remark in loaded.remarks:
            self.emit(Notice(remark))
        return loaded

    def tell_unscored(self, loaded: LoadedTasks, answers: _Answers) -> None:
        """Remark on what has no score; raise EvaluationError if nothing has one, and no answers are to be written."""
        if answers.tasks is None:
            return
        results = answers.tasks.results["results"]
        told = list(unscored(loaded, results))
        of_use = answers.rows is not None or (self.request.log_samples and self.request.output is not None)
        if not of_use and not any(map(metrics_of, results.values())):
            raise EvaluationError("\n".join(told))
        for remark in told:
            self.emit(Notice(remark))

    def read_rows(self, target: Target, tokenizer: PreTrainedTokenizerBase) -> DatasetRows | None:
        request = self.request
        if request.dataset is None:
            return None
        self.emit(Stage("reading and encoding the rows"))
        section = dataset_section(request.dataset, target, request.overrides)
        rows = read_dataset(
            target,
            section,
            tokenizer,
            limit=request.limit,
            report=lambda progress: self.emit(EncodingProgress(*progress)),
        )
        for remark in rows.remarks:
            self.emit(Notice(remark))
        return rows


@dataclass(frozen=True)
class _Asked:
    """A loaded model, and what it is asked with its adapter and without."""

    job: _Job
    target: Target
    loaded: LoadedTasks
    rows: DatasetRows | None
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel

    def ask(self, who: Who) -> _Answers:
        self.job.emit(Turn(who))
        with nullcontext() if who == "target" else self.target.without_adapter(self.model):
            return _Answers(self._ask_tasks(who), self._ask_rows())

    def _ask_tasks(self, who: Who) -> TaskScores | None:
        if not self.loaded.tasks:
            return None
        request, job = self.job.request, self.job
        with self._store(who) as store:
            lm = AnsweringModel(
                self.model,
                self.tokenizer,
                batch_size=request.batch_size,
                store=store,
                report=job.report,
                accelerator=job.accelerator if job.accelerator.num_processes > 1 else None,
                seed=request.seed,
            )
            return score_tasks(
                lm,
                self.loaded,
                limit=request.limit,
                chat_template=request.chat_template,
                system_instruction=request.system_instruction,
                seed=request.seed,
            )

    def _store(self, who: Who) -> AnswerStore:
        """The answers that this model gave before."""
        if not self.job.request.keep_answers:
            return AnswerStore(None, "")
        try:
            folder = answers_folder()
        except RuntimeError:  # a user without a home
            return AnswerStore(None, "")
        fingerprint = self.target.fingerprint(self.model.device, with_adapter=who == "target")
        return AnswerStore(folder, fingerprint)

    def _ask_rows(self) -> DatasetScore | None:
        if self.rows is None:
            return None
        return dataset_loss(
            self.model,
            self.rows,
            batch_size=self.job.request.batch_size,
            progress=lambda done, of: self.job.emit(EvaluationProgress(done, of)),
        )


@contextmanager
def _telling_of_memory(target: Target, device: torch.device) -> Iterator[None]:
    """Too little memory, where less of it at a time is no remedy: for the weights, or beside them."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise EvaluationError(
            f"memory ran out on {device}: it does not hold {target.name} ({target.storage}) and what is computed with "
            "it. Free memory there, evaluate with --bits 4, or on a machine with more of it; answers that were given "
            "are kept"
        ) from None


def _prepared(request: EvalRequest, target: Target, loaded: LoadedTasks, rows: DatasetRows | None) -> Prepared:
    documents = 0 if rows is None else rows.kept.rows
    for task in loaded.tasks.values():
        there, wanted = len(task.eval_docs), get_sample_size(task, request.limit)
        documents += there if wanted is None else min(there, wanted)
    return Prepared(
        target=f"the {target.kind} {target.name}",
        storage=target.storage,
        base=None if target.adapter is None else target.facts()["base_model"],
        tasks=len(loaded.tasks),
        documents=documents,
    )


def _evaluated(
    prepared: Prepared, loaded: LoadedTasks, ours: _Answers, theirs: _Answers, rows: DatasetRows | None
) -> Evaluated:
    tasks = [scores for scores in (ours.tasks, theirs.tasks) if scores is not None]
    template = None
    if ours.tasks is not None and ours.tasks.settings["chat_template"] is not None:
        template = "the tokenizer's chat template"
    return Evaluated(
        prepared=prepared,
        # Samples are there on the first process alone.
        scores=() if ours.tasks is None or not ours.tasks.samples else score_rows(loaded, ours.tasks, theirs.tasks),
        losses=() if rows is None or ours.rows is None else (loss_row(rows, ours.rows, theirs.rows),),
        template=template,
        way=None if ours.tasks is None else ours.tasks.way,
        answers=sum(scores.questions for scores in tasks),
        kept=sum(scores.kept for scores in tasks),
        seconds=0.0,
    )


def _write(
    job: _Job, target: Target, loaded: LoadedTasks, ours: _Answers, theirs: _Answers, all_: Evaluated
) -> Evaluated:
    """Write and tell of the files that are asked for: of several processes, the first does."""
    request = job.request
    if request.output is None or not job.accelerator.is_main_process:
        return all_
    files: dict[str, tuple[Path, ...]] = {}
    for written in write_files(
        request.output, target, loaded, ours.tasks, theirs.tasks, all_, log_samples=request.log_samples
    ):
        job.emit(written)
        files[written.what] = written.files
    return replace(all_, output=files["results"][0], samples=files.get("samples", ()))
