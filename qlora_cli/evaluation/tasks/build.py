"""Tasks that are ready to be run, or everything that stands against it, at once."""

from __future__ import annotations

import contextlib
import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.index import Index, Listed, entries
from qlora_cli.evaluation.tasks.loaded import LoadedTasks, Partial, TaskOptions
from qlora_cli.evaluation.tasks.names import Chosen, few, unknown
from qlora_cli.hub import go_offline_if_unreachable

_LINE = 100  # letters of a line of names


def build_tasks(names: Sequence[str], index: Index, options: TaskOptions) -> LoadedTasks:
    """The tasks and groups of these names, with their rows read, in lm-eval's own classes.

    `names` are of the index (see `names.choose`). A task that is named beside a group that it is part of is asked as
    the group asks it.

    Raises:
        TaskError: with all that is wrong: data that is missing (in a group too, unless partial ones are allowed), rows
            that cannot be read, code that may not run, metrics that there are none of, groups that are part of
            themselves or of which nothing is left, a hub that gives no answer.
    """
    if options.data_root is None:
        go_offline_if_unreachable(["org/dataset"])  # whatever the tasks need, it is on the hub
    with quiet():
        from qlora_cli.evaluation.randomness import seeded
        from qlora_cli.evaluation.tasks.factory import Absent, Factory
        from qlora_cli.evaluation.tasks.supply import describe_failure

        factory = Factory(options)
        registry = entries(_needed(names, index))
        built = []
        with seeded(options.seed):  # some tasks draw when they are built
            for name in dict.fromkeys(names):
                try:
                    built.append(_Built(index[name], factory.build(registry[name], registry=registry), Absent))
                except TaskError:
                    raise
                except (Exception, SystemExit) as error:  # of a group's file, or of code that it names
                    factory.problems.append(f"{_with_file(name, index)}: {describe_failure(error, [])}")
    factory.problems += _broken_groups(built, factory, index)
    together = _matched_together(built, names.patterns if isinstance(names, Chosen) else {})
    _refuse([*(each for each in built if not each.pattern), *together.values()], factory, options)
    return _loaded(built, factory, together)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval's log, which warns of defaults task by task, held back, and the progress bars of `datasets`."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@dataclass
class _Built:
    """What became of a name that was asked for: a task, a group, or the tasks of a tag, whole or not."""

    listed: Listed
    item: Any
    absent_type: type[Any]
    pattern: str | None = None  # that brought it together with others
    there: dict[str, Any] = field(default_factory=dict)
    absent: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for leaf in _leaves(self.item):
            (self.absent if isinstance(leaf, self.absent_type) else self.there)[leaf.task_name] = leaf

    @property
    def missing(self) -> dict[str, Any]:
        """The tasks whose data is missing."""
        return {name: leaf for name, leaf in self.absent.items() if leaf.missing}

    @property
    def is_task(self) -> bool:
        """Whether this is one task, asked for by its name."""
        return self.listed.kind in ("task", "python task")


def _needed(names: Sequence[str], index: Index) -> dict[str, Listed]:
    """The part of the index that these names lead to. Raises TaskError for a group that is part of itself."""
    found: dict[str, Listed] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            circle = " > ".join([*above[above.index(name) :], name])
            raise TaskError(
                f"{_with_file(name, index)}: the group is part of itself ({circle}). Take it out of one list."
            )
        if name in index and name not in found:
            found[name] = index[name]
            for member in index[name].members:
                visit(member, (*above, name))

    for name in names:
        visit(name, ())
    return found


def _matched_together(built: list[_Built], patterns: Mapping[str, str]) -> dict[str, _Built]:
    """By pattern, what it brought, where that is several names: in one, as a tag has it. Sets their `pattern`."""
    by_pattern: dict[str, list[_Built]] = {}
    for each in built:
        if each.listed.name in patterns:
            by_pattern.setdefault(patterns[each.listed.name], []).append(each)
    together = {}
    for pattern, some in by_pattern.items():
        if len(some) > 1:
            items = [each.item for each in some]
            together[pattern] = _Built(Listed(repr(pattern), "tag", None), items, some[0].absent_type)
            for each in some:
                each.pattern = pattern
    return together


def _broken_groups(built: list[_Built], factory: Any, index: Index) -> Iterator[str]:
    """What is wrong with groups' lists: names that there are not, and no names at all."""
    for name, member in factory.unknown:
        yield f"{_with_file(name, index)}: {unknown(member, index)}"
    told = {name for name, _ in factory.unknown}
    for each in built:
        for group in [each.item, *each.item.get_all_groups()] if each.listed.kind == "group" else []:
            if not told and next(_leaves(group), None) is None:
                yield f"{_with_file(group.name, index)}: there is no task in this group. List some under `task`."


def _with_file(name: str, index: Index) -> str:
    return f"{name} ({index[name].file})" if name in index and index[name].file else name


def _leaves(item: Any) -> Iterator[Any]:
    """The tasks of a task, a group or a list of these."""
    if hasattr(item, "task_name"):
        yield item
    else:
        for inner in item:
            yield from _leaves(inner)


