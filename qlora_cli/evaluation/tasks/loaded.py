"""What is asked of the tasks, and the tasks as they are ready to be run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are built.

    Attributes:
        data_root: the folder that holds all data; None takes it from the hub.
        allow_partial: whether a group, or a tag, runs on those of its tasks whose data is there, and a task whose test
            split is not there on its validation split.
        trust_remote_code: whether code of the hub may run: of datasets, and of metrics.
        run_unsafe_code: whether tasks may run that execute what the model writes.
        num_fewshot: examples in a prompt; None leaves that to each task. A task that says 0 stays with 0.
        seed: of the examples, and of what tasks draw when they are built; None: lm-eval's own.
    """

    data_root: Path | None = None
    allow_partial: bool = False
    trust_remote_code: bool = False
    run_unsafe_code: bool = False
    num_fewshot: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Partial:
    """The tasks of a group or a tag, those of its groups among them, whose data is there, and the others."""

    there: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks that can be run, as lm-eval's `TaskManager.load` gives them.

    Attributes:
        tasks: every task, those of groups among them, by name.
        groups: every group, those of groups among them, by name.
        partial: the groups and tags that are not whole.
        splits: the tasks that are asked about another split than their own, and which.
        remarks: what a person should know beside the scores.
    """

    tasks: dict[str, Task]
    groups: dict[str, Group]
    partial: Mapping[str, Partial] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def partly(self, name: str) -> str | None:
        """What a task's or group's score is of, where that is less or other than the name says; else None.

        As in `5 of 57 tasks`, or `validation split`.
        """
        if (partial := self.partial.get(name)) is not None:
            return f"{len(partial.there)} of {len(partial.there) + len(partial.missing)} tasks"
        split = self.splits.get(name)
        return None if split is None else f"{split} split"
