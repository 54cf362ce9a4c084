"""Pieces of the READMEs that are written beside weights. They go wherever the weights go: what is put into them is made
harmless, so that it names no folder of the machine it was made on, repeats no secret, and is no markup.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# Tokens of the hub and of others that begin in a way of their own.
_SECRET = re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[bp]-)[A-Za-z0-9_-]{16,}|\bAKIA[0-9A-Z]{16}\b")
# An absolute path, of which the last part may be told; not the path of a URL.
_FOLDERS = re.compile(r"(?<![\w.:/~-])(?:~[\w.-]*|[A-Za-z]:)?[/\\](?:[^\s/\\'\"`|:*?<>]+[/\\])+(?=[^\s/\\]|$)")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its cells are taken as they are."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in lines)


def is_hub_name(name: str) -> bool:
    """Whether this could be the name of a model on the hub."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None


def plain(text: str) -> str:
    """Text on one line in which nothing is markup."""
    line = " ".join(harmless(text).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)


def code(text: str) -> str:
    """Text on one line as code; within a table, too."""
    line = " ".join(harmless(text).split()).replace("`", "'")
    return f"`{line}`".replace("|", "\\|")


def fenced(text: str, language: str) -> str:
    """A block of code, whatever is in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def harmless(text: str) -> str:
    """The text without the folders of absolute paths and without what looks like a secret."""
    home = str(Path.home())
    if len(home) > 1:  # a service may have / for its home
        text = text.replace(home, "…")  # by itself, for it may have spaces in it
    return _FOLDERS.sub("…/", without_secrets(text))


def without_secrets(text: str) -> str:
    """The text without what looks like a key to somewhere."""
    return _SECRET.sub("(left out)", text)
