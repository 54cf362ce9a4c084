"""lm-eval's factory, with our rows in its tasks, and with everything that is wrong collected, not only the first."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._factory import TaskFactory, _ctor_accepts_config
from lm_eval.tasks._yaml_loader import load_yaml

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.randomness import bookmark, other_seed
from qlora_cli.evaluation.tasks.data_root import DataRoot
from qlora_cli.evaluation.tasks.examples import split_by_config
from qlora_cli.evaluation.tasks.layouts.found import Needed
from qlora_cli.evaluation.tasks.loaded import TaskOptions
from qlora_cli.evaluation.tasks.readiness import RowsError, check_rows, why_not_set_up
from qlora_cli.evaluation.tasks.refusals import refusals, unknown_words
from qlora_cli.evaluation.tasks.supplied import Processed, downloads_itself, with_supply
from qlora_cli.evaluation.tasks.supply import (
    MissingSplitError,
    SilentHubError,
    Supply,
    brings_own,
    dataset_name,
    describe_failure,
    needs_package,
)
from qlora_cli.evaluation.tasks.templates import columns_in_templates

Config = dict[str, Any]

_DEFINING = {"class", "include", "dataset_path", "custom_dataset"}  # keys of a task that is no mere name
_MAYBE_CELLS = (
    "numbers and texts look alike in CSV and TSV, and it can be asked about the cells as neither. If that is what is "
    "wrong: JSON Lines and Parquet tell the two apart, and so does a dataset's card, README.md."
)


class Absent(NamedTuple):
    """In place of a task that could not be built; `missing` if that is only for want of data."""

    task_name: str
    missing: tuple[MissingSplitError, ...] = ()


class Factory(TaskFactory):  # type: ignore[misc]  # lm-eval ships no types
    """Builds tasks and groups; what cannot be built is an `Absent` in its place.

    Attributes:
        problems: what is wrong with tasks, other than that their data is missing, each with the task's name.
        splits: tasks that are asked about another split than their own.
        silent: datasets for which the hub gave no answer.
        unknown: groups, each with a name in its list that there is not.
    """

    def __init__(self, options: TaskOptions) -> None:
        super().__init__()
        self._options = options
        self._root = DataRoot(options.data_root) if options.data_root is not None else None
        self.problems: list[str] = []
        self.splits: dict[str, str] = {}
        self.silent: list[str] = []
        self.unknown: list[tuple[str, str]] = []
        self._processed = Processed()

    def _build_task(self, entry: Any, overrides: Config | None) -> Any:
        name = str((overrides or {}).get("task", entry.name))

        def load(resolve: bool) -> Config:
            if resolve:
                return dict(self._load_full_config(entry, overrides))
            config = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {}
            return {**config, **(overrides or {})}

        return self._task(name, entry.yaml_path, load)

    def _build_group_members(
        self, member_list: list[Any], group_name: str, overrides: Config | None, registry: dict[str, Any]
    ) -> list[Any]:
        children: list[Any] = []
        for item in member_list:
            entry = {"task": item} if isinstance(item, str) else item if isinstance(item, dict) else {}
            name = entry.get("group", entry.get("task"))
            if isinstance(name, str) and name not in registry and not _defines(entry, overrides):
                self.unknown.append((group_name, name))
            elif entry and "group" not in entry and name not in registry:
                children.append(self._inline_task(entry, group_name, overrides))
            else:
                children += super()._build_group_members([item], group_name, overrides, registry)
        return children

    def _inline_task(self, item: Config, group_name: str, overrides: Config | None) -> Any:
        """A task that is defined in its group's file; named as lm-eval does it."""
        name = f"{group_name}::{item.get('task')}"
        config = {**(overrides or {}), **item, "task": name}
        config["metadata"] = dict(config.get("metadata") or {}) | self._meta
        return self._task(name, None, lambda _: config)

    def _task(self, name: str, file: Path | None, load: Callable[[bool], Config]) -> Any:
        if self.silent:  # nothing further comes from there
            return Absent(name)
        try:
            _refuse(refusals(load(False), self._options))
            config = load(True)
            _refuse(unknown_words(config, self._options))
            return self._built(name, config)
        except MissingSplitError as error:
            return Absent(name, (error,))
        except _MissingSplitsError as error:
            return Absent(name, error.missing)
        except SilentHubError as error:
            self.silent.append(str(error))
        except TaskError as error:
            self._complain(name, file, str(error))
        except (Exception, SystemExit) as error:  # of the task's code, and of lm-eval over a task's configuration
            self._complain(name, file, describe_failure(error, []))
        return Absent(name)

    def _complain(self, name: str, file: Path | None, problem: str) -> None:
        where = f"{name} ({file})" if file else name
        self.problems.extend(f"{where}: {line}" for line in problem.splitlines())

    def _built(self, name: str, config: Config) -> Any:
        for key in ("tag", "group", "task_list"):
            config.pop(key, None)
        shots = self._shots(config.get("num_fewshot"))
        supply = Supply(self._root, columns_in_templates(config), zero_shot=shots == 0)
        if "class" in config:
            return self._asked(lambda supply: self._of_class(name, config, supply), supply)
        config["num_fewshot"] = shots
        self._processed.remember(config)
        self._settle_splits(name, config, supply)
        target = columns_in_templates({"doc_to_target": config.get("doc_to_target")})
        return self._asked(lambda supply: self._of_config(config, supply), supply, target)

    def _shots(self, own: int | None) -> int:
        """The number of examples, by the rule of lm-eval's `simple_evaluate`."""
        asked = self._options.num_fewshot
        return own or 0 if asked is None or own == 0 else asked

    def _settle_splits(self, name: str, config: Config, supply: Supply) -> None:
        """Raise _MissingSplitsError if a split that will be asked for is not below the data root."""
        dataset = dataset_name(config.get("dataset_path"), config.get("dataset_name"), config.get("dataset_kwargs"))
        if brings_own(dataset, config.get("custom_dataset")):
            return
        tested, validated = config.get("test_split"), config.get("validation_split")
        examples = None if supply.zero_shot else split_by_config(config)
        missing = supply.missing(dataset, [split for split in (tested or validated, examples) if split])
        if not missing:
            return
        only_tested = tested and validated and [error.split for error in missing] == [tested]
        instead = str(validated) if only_tested and not supply.missing(dataset, [str(validated)]) else None
        if instead is None or not self._options.allow_partial:
            missing[0].instead = instead
            raise _MissingSplitsError(missing)
        config["test_split"] = None
        self.splits[name] = instead

    def _asked(self, make: Callable[[Supply], Any], supply: Supply, target: Needed = frozenset()) -> Any:
        """What `make` makes of rows that can be asked about.

        In CSV, 1 may be a number, or the text that a task compares it with: if cells read as numbers will not do, they
        are texts, but for those of the columns `target`, which often are the number of a choice, and then those, too.
        What a task's own code draws meanwhile, it draws as if there had been one try.
        """
        begin_again = bookmark()
        try:
            return make(supply)
        except RowsError as error:
            if not supply.guessed:
                raise
            for numbers in dict.fromkeys([target, frozenset[str]()]):
                begin_again()
                with contextlib.suppress(TaskError):
                    return make(dataclasses.replace(supply, numbers=numbers, files={}))
            if error.every:
                raise TaskError(f"{error}\n{_MAYBE_CELLS}") from error
            raise

    def _of_config(self, config: Config, supply: Supply) -> Any:
        """A task of a YAML file."""
        task = self._construct(ConfigurableTask, {"config": dict(config)}, supply)
        return self._ready(task, supply)

    def _construct(self, cls: Any, arguments: Mapping[str, Any], supply: Supply) -> Any:
        """Raises TaskError, as specific as it can be."""
        supplied: Any = with_supply(cls, supply)
        task = supplied.__new__(supplied)
        try:
            task.__init__(**arguments)  # in two steps: where the second fails, what there is of it says why
        except TaskError:
            raise
        except ImportError as error:
            raise TaskError(needs_package(error)) from error
        except Exception as error:  # of the task's own code and templates over its first row
            raise why_not_set_up(task, error, supply, self._options) from error
        return task

    def _of_class(self, name: str, config: Config, supply: Supply) -> Any:
        """A task that is a Python class."""
        cls = config["class"]
        if self._root is not None and downloads_itself(cls):
            raise TaskError(
                f"its class {cls.__name__} fetches its rows by code of its own, in the place of which --data-root "
                f"can put nothing. Leave the task out, or --data-root."
            )
        arguments = {"config": config} if _ctor_accepts_config(cls) else {}
        task = self._construct(cls, arguments, supply)
        if hasattr(task, "config") and hasattr(task.config, "task"):
            task.config.task = name
        shots = self._shots(task.get_config("num_fewshot"))
        if shots and supply.zero_shot:  # as the class says, not its file
            supply.zero_shot = False
            task = self._construct(cls, arguments, supply)
            task.config.task = name
        task.set_config(key="num_fewshot", value=shots)
        return self._ready(task, supply)

    def _ready(self, task: Any, supply: Supply) -> Any:
        check_rows(task, supply, self._options)
        task.set_fewshot_seed(seed=other_seed(self._options.seed))
        return task


class _MissingSplitsError(TaskError):
    """Several splits of one task are not below the data root."""

    def __init__(self, missing: list[MissingSplitError]) -> None:
        self.missing = tuple(missing)
        super().__init__("\n".join(map(str, missing)))


def _refuse(problems: list[str]) -> None:
    if problems:
        raise TaskError("\n".join(problems))


def _defines(entry: Config, overrides: Config | None) -> bool:
    """Whether an entry of a group's list defines a task, or a group, in place of naming one."""
    if "group" in entry:
        return "task" in entry
    return bool({**(overrides or {}), **entry}.keys() & _DEFINING)
