"""The word that was probably meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_LONGEST = 64  # letters of what may be a misspelt word: no field has half as many


def plain(word: str) -> str:
    """A key as we would write it: `perDevice-Batch_Size` is `per_device_batch_size`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", word)
    return re.sub(r"[\s_-]+", "_", spaced).strip("_").lower()


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` is a slip or two away from, or that is much alike; None if there is none."""
    known = list(choices)
    return misspelt(word, known) or alike(word, known)


def misspelt(word: str, choices: Iterable[str]) -> str | None:
    """The choice that a few slips, for the word's length, make of `word`."""
    allowed = _slips_allowed(len(word))
    near = [choice for choice in choices if abs(len(choice) - len(word)) <= allowed] if len(word) <= _LONGEST else []
    found = min(((distance(word.lower(), choice.lower()), choice) for choice in near), default=(allowed + 1, ""))
    return found[1] if found[0] <= allowed else None


def alike(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The choice that has most in common with `word`, by difflib's ratio."""
    if len(word) > _LONGEST:
        return None
    found = difflib.get_close_matches(word.lower(), list(choices), n=1, cutoff=cutoff)
    return found[0] if found else None


def _slips_allowed(length: int) -> int:
    # One letter may stand for any other, and so says nothing.
    return min(2, max(length // 4, int(length > 2)))


def is_slip(word: str, choice: str) -> bool:
    """Whether one letter added, left out, mistaken or exchanged with its neighbour makes `choice` of `word`."""
    if abs(len(word) - len(choice)) > 1 or word == choice:
        return False
    same = next((i for i, (a, b) in enumerate(zip(word, choice, strict=False)) if a != b), min(len(word), len(choice)))
    a, b = word[same:], choice[same:]
    return a[1:] == b or a == b[1:] or a[1:] == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


def distance(a: str, b: str) -> int:
    """Edits from `a` to `b`: insertions, deletions, substitutions and exchanges of two neighbours, each letter in one
    edit at most (optimal string alignment)."""
    before: list[int] = []
    previous = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            cost = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, previous = previous, row
    return previous[-1]
