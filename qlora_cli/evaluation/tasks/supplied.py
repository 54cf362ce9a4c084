"""lm-eval's task classes over our rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from lm_eval.api.task import ConfigurableTask, Task

from qlora_cli.evaluation.tasks.supply import Supply


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

    def remember(self, config: dict[str, Any]) -> None:
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


def with_supply(cls: type[Any], supply: Supply) -> type[Any]:
    """The same class, by the same name, with rows from `supply`."""
    return type(cls.__name__, (Supplied, cls), {"supply": supply, "__module__": cls.__module__})


def downloads_itself(cls: type[Any]) -> bool:
    """Whether code of its own fetches a class's rows."""
    owner = next((base for base in cls.__mro__ if "download" in vars(base)), None)
    return owner not in (Task, ConfigurableTask, None)
