"""A whole run, from a recipe to an adapter. The only place that sees the whole recipe; builders get their section."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.disk import tidy, write_text
from qlora_cli.errors import Interrupted, OutOfMemoryError, RunError
from qlora_cli.evaluation.answering.memory import ran_out
from qlora_cli.model.adapter import adapter_files
from qlora_cli.model.lora import lora_parameters
from qlora_cli.model.source import ModelSource, load_config, load_tokenizer
from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.recipe.schema import EvaluationSection, Recipe
from qlora_cli.training.benchmark_plan import BenchmarkPlan, check_answerable, plan_benchmarks
from qlora_cli.training.benchmarks import Benchmarks
from qlora_cli.training.best_checkpoint import BestCheckpoint
from qlora_cli.training.checkpoint import Progress
from qlora_cli.training.context import RunContext
from qlora_cli.training.devices import by_main_process, make_accelerator
from qlora_cli.training.environment import hardware, peak_memory_bytes, reset_peak_memory, versions
from qlora_cli.training.events import (
    EVAL_LOSS,
    Emitter,
    Finished,
    Listener,
    Notice,
    Stage,
    Started,
)
from qlora_cli.training.finishing import write_result
from qlora_cli.training.going_on import check_resumption, go_on
from qlora_cli.training.identity import check_same_everywhere, run_identity
from qlora_cli.training.loading import load_data, load_model
from qlora_cli.training.lock import RunLock
from qlora_cli.training.loop import Loop
from qlora_cli.training.loop_parts import LoopData, LoopOutput
from qlora_cli.training.manifest import Fault
from qlora_cli.training.optim import build_optimizer, runs_unpaged
from qlora_cli.training.out_of_memory import in_training
from qlora_cli.training.record import RunRecord
from qlora_cli.training.rehearsal import rehearse as run_rehearsal
from qlora_cli.training.resume import (
    Resumed,
    check_same_recipe,
    find_checkpoint,
)
from qlora_cli.training.run_folder import MetricsFile, RunFolder
from qlora_cli.training.schedule import endless_warmup, sequences_per_step


def train(
    recipe: Recipe, *, resume: bool = False, rehearse: bool = True, listeners: Sequence[Listener] = ()
) -> Finished:
    """Train the recipe's adapter and leave the run folder complete.

    Args:
        recipe: what to do; `output_dir` is relative to the current folder.
        resume: go on from the newest whole checkpoint there, or begin if there is none.
        rehearse: try the longest batch and a checkpoint before the first step. A run that fails in that has trained
            nothing, and leaves no folder.
        listeners: told of every event, on the main process only.

    Raises:
        RequestError: if the request cannot be carried out; nothing of an earlier run is harmed.
        RunError: if the run fails; `run.json` says how.
        Interrupted: after SIGINT, SIGTERM, SIGHUP or SIGUSR1, with the state saved.
    """
    with RunLock(RunFolder(Path(recipe.output_dir))) as lock:
        return _whole_run(recipe, lock, resume=resume, rehearse=rehearse, listeners=listeners)


def _whole_run(
    recipe: Recipe, lock: RunLock, *, resume: bool, rehearse: bool, listeners: Sequence[Listener]
) -> Finished:
    """The run, under a lock that is taken before anything is written."""
    run = _set_up(recipe, resume, listeners, lock)
    run.emit(Stage(f"reading the tokenizer of {recipe.base_model}"))
    tokenizer = load_tokenizer(run.source)
    scored_on = _plan_benchmarks(run, recipe.evaluation)
    data = load_data(run, recipe.dataset, tokenizer, seed=recipe.training.seed)
    if scored_on is not None:
        check_answerable(scored_on, tokenizer, load_config(run.source), run.accelerator.num_processes)
    accelerator = run.accelerator
    identity = run_identity(
        recipe, run.source, data.fingerprints(), tokenizer, accelerator.device, accelerator.num_processes
    )
    check_same_everywhere(accelerator, recipe, identity)
    if run.resumed is not None:
        check_resumption(run, run.resumed, recipe.training, data, identity)
    model = load_model(
        run,
        recipe.quantization,
        recipe.lora,
        seed=recipe.training.seed,
        packed=recipe.dataset.packing,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
    )
    if not resume:  # there is no folder before
        lock.take(accelerator, resume=False)
    by_main_process(accelerator, lambda: _begin_folder(run, recipe))
    try:
        finished = _train(run, recipe, model, tokenizer, data, scored_on, identity, rehearse=rehearse)
    except BaseException as error:
        _record_failure(run, error)
        if ran_out(error):
            raise OutOfMemoryError(in_training(recipe.training, str(accelerator.device))) from None
        raise
    accelerator.end_training()
    if accelerator.is_main_process:
        run.record.end("completed", peak_memory_bytes=finished.peak_memory_bytes)
        run.emit(finished)
    return finished


def _begin_folder(run: RunContext, recipe: Recipe) -> None:
    run.folder.create()
    write_text(run.folder.recipe, dump_recipe(recipe))
    run.record.write()


def _record_failure(run: RunContext, error: BaseException) -> None:
    """Say in `run.json` how the run ended; a full disk must not hide what went wrong before."""
    if not (run.accelerator.is_main_process and run.folder.record.exists()):  # taken back: nothing was trained
        return
    status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
    peak = peak_memory_bytes(run.accelerator.device)
    with contextlib.suppress(RunError):
        said = "stopped at once" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
        run.record.end(status, error=said, peak_memory_bytes=peak)


def _set_up(recipe: Recipe, resume: bool, listeners: Sequence[Listener], lock: RunLock) -> RunContext:
    """Everything that can refuse the request at once, before data or weights are touched."""
    folder = RunFolder(Path(recipe.output_dir))
    folder.check(resume=resume)
    accelerator = make_accelerator(recipe.training.device)
    reset_peak_memory(accelerator.device)
    # No process may create the folder before the others have looked.
    accelerator.wait_for_everyone()
    resumed: Resumed | None = None
    passed_over: Mapping[Path, Fault] = {}
    if resume:
        lock.take(accelerator, resume=True)
        resumed, passed_over = by_main_process(accelerator, lambda: _tidied_and_found(folder))
    if resumed is not None:
        check_same_recipe(resumed, recipe)
    facts = {"versions": versions(), "hardware": hardware(accelerator.device, accelerator.num_processes)}
    record = RunRecord(folder.record, facts)
    main = accelerator.is_main_process
    emit = Emitter([record, MetricsFile(folder.metrics), *listeners] if main else [])
    source = ModelSource(recipe.base_model, recipe.revision, recipe.trust_remote_code)
    return RunContext(source, folder, accelerator, emit, record, resume, resumed, passed_over)


def _tidied_and_found(folder: RunFolder) -> tuple[Resumed | None, Mapping[Path, Fault]]:
    """The checkpoint to go on from, once what kills have left in the folder is out of the way."""
    tidy(folder.path, folder.adapter.name)
    tidy(folder.checkpoints, "step-*")
    return find_checkpoint(folder)


def _plan_benchmarks(run: RunContext, section: EvaluationSection) -> BenchmarkPlan | None:
    """What the recipe scores the model on, before anything that takes long."""
    if section.names:
        run.emit(Stage(f"reading the benchmarks {', '.join(section.names)}"))
    plan = plan_benchmarks(section)
    for remark in plan.loaded.remarks if plan is not None else ():
        run.emit(Notice(remark))
    return plan


def _train(
    run: RunContext,
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: LoopData,
    scored_on: BenchmarkPlan | None,
    identity: Mapping[str, Any],
    *,
    rehearse: bool,
) -> Finished:
    section, accelerator, folder = recipe.training, run.accelerator, run.folder
    if runs_unpaged(section, accelerator.device):
        run.emit(Notice(f"{section.optimizer} runs unpaged: on a CPU there is no GPU memory to page out of"))
    optimizer = build_optimizer(section, lora_parameters(model), accelerator.device)
    benchmarks = None if scored_on is None else _benchmarks(run, recipe, scored_on, tokenizer)
    best = BestCheckpoint(EVAL_LOSS, higher_is_better=False) if section.load_best else None
    progress = go_on(run, model, optimizer, benchmarks, best) if run.resuming else Progress()
    # Neither model nor optimizer is prepared by Accelerate: its wrapper of an optimizer reloads the state, and so takes
    # paged state out of its pages, and what it wraps a model with is in the way of the same bits (see `DataParallel`).
    output = LoopOutput(
        folder.checkpoints,
        lambda: adapter_files(model, run.source),
        run.emit,
        run=identity,
        durable=(folder.metrics,),
    )
    loop = Loop(accelerator, model, optimizer, section, data, output, progress, benchmarks, best)
    if doubt := endless_warmup(section, loop.total_steps):
        run.emit(Notice(doubt))
    if rehearse and loop.progress.step < loop.total_steps:
        with _taken_back_on_failure(run):
            run_rehearsal(loop)
    run.emit(_started(run, recipe, loop))
    loop.run()
    loaded = None if best is None else best.kept
    by_main_process(accelerator, lambda: write_result(folder.adapter, model, tokenizer, run.source, loaded))
    return Finished(
        adapter=folder.adapter,
        steps=loop.progress.step,
        seconds=loop.progress.seconds,
        tokens=loop.progress.tokens,
        peak_memory_bytes=peak_memory_bytes(accelerator.device),
        first_eval_loss=run.record.eval_loss("first_eval"),
        last_eval_loss=run.record.eval_loss("last_eval"),
        first_scores=run.record.scores("first_benchmark"),
        last_scores=run.record.scores("last_benchmark"),
        best=benchmarks.best.kept if benchmarks is not None and benchmarks.best is not None else None,
        loaded=loaded,
        stopped_early=loop.stopped_early,
        skipped_steps=loop.progress.skipped_steps,
    )


@contextlib.contextmanager
def _taken_back_on_failure(run: RunContext) -> Iterator[None]:
    """If what is inside fails, a fresh run leaves nothing: the same command works once the recipe is mended."""
    try:
        yield
    except BaseException:
        if run.accelerator.is_main_process and not run.resuming:
            run.folder.take_back()
        raise


def _benchmarks(run: RunContext, recipe: Recipe, plan: BenchmarkPlan, tokenizer: PreTrainedTokenizerBase) -> Benchmarks:
    device = run.accelerator.device.type
    base = [recipe.base_model, recipe.revision, recipe.quantization.model_dump(), recipe.lora.alpha]
    facts = json.dumps([versions(), device, *base])
    return Benchmarks(plan, tokenizer, run.accelerator, run.emit, answers=run.folder.answers, model_facts=facts)


def _started(run: RunContext, recipe: Recipe, loop: Loop) -> Started:
    return Started(
        output_dir=run.folder.path,
        first_step=loop.progress.step,
        total_steps=loop.last_step,
        epochs=loop.total_steps / loop.plan.steps_per_epoch,
        sequences_per_step=sequences_per_step(recipe.training, run.accelerator.num_processes),
        packed=recipe.dataset.packing,
    )
