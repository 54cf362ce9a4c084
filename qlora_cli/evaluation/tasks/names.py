"""The names that a person gives: checked, spelt out, and looked up."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.index import Index, Kind, task_names
from qlora_cli.recipe.words import alike, distance, misspelt, plain

_MAGIC = frozenset("*?[")
_SUGGESTED = 3  # names, of those that begin with what was given
_FEW = 3  # names that stand for many


@dataclass(frozen=True)
class Listing:
    """A line of `qlora eval --list`: `tasks` is how many the name stands for, `output_type` None for several."""

    name: str
    kind: Kind
    tasks: int
    output_type: str | None


class Chosen(list[str]):
    """Names of the index, each once, in their order.

    `patterns` has those that nothing but a pattern brought, by name: what was not asked for by its name may be left
    out, as a task of a group may.
    """

    def __init__(self, names: Iterable[str], patterns: Mapping[str, str] | None = None) -> None:
        super().__init__(names)
        self.patterns: Mapping[str, str] = patterns or {}


def choose(names: Sequence[str], index: Index) -> Chosen:
    """The names of the index that these mean; `arc_*` stands for all that match.

    A name may hold several, with commas between them.

    Raises:
        TaskError: with every name that there is not, and what was probably meant.
    """
    given = [part.strip() for name in names for part in name.split(",")]
    given = [name for name in given if name]
    if not given:
        raise TaskError("no task is named. qlora eval --list shows those there are.")
    chosen: dict[str, str] = {}  # by name, what brought it
    problems = []
    for name in dict.fromkeys(given):
        found = [name] if name in index else _matches(name, index)
        if not found:
            problems.append(unknown(name, index))
        for one in found:
            chosen.setdefault(one, name)
    if problems:
        raise TaskError("\n".join(problems))
    return Chosen(chosen, {one: name for one, name in chosen.items() if one not in given})


def listing(pattern: str | None, index: Index) -> list[Listing]:
    """The names that match a pattern such as `*arc*`, or that hold a word; all for None.

    The word itself comes first, then what begins with it, and so on alphabetically. Raises TaskError if there are none.
    """
    if pattern is None:
        found: Iterable[str] = index
    elif _MAGIC & set(pattern):
        found = _matches(pattern, index)
    else:
        found = [name for name in index if pattern.lower() in name.lower()]
    word = (pattern or "").lower()
    ordered = sorted(found, key=lambda name: (name.lower() != word, not name.lower().startswith(word), name))
    lines = [Listing(name, index[name].kind, len(task_names(name, index)), index[name].output_type) for name in ordered]
    if not lines:
        raise TaskError(unknown(pattern or "", index))
    return lines


def _matches(pattern: str, index: Index) -> list[str]:
    if not _MAGIC & set(pattern):
        return []
    return sorted(name for name in index if fnmatch.fnmatchcase(name, pattern))


def unknown(name: str, index: Index) -> str:
    """That there is no such name, and which was probably meant."""
    if _MAGIC & set(name):
        return f"no task, group or tag matches {name!r}. qlora eval --list shows those there are."
    meant = _meant(name, index)
    hint = f"did you mean {' or '.join(meant)}?" if meant else "qlora eval --list shows those there are."
    return f"{name!r} is no task, group or tag that lm-eval knows{';' if meant else '.'} {hint}"


def few(names: Sequence[str]) -> str:
    """The names, or of many the first and how many others."""
    if len(names) <= _FEW + 1:
        return ", ".join(names)
    return f"{', '.join(names[:_FEW])} and {len(names) - _FEW} others"


def _meant(name: str, index: Index) -> list[str]:
    """The names that were probably meant, the likeliest first."""
    # As other tools and papers write them: ARC-Easy, SST-2, HellaSwag.
    bare = _bare(name)
    same = sorted((other for other in index if _bare(other) == bare), key=lambda other: distance(other, name))
    if same:
        return same[:1]
    # Most of the names are of one language or subject of a group: a name in whole is nearer than any of those.
    near = [other for other in index if abs(len(other) - len(name)) <= 2 and _shares(name, other)]
    slip = misspelt(plain(name), near)
    if slip:
        return [slip]
    akin = _akin(plain(name), bare, index)
    if akin:
        return akin[:_SUGGESTED]
    close = alike(plain(name), [other for other in index if other[:1].lower() == name[:1].lower()], cutoff=0.75)
    return [close] if close else []


def _akin(word: str, bare: str, index: Index) -> list[str]:
    """Names that have to do with a word: what lies in lm-eval's folder of that name, and what begins with it."""
    inside = {
        name for name, listed in index.items() if listed.file and Path(listed.file).parts[-3:-1] == ("tasks", word)
    }
    ranked = []
    for name, listed in index.items():
        several = listed.kind in ("group", "tag")
        spelt = _bare(name)
        if several and listed.members and bare in spelt and inside.issuperset(listed.members):
            ranked.append((0, len(name), name))
        elif name in inside:
            ranked.append((1, len(name), name))
        elif bare and spelt.startswith(bare):
            ranked.append((2 if several else 3, len(name), name))
    return [name for _, _, name in sorted(ranked)]


def _bare(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _shares(name: str, other: str) -> bool:
    """Whether the two have most of their letters in common: a quick look before a slow one."""
    return len(set(name.lower()) ^ set(other.lower())) <= 4
