"""A whole run, from a recipe to an adapter. The only place that sees the whole recipe; builders get their section."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.data.units import make_units
from qlora_cli.disk import replacing_folder, tidy, write_text
from qlora_cli.errors import Interrupted, RunError
from qlora_cli.model.adapter import adapter_files, save_adapter
from qlora_cli.model.base import checkpoint_activations, load_base
from qlora_cli.model.inject import inject
from qlora_cli.model.lora import lora_parameters
from qlora_cli.model.packing import prepare_packing
from qlora_cli.model.quantization import measure_storage
from qlora_cli.model.source import ModelSource, load_config, load_tokenizer
from qlora_cli.model.storage import compute_dtype, describe_storage
from qlora_cli.recipe.dump import dump_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.benchmark_plan import BenchmarkPlan, check_answerable, plan_benchmarks
from qlora_cli.training.benchmarks import Benchmarks
from qlora_cli.training.checkpoint import Progress, set_aside
from qlora_cli.training.devices import make_accelerator
from qlora_cli.training.doubts import doubts
from qlora_cli.training.environment import hardware, peak_memory_bytes, reset_peak_memory, versions
from qlora_cli.training.events import Emitter, EncodingProgress, Finished, Listener, ModelReady, Notice, Stage, Started
from qlora_cli.training.identity import run_identity
from qlora_cli.training.loop import Loop, LoopData, LoopOutput
from qlora_cli.training.optim import build_optimizer, runs_unpaged
from qlora_cli.training.preparation import prepare
from qlora_cli.training.record import RunRecord
from qlora_cli.training.resume import (
    Resumed,
    check_position,
    check_same_material,
    check_same_recipe,
    doubts_about_the_rest,
    find_checkpoint,
    restore,
)
from qlora_cli.training.run_folder import MetricsFile, RunFolder
from qlora_cli.training.schedule import endless_warmup, sequences_per_step, step_plan


@dataclass(frozen=True)
class _Run:
    """What the parts of one run share."""

    recipe: Recipe
    source: ModelSource
    folder: RunFolder
    accelerator: Accelerator
    emit: Emitter
    record: RunRecord
    resuming: bool
    resumed: Resumed | None
    passed_over: Mapping[Path, str]


def train(recipe: Recipe, *, resume: bool = False, listeners: Sequence[Listener] = ()) -> Finished:
    """Train the recipe's adapter and leave the run folder complete.

    Args:
        recipe: what to do; `output_dir` is relative to the current folder.
        resume: go on from the newest whole checkpoint there, or begin if there is none.
        listeners: told of every event, on the main process only.

    Raises:
        RequestError: if the request cannot be carried out; nothing of an earlier run is harmed.
        RunError: if the run fails; `run.json` says how.
        Interrupted: after SIGINT or SIGTERM, with the state saved.
    """
    run = _set_up(recipe, resume, listeners)
    run.emit(Stage(f"reading the tokenizer of {recipe.base_model}"))
    tokenizer = load_tokenizer(run.source)
    scored_on = _plan_benchmarks(run)
    data = _load_data(run, tokenizer)
    if scored_on is not None:
        check_answerable(scored_on, tokenizer, load_config(run.source), run.accelerator.num_processes)
    accelerator = run.accelerator
    identity = run_identity(recipe, run.source, data.fingerprints(), accelerator.device, accelerator.num_processes)
    if run.resumed is not None:
        _check_resumption(run, run.resumed, data, identity)
    model = _load_model(run)
    if accelerator.is_main_process:
        run.folder.create()
        write_text(run.folder.recipe, dump_recipe(recipe))
        run.record.write()
    try:
        finished = _train(run, model, tokenizer, data, scored_on, identity)
    except BaseException as error:
        _record_failure(run, error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # the CPU's wording
            raise RunError(_out_of_memory(run)) from None
        raise
    accelerator.end_training()
    if accelerator.is_main_process:
        run.record.end("completed", peak_memory_bytes=finished.peak_memory_bytes)
        run.emit(finished)
    return finished


def _check_resumption(run: _Run, resumed: Resumed, data: LoopData, identity: Mapping[str, Any]) -> None:
    """Refuse to go on with other rows, or for fewer steps; say what else makes it another run."""
    check_same_material(resumed, identity)
    section = run.recipe.training
    plan = step_plan(section, data.train, run.accelerator.num_processes)
    check_position(resumed, section, plan)
    for doubt in doubts_about_the_rest(resumed, section, plan, identity):
        run.emit(Notice(doubt))


def _record_failure(run: _Run, error: BaseException) -> None:
    """Say in `run.json` how the run ended; a full disk must not hide what went wrong before."""
    if not run.accelerator.is_main_process:
        return
    status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
    peak = peak_memory_bytes(run.accelerator.device)
    with contextlib.suppress(RunError):
        run.record.end(status, error=str(error) or type(error).__name__, peak_memory_bytes=peak)


def _set_up(recipe: Recipe, resume: bool, listeners: Sequence[Listener]) -> _Run:
    """Everything that can refuse the request at once, before data or weights are touched."""
    folder = RunFolder(Path(recipe.output_dir))
    folder.check(resume=resume)
    accelerator = make_accelerator(recipe.training.device, scores_tasks=bool(recipe.evaluation.names))
    if resume and accelerator.is_main_process:
        for place in (folder.path, folder.checkpoints):
            tidy(place)
    accelerator.wait_for_everyone()
    resumed, passed_over = find_checkpoint(folder.path, folder.checkpoints) if resume else (None, {})
    if resumed is not None:
        check_same_recipe(resumed, recipe)
    reset_peak_memory(accelerator.device)
    # No process may create the folder before the others have looked.
    accelerator.wait_for_everyone()
    facts = {"versions": versions(), "hardware": hardware(accelerator.device, accelerator.num_processes)}
    record = RunRecord(folder.record, facts)
    main = accelerator.is_main_process
    emit = Emitter([record, MetricsFile(folder.metrics), *listeners] if main else [])
    source = ModelSource(recipe.base_model, recipe.revision, recipe.trust_remote_code)
    return _Run(recipe, source, folder, accelerator, emit, record, resume, resumed, passed_over)


def _plan_benchmarks(run: _Run) -> BenchmarkPlan | None:
    """What the recipe scores the model on, before anything that takes long."""
    if run.recipe.evaluation.names:
        run.emit(Stage(f"reading the benchmarks {', '.join(run.recipe.evaluation.names)}"))
    plan = plan_benchmarks(run.recipe.evaluation)
    for remark in plan.loaded.remarks if plan is not None else ():
        run.emit(Notice(remark))
    return plan


def _load_data(run: _Run, tokenizer: PreTrainedTokenizerBase) -> LoopData:
    section = run.recipe.dataset
    config = load_config(run.source)
    run.emit(Stage("reading and encoding the rows"))
    train, validation = prepare(
        section,
        tokenizer,
        config,
        seed=run.recipe.training.seed,
        today=run.record.started_on,
        report=lambda progress: run.emit(EncodingProgress(*progress)),
    )
    for split in (train, validation):
        if split is not None:
            run.emit(split.ready())
    for doubt in doubts(train, validation, section, tokenizer):
        run.emit(Notice(doubt))
    pad_token_id = int(tokenizer.pad_token_id or 0)
    pack_to, seed = section.pack_to, run.recipe.training.seed
    held_out = None if validation is None else make_units(validation.kept, pack_to, seed)
    return LoopData(make_units(train.kept, pack_to, seed), held_out, pad_token_id)


def _load_model(run: _Run) -> PreTrainedModel:
    """The frozen base with LoRA layers on it, ready to train."""
    recipe = run.recipe
    run.emit(Stage(f"loading {recipe.base_model}"))
    model = load_base(run.source, recipe.quantization, run.accelerator.device)
    storage = measure_storage(model)
    dtype = compute_dtype(recipe.quantization)
    targets = inject(model, recipe.lora, compute_dtype=dtype, seed=recipe.training.seed)
    packing = prepare_packing(model) if recipe.dataset.packing else None
    if recipe.training.gradient_checkpointing:
        checkpoint_activations(model)
    run.emit(
        ModelReady(
            name=recipe.base_model,
            architecture=type(model).__name__,
            device=str(run.accelerator.device),
            storage=describe_storage(recipe.quantization),
            total_parameters=storage.parameters,
            trainable_parameters=sum(p.numel() for p in lora_parameters(model)),
            quantized_parameters=storage.quantized_parameters,
            bits_per_quantized_parameter=storage.bits_per_quantized_parameter,
            base_bytes=storage.bytes,
            adapted_layers=len(targets),
            packing=packing,
        )
    )
    return model


def _train(
    run: _Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: LoopData,
    scored_on: BenchmarkPlan | None,
    identity: Mapping[str, Any],
) -> Finished:
    section, accelerator, folder = run.recipe.training, run.accelerator, run.folder
    if runs_unpaged(section, accelerator.device):
        run.emit(Notice(f"{section.optimizer} runs unpaged: on a CPU there is no GPU memory to page out of"))
    optimizer = build_optimizer(section, lora_parameters(model), accelerator.device)
    benchmarks = None if scored_on is None else _benchmarks(run, scored_on, tokenizer)
    progress = _restore(run, model, optimizer, benchmarks) if run.resuming else Progress()
    # The optimizer is not prepared: Accelerate's wrapper reloads its state, and so takes paged state out of its pages.
    # What it adds is for loss scaling and for its own way of accumulating, of which there is neither.
    prepared = accelerator.prepare_model(model)
    output = LoopOutput(
        folder.checkpoints,
        lambda: adapter_files(model, run.source),
        run.emit,
        run=identity,
        durable=(folder.metrics,),
    )
    loop = Loop(accelerator, prepared, optimizer, section, data, output, progress, benchmarks)
    if doubt := endless_warmup(section, loop.total_steps):
        run.emit(Notice(doubt))
    run.emit(_started(run, loop))
    loop.run()
    if accelerator.is_main_process:
        with replacing_folder(folder.adapter) as staging:
            save_adapter(model, staging, run.source)
            tokenizer.save_pretrained(staging)
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
    )


def _benchmarks(run: _Run, plan: BenchmarkPlan, tokenizer: PreTrainedTokenizerBase) -> Benchmarks:
    recipe, device = run.recipe, run.accelerator.device.type
    base = [recipe.base_model, recipe.revision, recipe.quantization.model_dump(), recipe.lora.alpha]
    facts = json.dumps([versions(), device, *base])
    return Benchmarks(plan, tokenizer, run.accelerator, run.emit, answers=run.folder.answers, model_facts=facts)


def _restore(
    run: _Run, model: PreTrainedModel, optimizer: torch.optim.Optimizer, benchmarks: Benchmarks | None
) -> Progress:
    resumed, device = run.resumed, run.accelerator.device
    for path, fault in run.passed_over.items():
        run.emit(Notice(f"passed over checkpoint {path.name}: {fault}"))
    if resumed is None:
        run.emit(Notice("no checkpoint to go on from: starting from the beginning"))
        progress = None
    else:
        progress = restore(resumed, model, optimizer, run.accelerator.process_index, device)
        run.emit(Notice(f"going on from {resumed.checkpoint.name}"))
    found = [MetricsFile(run.folder.metrics).benchmarks() if run.accelerator.is_main_process else []]
    # No process may rename or write before all have read.
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        for checkpoint in run.passed_over:
            set_aside(checkpoint)
        metrics = MetricsFile(run.folder.metrics)
        if progress is None:
            run.record.start_over()
            metrics.clear()
        else:
            metrics.keep_until(progress.step, progress.evaluated_step)
    if benchmarks is not None:
        broadcast_object_list(found)
        benchmarks.go_on(found[0], -1 if progress is None else progress.step, run.folder.checkpoints)
    if benchmarks is None or benchmarks.best is None or benchmarks.best.kept is None:
        run.record.forget_best()
    return progress or Progress()


def _started(run: _Run, loop: Loop) -> Started:
    return Started(
        output_dir=run.folder.path,
        first_step=loop.progress.step,
        total_steps=loop.total_steps,
        epochs=loop.total_steps / loop.plan.steps_per_epoch,
        sequences_per_step=sequences_per_step(run.recipe.training, run.accelerator.num_processes),
        packed=run.recipe.dataset.packing,
    )


def _out_of_memory(run: _Run) -> str:
    section = run.recipe.training
    advice = ["halve per_device_train_batch_size and double gradient_accumulation_steps", "lower dataset.max_length"]
    if not section.gradient_checkpointing:
        advice.insert(0, "set gradient_checkpointing: true")
    return (
        f"out of memory on {run.accelerator.device}. What was saved before is whole. To need less: {'; '.join(advice)}"
    )
