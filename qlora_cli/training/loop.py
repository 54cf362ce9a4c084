"""The training loop: from encoded rows and a model with LoRA layers to trained ones, telling events on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer

from qlora_cli.data.units import Units
from qlora_cli.errors import EvaluationError, Interrupted, ModelError, NonFiniteError
from qlora_cli.model.lora import bypassed_layers
from qlora_cli.recipe.schema import TrainingSection
from qlora_cli.training.benchmarks import Benchmarks
from qlora_cli.training.checkpoint import Progress, RandomStates, Snapshot, checkpoint_path, take_snapshot
from qlora_cli.training.evaluation import evaluate
from qlora_cli.training.events import Emitter, StepDone, TrainRecord
from qlora_cli.training.gradients import StepSums, accumulate
from qlora_cli.training.interrupt import StopRequest
from qlora_cli.training.keeping import CheckpointKeeper
from qlora_cli.training.schedule import data_position, learning_rate, seed_step, step_plan, total_steps


@dataclass(frozen=True)
class LoopData:
    """What the loop reads: training rows and held-out rows, in packs or not, and the token that fills short ones."""

    train: Units
    validation: Units | None
    pad_token_id: int

    def fingerprints(self) -> dict[str, str]:
        """Of the rows of each split: the same rows have the same one."""
        splits = {"train": self.train, "validation": self.validation}
        return {name: units.encoded.fingerprint for name, units in splits.items() if units is not None}


@dataclass(frozen=True)
class LoopOutput:
    """Where the loop writes checkpoints, and what is in them beside what it knows itself.

    Attributes:
        adapter: the files of the adapter as it is when this is called.
        run: what the run is made of: see `identity.run_identity`.
        durable: files that have to be on disk before a checkpoint is.
    """

    checkpoints: Path
    adapter: Callable[[], Mapping[str, bytes]]
    emit: Emitter
    run: Mapping[str, Any] = field(default_factory=dict)
    durable: Sequence[Path] = ()


class Loop:
    """Trains from `progress.step` to `total_steps`.

    The data order, the learning rate and the random draws of a step depend on the seed and the step alone, so that a
    run that goes on from a checkpoint is the run that was never stopped.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        section: TrainingSection,
        data: LoopData,
        output: LoopOutput,
        progress: Progress,
        benchmarks: Benchmarks | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.section = section
        self.data = data
        self.output = output
        self.progress = progress
        self.benchmarks = benchmarks
        self.plan = step_plan(section, data.train, accelerator.num_processes)
        self.total_steps = total_steps(section, self.plan)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.saved_step = progress.step or None  # the last step whose checkpoint is there
        self.keeper = CheckpointKeeper(
            output.checkpoints,
            section.save_total_limit,
            output.emit,
            durable=output.durable,
            kept=self._steps_to_keep,
        )

    def run(self) -> None:
        """Run to the end.

        Raises:
            NonFiniteError: at the first non-finite loss or gradient; the state before that step is saved.
            Interrupted: after SIGINT or SIGTERM; the state after the step at hand is saved.
            EvaluationError: if the model cannot be scored; the state after the step at hand is saved.
            ModelError: if a LoRA layer took no part in the first step.
        """
        self.model.train()
        with self.keeper.keeping():
            if self.accelerator.is_main_process:
                self.keeper.rotate()  # a kill may have come before it
            self._evaluate_if_due()  # before the first step, or what a resumed run still owes
            self._score_if_due(lambda: False)
            with StopRequest() as stop:
                while self.progress.step < self.total_steps:
                    self._run_step(stop)

    def _run_step(self, stop: StopRequest) -> None:
        """One step, and what is due after it."""
        self.keeper.settle()
        self._train_step()
        self._evaluate_if_due()
        left_off = self._score_if_due(lambda: stop.signal_name is not None)
        last = self.progress.step == self.total_steps
        stopping = self._any_process(stop.signal_name is not None)
        if last or stopping or self._due(self.section.save_steps):
            self._save(rotating=True, wait=last or stopping)
        if left_off or (stopping and not last):
            signal_name = stop.signal_name or "a signal to another process"
            raise Interrupted(f"{signal_name}: stopped after step {self.progress.step}, state saved")

    def _due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _any_process(self, here: bool) -> bool:
        """Whether it is so on any process: all of them must take the same way, or wait for each other forever."""
        if self.accelerator.num_processes == 1:
            return here
        flag = torch.tensor(int(here), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())

    def _train_step(self) -> None:
        """One optimizer step and what is told about it."""
        started = time.monotonic()
        index = self.progress.step
        rate = learning_rate(self.section, index, self.total_steps)
        step = self._accumulate(index)
        if step.fault is not None:
            self._stop_at(index, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
        self._count(step, seconds)
        mean = step.loss / step.supervised
        self.output.emit(StepDone(index + 1, mean, rate, step.norm, step.tokens, seconds))
        if self._due(self.section.logging_steps) or self.progress.step == self.total_steps:
            self._record(rate, step.norm)

    def _accumulate(self, index: int) -> StepSums:
        """Gradients of step `index`."""
        process = self.accelerator.process_index
        seed_step(self.section.seed, index, process)
        sums = accumulate(
            self.accelerator,
            self.model,
            self.parameters,
            self.plan.step(index, process),
            self.data.train,
            pad_token_id=self.data.pad_token_id,
            max_grad_norm=self.section.max_grad_norm,
        )
        if index == 0:
            self._check_all_took_part()
        return sums

    def _check_all_took_part(self) -> None:
        bypassed = bypassed_layers(self.accelerator.unwrap_model(self.model))
        if bypassed:
            raise ModelError(
                f"lora.target_modules: {len(bypassed)} of the chosen layers took no part in the first step, because "
                f"the model does not call them on text: {', '.join(bypassed[:5])}. Name others"
            )

    def _stop_at(self, index: int, step: StepSums) -> None:
        """Save the last good state and say which rows broke the next step."""
        self.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(
            f"step {index + 1}: the {step.fault}, so training stopped; {self._keep()}. {step.suspects}. "
            f"Look at them; else try a lower learning_rate, more warmup_steps, or compute_dtype: float32"
        )

    def _keep(self) -> str:
        """Save the state as it is, if it is good; says what there is to go on from."""
        if self.progress.step == 0:
            return "nothing was trained yet"
        if not self._is_finite():
            return "what the last step trained is not finite either, and not saved"
        self._save(rotating=False)
        return f"the state after step {self.progress.step} is saved"

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters)

    def _count(self, step: StepSums, seconds: float) -> None:
        progress = self.progress
        self.progress = replace(
            progress,
            step=progress.step + 1,
            tokens=progress.tokens + step.tokens,
            seconds=progress.seconds + seconds,
            window_loss=progress.window_loss + step.loss,
            window_supervised=progress.window_supervised + step.supervised,
            window_tokens=progress.window_tokens + step.tokens,
            window_seconds=progress.window_seconds + seconds,
        )

    def _record(self, rate: float, norm: float) -> None:
        """Tell of the steps since the last record, and begin a new window."""
        progress = self.progress
        self.output.emit(
            TrainRecord(
                step=progress.step,
                epoch=progress.step / self.plan.steps_per_epoch,
                loss=progress.window_loss / progress.window_supervised,
                learning_rate=rate,
                grad_norm=norm,
                tokens=progress.tokens,
                tokens_per_second=progress.window_tokens / progress.window_seconds,
                seconds=progress.seconds,
            )
        )
        self.progress = replace(progress, window_loss=0.0, window_supervised=0, window_tokens=0, window_seconds=0.0)

    def _evaluate_if_due(self) -> None:
        step = self.progress.step
        later = step == self.total_steps or self._due(self.section.eval_steps)
        due = self.section.eval_on_start if step == 0 else later
        units = self.data.validation
        if units is None or not due or self.progress.evaluated_step == step:
            return
        try:
            record = evaluate(
                self.accelerator,
                self.model,
                units,
                batch_size=self.section.per_device_eval_batch_size or self.section.per_device_train_batch_size,
                pad_token_id=self.data.pad_token_id,
                step=step,
                emit=self.output.emit,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {self._keep()}") from None
        self.progress = replace(self.progress, evaluated_step=step)
        self.output.emit(record)

    def _score_if_due(self, stopping: Callable[[], bool]) -> bool:
        """Score the model on benchmarks, and keep its checkpoint if it is the best; whether that was left off."""
        benchmarks, step = self.benchmarks, self.progress.step
        if benchmarks is None or not benchmarks.is_due(step, self.total_steps):
            return False
        try:
            record = benchmarks.score(self.accelerator.unwrap_model(self.model), step, stopping)
        except Interrupted:
            return True
        except EvaluationError as error:
            # Of several processes, the others may be waiting for this one's answers: nothing can be done together.
            kept = self._keep() if self.accelerator.num_processes == 1 else "what was saved before is whole"
            raise EvaluationError(f"scoring after step {step}: {error}; {kept}") from None
        self.output.emit(record)
        if benchmarks.best is not None and benchmarks.best.is_better(record):
            self._save(rotating=False)
            benchmarks.best.keep(record, checkpoint_path(self.output.checkpoints, step), self.output.emit)
            if self.accelerator.is_main_process:
                self.keeper.rotate()
        return False

    def _save(self, *, rotating: bool, wait: bool = True) -> None:
        """Save the state, unless this step's is saved; then, if `rotating`, delete old ones.

        With `wait` it is on disk afterwards. A state that cannot be gone on from is not saved: it would push out one
        that can.
        """
        if not self._is_finite():
            raise NonFiniteError(
                f"step {self.progress.step}: its update made a trained weight NaN or infinite, so training stopped; "
                "it is not saved, and the checkpoints before it are as they were. Try a lower learning_rate"
            )
        random = gather_object([RandomStates.here(self.accelerator.device)])
        if self.accelerator.is_main_process:
            if self.saved_step == self.progress.step:
                self.keeper.settle(wait=wait)
                if rotating:
                    self.keeper.rotate()
            else:
                self.keeper.save(self._snapshot(random), wait=wait, rotating=rotating)
        self.saved_step = self.progress.step
        if wait:
            self.accelerator.wait_for_everyone()

    def _snapshot(self, random: Sequence[RandomStates]) -> Snapshot:
        return take_snapshot(
            self.progress,
            self.optimizer,
            self.output.adapter(),
            position=data_position(self.plan, self.progress.step),
            run=self.output.run,
            random=random,
        )

    def _steps_to_keep(self) -> set[int]:
        """The steps whose checkpoints no rotation takes."""
        best = self.benchmarks.best if self.benchmarks is not None else None
        return {best.step} if best is not None and best.step is not None else set()
