"""lm-eval's factory, with our rows in its tasks, and with everything that is wrong collected, not only the first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks._factory import TaskFactory, _ctor_accepts_config
from lm_eval.tasks._yaml_loader import load_yaml

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.randomness import other_seed
from qlora_cli.evaluation.tasks.data_root import DataRoot
from qlora_cli.evaluation.tasks.loaded import TaskOptions
from qlora_cli.evaluation.tasks.readiness import check_rows, columns_in_templates
from qlora_cli.evaluation.tasks.refusals import refusals, unknown_words
from qlora_cli.evaluation.tasks.supply import (
    MissingSplitError,
    SilentHubError,
    Supply,
    brings_own,
    dataset_name,
    describe_failure,
    needs_package,
)

Config = dict[str, Any]


class Absent(NamedTuple):
    """In place of a task that could not be built; `missing` if that is only for want of data."""

    task_name: str
    missing: tuple[MissingSplitError, ...] = ()


class Supplied:
    """Mixed into a task class: its rows come from `supply`, and no examples are read where none are asked for."""

    supply: ClassVar[Supply]
    dataset: Any

    def download(self, *arguments: Any, **named: Any) -> None:
        """Set `dataset`. Raises TaskError."""
        as_usual: Any = super()
        self.dataset = self.supply.dataset(self, lambda: as_usual.download(*arguments, **named))

    def fewshot_docs(self) -> Any:
        """The rows that examples are drawn from; None where none are needed."""
        as_usual: Any = super()
        return None if self.supply.zero_shot else as_usual.fewshot_docs()


class Processed:
    """What the tasks' `process_docs` have made of their splits.

    lm-eval calls them again and again: for prompts, and once more to compare the answers. Some of them shuffle (the
    choices of GPQA), and are only ever right because `datasets` finds the first result in its cache on disk. Rows
    that came from a folder are in no such cache.
    """

    def __init__(self) -> None:
        # The rows are kept with what was made of them, or another split might come to have their id.
        self._made: dict[tuple[Any, int], tuple[Any, Any]] = {}

    def remember(self, config: Config) -> None:
        """Have the functions of a configuration, which are replaced, process the rows of a split once."""
        if callable(config.get("process_docs")):
            config["process_docs"] = self._once(config["process_docs"])
        examples = config.get("fewshot_config")
        if isinstance(examples, dict) and callable(examples.get("process_docs")):
            config["fewshot_config"] = {**examples, "process_docs": self._once(examples["process_docs"])}

    def _once(self, process: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @functools.wraps(process)  # whose source is what the results tell
        def once(docs: Any) -> Any:
            key = (process, id(docs))
            if key not in self._made:
                self._made[key] = (docs, process(docs))
            return self._made[key][1]

        return once


class Factory(TaskFactory):  # type: ignore[misc]  # lm-eval ships no types
    """Builds tasks and groups; what cannot be built is an `Absent` in its place.

    Attributes:
        problems: what is wrong with tasks, other than that their data is missing, each with the task's name.
        splits: tasks that are asked about another split than their own.
        silent: datasets for which the hub gave no answer.
    """

    def __init__(self, options: TaskOptions) -> None:
        super().__init__()
        self._options = options
        self._root = DataRoot(options.data_root) if options.data_root is not None else None
        self.problems: list[str] = []
        self.splits: dict[str, str] = {}
        self.silent: list[str] = []
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
            if isinstance(item, dict) and "group" not in item and item.get("task", "") not in registry:
                children.append(self._inline_task(item, group_name, overrides))
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
        except Exception as error:  # of the task's own code, and of lm-eval over a task's configuration
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
            return self._of_class(name, config, supply)
        config["num_fewshot"] = shots
        self._processed.remember(config)
        self._settle_splits(name, config, supply)
        task = _construct(_with_supply(ConfigurableTask, supply), {"config": config}, supply)
        return self._ready(task, supply)

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
        examples = [] if supply.zero_shot else _example_split(config)
        missing = supply.missing(dataset, [split for split in [tested or validated, *examples] if split])
        if not missing:
            return
        only_tested = tested and validated and [error.split for error in missing] == [tested]
        instead = str(validated) if only_tested and not supply.missing(dataset, [str(validated)]) else None
        if instead is None or not self._options.allow_partial:
            missing[0].instead = instead
            raise _MissingSplitsError(missing)
        config["test_split"] = None
        self.splits[name] = instead

    def _of_class(self, name: str, config: Config, supply: Supply) -> Any:
        """A task that is a Python class."""
        cls = config["class"]
        if self._root is not None and _downloads_itself(cls):
            raise TaskError(
                f"its class {cls.__name__} fetches its rows by code of its own, in the place of which --data-root "
                f"can put nothing. Leave the task out, or --data-root."
            )
        arguments = {"config": config} if _ctor_accepts_config(cls) else {}
        task = _construct(_with_supply(cls, supply), arguments, supply)
        if hasattr(task, "config") and hasattr(task.config, "task"):
            task.config.task = name
        shots = self._shots(task.get_config("num_fewshot"))
        if shots and supply.zero_shot:  # as the class says, not its file
            supply.zero_shot = False
            task = _construct(_with_supply(cls, supply), arguments, supply)
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


def _construct(cls: Any, arguments: Mapping[str, Any], supply: Supply) -> Any:
    try:
        return cls(**arguments)
    except TaskError:
        raise
    except ImportError as error:
        raise TaskError(needs_package(error)) from error
    except Exception as error:  # of the task's own code and templates over its first row
        raise TaskError(describe_failure(error, supply.files)) from error


def _with_supply(cls: type[Any], supply: Supply) -> type[Any]:
    """The same class, by the same name, with rows from `supply`."""
    return type(cls.__name__, (Supplied, cls), {"supply": supply, "__module__": cls.__module__})


def _downloads_itself(cls: type[Any]) -> bool:
    owner = next((base for base in cls.__mro__ if "download" in vars(base)), None)
    return owner not in (Task, ConfigurableTask, None)


def _example_split(config: Config) -> list[str | None]:
    """The split that examples are drawn from, by the rule of lm-eval."""
    given = config.get("fewshot_config")
    given = given if isinstance(given, dict) else {}
    split = given.get("split") or config.get("fewshot_split")
    if not split and given.get("samples") is not None:
        return []
    usual = (config.get(f"{kind}_split") for kind in ("training", "validation", "test"))
    return [split or next(filter(None, usual), None)]
