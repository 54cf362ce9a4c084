"""The training loop: from encoded rows and a model with LoRA layers to trained ones, telling events on the way."""

from __future__ import annotations

import time
from collections.abc import Callable

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from qlora_cli.errors import (
    EvaluationError,
    Interrupted,
    NonFiniteError,
    OutOfMemoryElsewhereError,
    OutOfMemoryError,
)
from qlora_cli.evaluation.answering.memory import within_memory
from qlora_cli.recipe.schema import TrainingSection
from qlora_cli.training import out_of_memory
from qlora_cli.training.benchmarks import Benchmarks
from qlora_cli.training.best_checkpoint import BestCheckpoint, Measured
from qlora_cli.training.checkpoint import Progress, checkpoint_path
from qlora_cli.training.data_parallel import DataParallel
from qlora_cli.training.devices import on_any_process
from qlora_cli.training.early_stopping import judged, reason_to_stop
from qlora_cli.training.evaluation import evaluate
from qlora_cli.training.events import Notice, StepDone, StepSkipped
from qlora_cli.training.gradients import StepSums, accumulate, check_all_took_part
from qlora_cli.training.interrupt import StopRequest
from qlora_cli.training.loop_parts import LoopData, LoopOutput
from qlora_cli.training.nonfinite import may_skip, why_it_stops
from qlora_cli.training.saving import StateSaver
from qlora_cli.training.schedule import learning_rate, seed_step, step_plan, total_steps
from qlora_cli.training.tally import count_skipped, count_step, new_window, train_record


