"""What is asked of an evaluation. Without torch: a command makes it before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class EvalRequest:
    """One evaluation: of tasks, of a dataset, or of both.

    Attributes:
        target: a run folder, a checkpoint, a PEFT adapter, a model folder or a hub name.
        tasks: names of tasks, groups or tags of lm-eval; patterns such as `mmlu_*` too.
        dataset: rows of which the loss is wanted: a file, folder, glob or hub name.
        overrides: `KEY=VALUE` for how those rows are read, as `--set` takes it: `dataset.format=alpaca`.
        num_fewshot: examples in a prompt, where the task does not fix their number; None: as the task says.
        limit: documents of each task, or the share of them if below 1; of rows of `dataset`, likewise.
        batch_size: at most so many sequences in a forward pass; None: what the device takes.
        data_root: a folder with the tasks' data, in place of the hub.
        task_paths: folders with task definitions beside lm-eval's own.
        allow_partial: whether a group is scored on those of its tasks whose data is there.
        bits: how the base is stored; None: as it was in training, or as it is.
        base_model, revision, trained_base: what to believe in place of what an adapter says; see `find_adapter`.
        trust_remote_code: whether code that comes with a model or a task's data may run.
        run_unsafe_code: whether code that the model writes may run, which some tasks are about.
        chat_template: whether prompts are rendered as conversations.
        system_instruction: said before every prompt; none, if it is empty.
        baseline: whether the base is scored, too: the adapter's base.
        output: the results file; None writes none.
        log_samples: whether every answer is written beside it.
        keep_answers: whether answers are kept for another start.
        device: `auto`, `cpu` or `cuda`.
        seed: of the order in which examples are drawn and of what is sampled; None: as lm-eval draws them.
    """

    target: str
    tasks: tuple[str, ...] = ()
    dataset: str | None = None
    overrides: tuple[str, ...] = ()
    num_fewshot: int | None = None
    limit: int | float | None = None
    batch_size: int | None = None
    data_root: Path | None = None
    task_paths: tuple[Path, ...] = ()
    allow_partial: bool = False
    bits: Literal[4, 8, 16] | None = None
    base_model: str | None = None
    revision: str | None = None
    trained_base: str | None = None
    trust_remote_code: bool = False
    run_unsafe_code: bool = False
    chat_template: bool = False
    system_instruction: str | None = None
    baseline: bool = False
    output: Path | None = None
    log_samples: bool = False
    keep_answers: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int | None = None
