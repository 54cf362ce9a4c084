"""What a library that cannot be imported is told as, and what is no such thing."""

from __future__ import annotations

import importlib
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

from qlora_cli.commands.importing import telling_broken_libraries
from qlora_cli.errors import SelftestError
from tests.support.cli import ENVIRONMENT, process


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that modules are looked for in first; what is here already is not taken from there."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("accelerate", "tokenizers", "torch", "yaml"):
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
    return tmp_path


def place(folder: Path, module: str, text: str) -> Path:
    """A module of this text."""
    file = folder / f"{module}.py"
    file.write_text(text, encoding="utf-8")
    return file


def told(module: str) -> str:
    with pytest.raises(SelftestError) as caught, telling_broken_libraries():
        importlib.import_module(module)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise RuntimeError('no\\n  kernel')", "RuntimeError: no kernel"),
        ("raise ImportError('libx.so')", "ImportError: libx.so"),
        ("import ctypes\nctypes.CDLL('lib-of-nobody.so')", "OSError: lib-of-nobody.so: cannot open shared object file: "
         "No such file or directory"),
        ("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ImportError('see above') from e",
         "ZeroDivisionError: division by zero"),
    ],
)  # fmt: skip
def test_whatever_it_raises(made: Path, text: str, said: str) -> None:
    """Its version is known without it, what is said takes one line, and of several errors the first is told."""
    file, version = place(made, "accelerate", text + "\n"), metadata.version("accelerate")
    line = 2 if "\n" in text else 1
    assert told("accelerate") == (
        f"accelerate {version} cannot be imported: {said} ({file}, line {line}). "
        f"Reinstall it: pip install --force-reinstall --no-deps accelerate=={version}"
    )


def test_the_innermost_is_named_as_it_is_installed(made: Path) -> None:
    """PyYAML is what `yaml` comes in, whoever imports it."""
    place(made, "accelerate", "import yaml\n")
    file, version = place(made, "yaml", "raise OSError('x')\n"), metadata.version("PyYAML")
    assert told("accelerate") == (
        f"PyYAML {version} cannot be imported: OSError: x ({file}, line 1). "
        f"Reinstall it: pip install --force-reinstall --no-deps PyYAML=={version}"
    )


def test_what_a_library_misses(made: Path) -> None:
    """A package is not installed by the name of its module; a name that is not in another one may be either's fault."""
    file, version = place(made, "accelerate", "import nothingness\n"), metadata.version("accelerate")
    assert told("accelerate") == (
        f"accelerate {version} cannot be imported: ModuleNotFoundError: No module named 'nothingness' "
        f"({file}, line 1). Install what it needs: pip install accelerate=={version}"
    )
    sys.modules.pop("accelerate", None)
    file.write_text("from tokenizers import nothingness\n", encoding="utf-8")
    other, tokenizers = place(made, "tokenizers", ""), metadata.version("tokenizers")
    assert told("accelerate") == (
        f"accelerate {version} cannot be imported: ImportError: cannot import name 'nothingness' from 'tokenizers' "
        f"({other}) ({file}, line 1). Reinstall it and tokenizers: pip install --force-reinstall --no-deps "
        f"accelerate=={version} tokenizers=={tokenizers}"
    )


def test_a_build_of_torch_is_not_on_pypi(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command says where it is."""
    monkeypatch.setattr(metadata, "version", lambda name: "2.99.0+cu128")
    place(made, "torch", "raise OSError('x')\n")
    assert told("torch").endswith(
        "pip install --force-reinstall --no-deps torch==2.99.0+cu128 --index-url https://download.pytorch.org/whl/cu128"
    )


def test_one_that_is_not_installed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no version to tell."""

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert told("accelerate").startswith(
        "accelerate is not installed: ModuleNotFoundError: import of accelerate halted"
    )
    assert told("accelerate").endswith(" Install it: pip install accelerate")


@pytest.mark.parametrize(
    "text",
    [
        "import qlora_cli.nothingness",
        "from qlora_cli.errors import nothingness",
        "import nothingness",
        "import json\njson.loads('{')",
        "import torch\ntorch.zeros('x')",
        "raise RuntimeError('ours')",
        "def f():\n    raise OSError('ours')\nf()",
    ],
)
def test_a_mistake_of_ours_stays_one(text: str) -> None:
    """With its traceback, though it shows while modules are imported."""
    ours = {"__name__": "qlora_cli.made"}
    code = compile(text, "made.py", "exec")
    with pytest.raises(Exception, match=r".") as caught, telling_broken_libraries():
        exec(code, ours)
    assert not isinstance(caught.value, SelftestError)


@pytest.mark.parametrize("json_only", [[], ["--json"]], ids=["shown", "json"])
def test_a_broken_library_is_named(json_only: list[str], tmp_path: Path) -> None:
    """It cannot be imported, for want of CUDA's: package, version, what it said, what to do; exit code 1."""
    broken = tmp_path / "bitsandbytes" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text('raise OSError("libcudart.so.12: cannot open shared object file")\n', encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    done = process("selftest", "--device", "cpu", *json_only, folder=tmp_path, PYTHONPATH=paths)
    version = metadata.version("bitsandbytes")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: bitsandbytes {version} cannot be imported: OSError: libcudart.so.12: cannot open shared object file "
        f"({broken}, line 1). Reinstall it: pip install --force-reinstall --no-deps bitsandbytes=={version}\n"
    )
