"""Importing the libraries where they may be broken: what a self-test is made for must not end it in a traceback."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import NamedTuple

from qlora_cli.errors import SelftestError

_OURS = "qlora_cli"
# What our own modules import. A name that is none of these was never there: that is a mistake of ours.
_LIBRARIES = (
    *("torch", "transformers", "datasets", "bitsandbytes", "accelerate", "safetensors", "tokenizers", "numpy"),
    *("pydantic", "huggingface_hub", "psutil", "filelock", "jinja2", "yaml", "lm_eval"),
)


class _Place(NamedTuple):
    """A line of code that was being run: of which package, in which function, and where."""

    package: str
    function: str
    where: str


@contextmanager
def telling_broken_libraries() -> Iterator[None]:
    """Turn an import that fails inside a library, or for want of one, into a message; anything else stays as it is.

    Raises:
        SelftestError: naming the library, its version, what it said, and where.
    """
    try:
        yield
    except Exception as error:  # a library that is broken may raise anything, such as OSError for want of a file
        chain = _chain(error)
        if (message := _message(chain[-1], [place for one in chain for place in _places(one)])) is None:
            raise
        raise SelftestError(message) from None


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, down to where it began: transformers puts one of its own before it."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _places(error: BaseException) -> Iterator[_Place]:
    for frame, line in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        yield _Place(package, frame.f_code.co_name, f"{frame.f_code.co_filename}, line {line}")


def _message(error: BaseException, places: list[_Place]) -> str | None:
    """What to say; None if it is not an import of a library that failed."""
    ours = max((number for number, place in enumerate(places) if place.package == _OURS), default=-1)
    # Below ours, code that runs because it is imported: a call of ours that fails has functions alone there.
    importing = [
        place
        for place in places[ours + 1 :]
        if place.function == "<module>" and place.package not in sys.stdlib_module_names
    ]
    wanted = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if importing:
        # A name that is not in another library: either of the two may be the wrong one.
        other = wanted if wanted in _LIBRARIES and wanted != importing[-1].package else None
        return _told(importing[-1].package, other, error, importing[-1].where)
    return _told(wanted, None, error, places[-1].where) if wanted in _LIBRARIES else None


def _told(module: str, other: str | None, error: BaseException, where: str) -> str:
    packages = [_distribution(name) for name in (module, other) if name]
    package, version = packages[0]
    said = f"{type(error).__name__}: {' '.join(str(error).split())} ({where})"
    if version is None:
        return f"{package} is not installed: {said}. Install it: pip install {package}"
    if (missing := _missing(error)) and missing != module and _distribution(missing)[1] is None:
        # Not by its own name: what a module is installed as may be called otherwise, and be anybody's.
        needed = f"Install what it needs: pip install {package}=={version}"
        return f"{package} {version} cannot be imported: {said}. {needed}"
    exact = " ".join(f"{name}=={number}" if number else name for name, number in packages)
    names = "it" if other is None else f"it and {packages[1][0]}"
    build = version.partition("+")[2] if package == "torch" else ""
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""  # PyPI has other builds
    return (
        f"{package} {version} cannot be imported: {said}. "
        f"Reinstall {names}: pip install --force-reinstall --no-deps {exact}{index}"
    )


def _missing(error: BaseException) -> str | None:
    """The package that was looked for in vain, if it is not one that belongs to Python."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return None if name is None or "." in name or name in sys.stdlib_module_names else name


def _distribution(module: str) -> tuple[str, str | None]:
    """What a module's package is called where it is installed from, and its version, without importing it."""
    names = (module, *metadata.packages_distributions().get(module, ["PyYAML"] if module == "yaml" else ()))
    for name in names:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return names[-1], None