def _refuse(built: list[_Built], factory: Any, options: TaskOptions) -> None:
    if factory.silent:
        raise TaskError(
            f"the hub cannot be reached, and the dataset {factory.silent[0]} is not in its cache. File the rows of the "
            f"tasks under their hub names in a folder, and give it with --data-root DIR, or try again with a network."
        )
    problems = list(dict.fromkeys(factory.problems))
    for each in built:
        if each.missing and (each.is_task or not options.allow_partial or not each.there):
            problems.append(_missing_data(each, options))
    if problems:
        raise TaskError("\n".join(problems))


def _missing_data(built: _Built, options: TaskOptions) -> str:
    name, missing = built.listed.name, built.missing
    first = next(iter(missing.values()))
    if built.is_task:
        return "\n".join(_missing_splits(name, first))
    count = len(built.there) + len(built.absent)
    lines = [
        f"{name}: {len(missing)} of its {count} tasks have no data below --data-root:",
        *(f"    {line}" for line in textwrap.wrap(", ".join(missing), _LINE, break_on_hyphens=False)),
        f"    looked, for the first of them, for {', and for '.join(_looked_for(error) for error in first.missing)}",
    ]
    otherwise = sum(any(error.instead for error in leaf.missing) for leaf in missing.values())
    if (built.there or otherwise) and not options.allow_partial:
        count = len(built.there) + otherwise
        splits = f", {otherwise} of them on the validation split" if otherwise else ""
        lines.append(f"    --allow-partial runs {name} on the {count} that are there{splits}")
    return "\n".join(lines)


def _missing_splits(name: str, absent: Any) -> Iterator[str]:
    for error in absent.missing:
        there = f" (there: {', '.join(error.there)})" if error.there else ""
        yield f"{name}: the split {error.split!r} of {error.dataset} is not below --data-root{there}"
        yield f"    looked for {_looked_for(error)}"
        if error.instead:
            yield f"    --allow-partial scores {name} on its split {error.instead!r}"


def _looked_for(error: Any) -> str:
    """Where a split was looked for: what authors give out comes in one kind of file only."""
    first, *others = error.places
    kinds = "also as .json, .csv, .tsv or .parquet"
    return f"{first}, {kinds}, and {' and '.join(others)}" if others else f"{first}, {kinds}"


def _loaded(built: list[_Built], factory: Any, together: Mapping[str, _Built]) -> LoadedTasks:
    remarks = [_split_remark(name, split) for name, split in factory.splits.items()]
    partial: dict[str, Partial] = {}
    for pattern, all_of_it in together.items():
        if all_of_it.missing:
            remarks.append(f"{pattern!r}: there is no data for {few(list(all_of_it.missing))}, left out.")
    built = [each for each in built if each.there or not each.pattern]
    for each in built:
        if each.missing:
            partial[each.listed.name] = Partial(tuple(each.there), tuple(each.missing))
            remarks.append(
                f"{each.listed.name}: scored on {len(each.there)} of its {len(each.there) + len(each.missing)} tasks; "
                f"there is no data for {few(list(each.missing))}."
            )
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    owners: dict[str, str] = {}
    # Groups first: a task that is named beside its group is asked as the group asks it.
    for each in sorted(built, key=lambda each: (each.listed.kind != "group", -len(each.there))):
        _add(each, tasks, groups, owners, partial, remarks)
    order = [name for each in built for name in each.there]
    ordered = {name: tasks[name] for name in dict.fromkeys(order)}
    return LoadedTasks(ordered, groups, partial, dict(factory.splits), tuple(remarks))


def _split_remark(name: str, split: str) -> str:
    return f"{name}: scored on its {split} split, since the test split is not there."


def _add(
    each: _Built,
    tasks: dict[str, Any],
    groups: dict[str, Any],
    owners: dict[str, str],
    partial: dict[str, Partial],
    remarks: list[str],
) -> None:
    """Put what was built under its names; what another has brought already is left out, and said to be."""
    name = each.listed.name
    if each.listed.kind == "group":
        if name in groups:
            remarks.append(f"{name} is part of {owners[name]}, and is not asked for twice.")
            return
        twice = sorted(set(each.there) & set(tasks))
        if twice:
            raise TaskError(
                f"{name} and {owners[twice[0]]} have tasks in common, and one evaluation asks each task once: "
                f"{', '.join(twice)}. Evaluate one group at a time."
            )
        _prune(each.item, each.absent_type, partial)
        for group in [each.item, *each.item.get_all_groups()]:
            groups[group.name] = group
            owners[group.name] = name
    for task_name, task in each.there.items():
        if task_name in tasks:
            if owners[task_name] != name:
                what = task_name if each.is_task else f"{task_name} of {name}"
                remarks.append(f"{what} is part of {owners[task_name]}, and is asked as that asks it.")
        else:
            tasks[task_name] = task
            owners[task_name] = name


def _prune(group: Any, absent_type: type[Any], partial: dict[str, Partial]) -> None:
    """Take what is absent out of a group and its groups, and groups of which nothing is left."""
    leaves = list(_leaves(group))
    missing = tuple(leaf.task_name for leaf in leaves if isinstance(leaf, absent_type))
    if missing:
        there = tuple(leaf.task_name for leaf in leaves if not isinstance(leaf, absent_type))
        partial[group.name] = Partial(there, missing)
    for item in list(group):
        if isinstance(item, absent_type):
            group.pop(item.task_name)
        elif not hasattr(item, "task_name"):
            _prune(item, absent_type, partial)
            if not len(item):
                group.pop(item.name)