class Loop:
    """Trains from `progress.step` to `total_steps`, or until the held-out loss has not fallen for long enough.

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
        best: BestCheckpoint | None = None,
    ) -> None:
        """Nothing is done yet.

        Args:
            best: keeps the checkpoint with the lowest held-out loss; None keeps none for that.
        """
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.section = section
        self.data = data
        self.output = output
        self.progress = progress
        self.benchmarks = benchmarks
        self.best = best
        self.plan = step_plan(section, data.train, accelerator.num_processes)
        self.total_steps = total_steps(section, self.plan)
        self.parallel = DataParallel(accelerator, [p for p in model.parameters() if p.requires_grad])
        self.saver = StateSaver(
            accelerator,
            optimizer,
            self.parallel.parameters,
            self.plan,
            output,
            limit=section.save_total_limit,
            kept=self._steps_to_keep,
            saved_step=progress.step,
        )

    @property
    def chosen(self) -> list[BestCheckpoint]:
        """What keeps a checkpoint for being the best of something."""
        both = (self.best, self.benchmarks.best if self.benchmarks is not None else None)
        return [best for best in both if best is not None]

    @property
    def stopped_early(self) -> str | None:
        """Why it is over before the last step; None if it is not."""
        if self.progress.step >= self.total_steps:
            return None
        return reason_to_stop(self.progress, self.section.early_stopping_patience)

    @property
    def last_step(self) -> int:
        """The step after which it is over, as far as is known."""
        return self.total_steps if self.stopped_early is None else self.progress.step

    def run(self) -> None:
        """Run to the end.

        Raises:
            NonFiniteError: at a non-finite loss or gradient, if the step may not be skipped; the state before that step
                is saved.
            Interrupted: after SIGINT, SIGTERM, SIGHUP or SIGUSR1; the state after the step at hand is saved.
            EvaluationError: if the model cannot be scored; the state after the step at hand is saved.
            OutOfMemoryError: if memory does not suffice for a step, to evaluate or to score; the same.
            ModelError: if a LoRA layer took no part in the first step.
        """
        self.model.train()
        with self.saver.keeping(), StopRequest() as stop:
            self.saver.rotate()  # a kill may have come before it
            self._look(stop, trained=False)  # before the first step, or what a resumed run still owes
            while self.progress.step < self.last_step:
                self.saver.settle()
                self._train_step()
                self._look(stop, trained=True)
        if self.stopped_early is not None:
            way_on = "To train on all the same, raise training.early_stopping_patience and --resume"
            text = f"stopped early after step {self.progress.step}: {self.stopped_early}. {way_on}"
            self.output.emit(Notice(text))

    def _look(self, stop: StopRequest, *, trained: bool) -> None:
        """Evaluate, score and save, as far as each is due; `trained`: after a step of this part of the run."""

        def asked() -> bool:
            return stop.signal_name is not None

        left_off = self._evaluate_if_due(asked)
        last = self.progress.step >= self.last_step
        if last:
            self._record()  # of a run that stops early, the steps since the last record
        left_off = left_off or self._score_if_due(asked)
        stopping = on_any_process(self.accelerator, asked())
        if trained and (last or stopping or self._due(self.section.save_steps)):
            self.saver.save(self.progress, rotating=True, wait=last or stopping)
        if left_off or (stopping and not last):
            step = self.progress.step
            where = f"after step {step}, state saved" if step else "before the first step, nothing was trained yet"
            raise Interrupted(f"{stop.signal_name or 'a signal to another process'}: stopped {where}")

    def _due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _train_step(self) -> None:
        """One optimizer step and what is told about it."""
        started = time.monotonic()
        index = self.progress.step
        rate = learning_rate(self.section, index, self.total_steps)
        try:
            step = self._accumulate(index)
        except OutOfMemoryError as error:
            self.optimizer.zero_grad(set_to_none=True)
            elsewhere = isinstance(error, OutOfMemoryElsewhereError)
            where = "another process" if elsewhere else str(self.accelerator.device)
            raise OutOfMemoryError(out_of_memory.in_a_step(self.section, where, index + 1, self._keep())) from None
        if step.fault is None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
        if step.fault is None:
            self.progress = count_step(self.progress, step, seconds)
            mean = step.loss / step.supervised
            self.output.emit(StepDone(index + 1, mean, rate, step.norm, step.tokens, seconds))
        elif may_skip(self.section, self.progress):
            self.progress = count_skipped(self.progress, step, seconds)
            self.output.emit(StepSkipped(index + 1, step.fault, step.suspects))
        else:
            raise NonFiniteError(why_it_stops(self.section, self.progress, step, self._keep()))
        if self._due(self.section.logging_steps) or self.progress.step == self.total_steps:
            self._record()

    def _accumulate(self, index: int) -> StepSums:
        """Gradients of step `index`."""
        process = self.accelerator.process_index
        seed_step(self.section.seed, index, process)
        sums = accumulate(
            self.accelerator,
            self.model,
            self.parallel,
            self.plan.step(index, process),
            self.data.train,
            pad_token_id=self.data.pad_token_id,
            max_grad_norm=self.section.max_grad_norm,
        )
        if index == 0:
            check_all_took_part(self.model)
        return sums

    def _keep(self) -> str:
        """Save the state as it is, if it is good; says what there is to go on from."""
        return self.saver.save_what_is_good(self.progress)

    def _record(self) -> None:
        """Tell of the steps since the last record, if there is anything to tell, and begin a new window."""
        rate = learning_rate(self.section, self.progress.step - 1, self.total_steps)
        record = train_record(self.progress, learning_rate=rate, steps_per_epoch=self.plan.steps_per_epoch)
        if record is not None:
            self.output.emit(record)
            self.progress = new_window(self.progress)

    def _evaluate_if_due(self, stopping: Callable[[], bool]) -> bool:
        """Measure the held-out loss, and keep its checkpoint if it is the best; whether that was left off."""
        step = self.progress.step
        later = step == self.total_steps or self._due(self.section.eval_steps)
        due = self.section.eval_on_start if step == 0 else later
        units = self.data.validation
        if units is None or not due or self.progress.evaluated_step == step:
            return False
        try:
            record = evaluate(
                self.accelerator,
                self.model,
                units,
                batch_size=out_of_memory.eval_batch_size(self.section),
                pad_token_id=self.data.pad_token_id,
                step=step,
                emit=self.output.emit,
                stopping=stopping,
            )
        except Interrupted:
            return True
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {self._keep()}") from None
        except OutOfMemoryError as error:
            raise OutOfMemoryError(f"{error}; {self._keep()}. {out_of_memory.in_evaluation(self.section)}") from None
        self.progress = judged(self.progress, step, record.eval_loss)
        self.output.emit(record)
        self._keep_if_best(self.best, Measured(step, record.eval_loss))
        return False

    def _score_if_due(self, stopping: Callable[[], bool]) -> bool:
        """Score the model on benchmarks, and keep its checkpoint if it is the best; whether that was left off."""
        benchmarks, step = self.benchmarks, self.progress.step
        if benchmarks is None or not benchmarks.is_due(step, self.last_step):
            return False
        try:
            record = within_memory(benchmarks.score, self.model, step, stopping)
        except Interrupted:
            return True
        except EvaluationError as error:
            raise EvaluationError(f"scoring after step {step}: {error}; {self._keep_alone()}") from None
        if record is None:
            when = f"after step {step}" if step else "before the first step"
            raise OutOfMemoryError(
                f"scoring {when} ran out of memory on {self.accelerator.device}; {self._keep_alone()}. "
                + out_of_memory.in_scoring(benchmarks.section)
            )
        self.output.emit(record)
        self._keep_if_best(benchmarks.best, benchmarks.measured(record))
        return False

    def _keep_alone(self) -> str:
        """`_keep`, of a fault that one process alone may know of: the others would wait for its answers."""
        return self._keep() if self.accelerator.num_processes == 1 else "what was saved before is whole"

    def _keep_if_best(self, best: BestCheckpoint | None, measured: Measured) -> None:
        if best is None or not best.is_better(measured):
            return
        self.saver.save(self.progress, rotating=False)
        best.keep(measured, checkpoint_path(self.output.checkpoints, measured.step), self.output.emit)
        self.saver.rotate()

    def _steps_to_keep(self) -> set[int]:
        """The steps whose checkpoints no rotation takes."""
        return {best.step for best in self.chosen if best.step is not None}
