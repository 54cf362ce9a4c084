"""What is said against a task: before any of its code is run, and before its rows are read."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_cli.evaluation.tasks.loaded import TaskOptions
from qlora_cli.recipe.words import nearest


def refusals(config: Mapping[str, Any], options: TaskOptions) -> list[str]:
    """Code that a task would run, and that may not be, by its configuration with the functions still unresolved
    (`/folder/utils.function`).

    Each is the end of a message that begins with the task's name.
    """
    found = []
    if config.get("unsafe_code") and not options.run_unsafe_code:
        found.append("it runs code that the model writes. --run-unsafe-code allows that: use a machine made for it.")
    if not options.trust_remote_code:
        found += _code_of_the_hub(config, options)
    return found


def unknown_words(config: Mapping[str, Any], options: TaskOptions) -> list[str]:
    """Metrics, aggregations and filters that there are none of, or only as code of the hub.

    To be asked with the functions of `config` resolved: their modules may have brought some of these.
    """
    return [*_unknown_metrics(config, options), *_unknown_filters(config)]


def _code_of_the_hub(config: Mapping[str, Any], options: TaskOptions) -> Iterator[str]:
    arguments = config.get("dataset_kwargs")
    if options.data_root is None and isinstance(arguments, dict) and arguments.get("trust_remote_code"):
        yield (
            f"its dataset {config.get('dataset_path')} needs code from the hub. --trust-remote-code allows that; "
            f"--data-root DIR does without."
        )
    metrics = {name: file for file, function in _functions(config) if (name := _loaded_metric(file, function))}
    for metric, file in metrics.items():
        yield (
            f"it computes {metric!r} by code that `evaluate.load` fetches from the hub ({file}). "
            f"--trust-remote-code allows that."
        )


def _unknown_metrics(config: Mapping[str, Any], options: TaskOptions) -> Iterator[str]:
    import lm_eval.api.metrics  # noqa: F401  (the registries are empty without)
    from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_REGISTRY

    metrics = config.get("metric_list")
    for entry in metrics if isinstance(metrics, list) else []:
        if not isinstance(entry, dict):
            yield f"metric_list: expected entries such as `metric: acc`, got {entry!r}."
            continue
        metric, aggregation = entry.get("metric"), entry.get("aggregation")
        # With a `process_results` of its own, a task names its metrics as it likes.
        if isinstance(metric, str) and not config.get("process_results"):
            fetched = entry.get("hf_evaluate") is True
            if (fetched or metric not in METRIC_REGISTRY) and not options.trust_remote_code:
                close = None if fetched else nearest(metric, list(METRIC_REGISTRY))
                yield (
                    f"metric {metric!r} is {'to be code' if fetched else 'none of lm-eval, which would look for code'} "
                    f"from the hub{f'; did you mean {close}?' if close else '.'} --trust-remote-code allows that."
                )
        if isinstance(aggregation, str) and aggregation not in AGGREGATION_REGISTRY:
            close = nearest(aggregation, list(AGGREGATION_REGISTRY))
            yield f"aggregation {aggregation!r} is none of lm-eval{f'; did you mean {close}?' if close else '.'}"


def _unknown_filters(config: Mapping[str, Any]) -> Iterator[str]:
    import lm_eval.filters  # noqa: F401  (the registry is empty without)
    from lm_eval.api.registry import FILTER_REGISTRY

    filters = config.get("filter_list")
    for entry in filters if isinstance(filters, list) else []:
        steps = entry.get("filter") if isinstance(entry, dict) else None
        for step in steps if isinstance(steps, list) else []:
            name = step.get("function") if isinstance(step, dict) else None
            if isinstance(name, str) and name not in FILTER_REGISTRY:
                close = nearest(name, list(FILTER_REGISTRY))
                yield f"filter {name!r} is none of lm-eval{f'; did you mean {close}?' if close else '.'}"


def _is_function(text: str) -> bool:
    """Whether this is `!function`, unresolved: the path of a module, and a name in it."""
    return "/" in text or "\\" in text


def _functions(value: object) -> Iterator[tuple[Path, str]]:
    """The Python functions that a configuration names: their file, and their name in it."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from _functions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _functions(inner)
    elif isinstance(value, str) and _is_function(value) and "\n" not in value and len(value) < 4096:
        stem, _, name = value.rpartition(".")
        file = Path(f"{stem}.py")
        if name.isidentifier() and file.is_absolute() and file.is_file():
            yield file, name


def _loaded_metric(file: Path, function: str) -> str | None:
    """The metric that `evaluate.load` would fetch when the function is imported or called; None if there is none."""
    parts = _parts(file)
    waiting, seen = ["", function], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in parts:
            continue
        seen.add(name)
        metric, mentioned = parts[name]
        if metric:
            return metric
        waiting.extend(mentioned)
    return None


@functools.lru_cache(maxsize=256)
def _parts(file: Path) -> dict[str, tuple[str | None, frozenset[str]]]:
    """By the name of each function and class of a module, and "" for what runs on importing it: the metric that it
    fetches, and the names that it mentions."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, ValueError, SyntaxError):
        return {}  # it will be told when it is imported
    libraries = _names_of_evaluate(body)
    parts: dict[str, tuple[str | None, frozenset[str]]] = {}
    at_import: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            parts[statement.name] = _facts([statement], libraries)
        else:
            at_import.append(statement)
    parts[""] = (_facts(at_import, libraries)[0], frozenset())
    return parts


def _names_of_evaluate(body: list[ast.stmt]) -> tuple[frozenset[str], frozenset[str]]:
    """What the module calls the library `evaluate`, and its function `load`."""
    modules, loads = set(), set()
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name == "evaluate"}
        elif isinstance(node, ast.ImportFrom) and node.module == "evaluate":
            loads |= {alias.asname or alias.name for alias in node.names if alias.name == "load"}
    return frozenset(modules), frozenset(loads)


def _facts(
    statements: list[ast.stmt], libraries: tuple[frozenset[str], frozenset[str]]
) -> tuple[str | None, frozenset[str]]:
    modules, loads = libraries
    metric, mentioned = None, set()
    for node in (node for statement in statements for node in ast.walk(statement)):
        if isinstance(node, ast.Name):
            mentioned.add(node.id)
        if isinstance(node, ast.Call) and metric is None:
            called = node.func
            of_module = (
                isinstance(called, ast.Attribute)
                and called.attr == "load"
                and isinstance(called.value, ast.Name)
                and called.value.id in modules
            )
            if of_module or (isinstance(called, ast.Name) and called.id in loads):
                first = node.args[0] if node.args else None
                metric = str(first.value) if isinstance(first, ast.Constant) else "a metric"
    return metric, frozenset(mentioned)
