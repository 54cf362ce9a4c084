"""The folder in which the checks work, and what they have there; nothing is left of it afterwards."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.disk import telling_disk_errors
from qlora_cli.errors import RunError
from qlora_cli.model.adapter_config import WEIGHTS_FILE
from qlora_cli.recipe.schema import Recipe
from qlora_cli.selftest.material import save_model, write_rows

_PREFIX = "qlora-selftest-"
_CACHE = "XDG_CACHE_HOME"
_WAY_OUT = "The self-test needs 5 MB in the folder for temporary files: set TMPDIR to one on a disk that has them"


@dataclass(frozen=True)
class Workbench:
    """A temporary folder with a tiny base model in it, and the device that everything is done on."""

    folder: Path
    device: torch.device

    @property
    def base(self) -> Path:
        """The base model's folder."""
        return self.folder / "base"

    def environment(self) -> dict[str, str]:
        """What a process that works here is to be told: encoded rows are kept here, and nothing is fetched."""
        return {_CACHE: str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}

    def recipe(
        self,
        name: str,
        *,
        rows: int,
        quantization: Mapping[str, Any] | None = None,
        lora: Mapping[str, Any] | None = None,
        dataset: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """A recipe that trains on so many rows into the folder `name`; what is not said is as users have it, but for
        a learning rate at which a few steps leave a mark, and constant, so that a run is the beginning of a longer one.
        """
        file = self.folder / f"rows-{rows}.jsonl"
        if not file.exists():
            write_rows(file, rows)
        steps = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1}
        return Recipe.model_validate(
            {
                "base_model": str(self.base),
                "quantization": dict(quantization or {}),
                "lora": {"rank": 8, "alpha": 16} | dict(lora or {}),
                "dataset": {"train": str(file), "max_length": 256} | dict(dataset or {}),
                "training": steps | {"device": self.device.type} | dict(training or {}),
                "output_dir": str(self.folder / name),
            }
        )


@contextmanager
def workbench(device: torch.device) -> Iterator[Workbench]:
    """A workbench with its model, gone at the end however that comes.

    Inside, this process keeps what it encodes there too, and not where the user's own rows are kept.

    Raises:
        RunError: if the folder or the model cannot be written.
    """
    with _telling_the_way_out():
        # On Windows a file that is mapped into memory cannot be deleted yet; that must not hide what was found.
        temporary = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
    with temporary as folder:
        bench = Workbench(Path(folder), device)
        with _telling_the_way_out():
            save_model(bench.base)
        with _environment({_CACHE: bench.environment()[_CACHE]}):
            yield bench


@contextmanager
def _telling_the_way_out() -> Iterator[None]:
    """Say of a failed write where temporary files go, and how to have them elsewhere: no recipe names that place."""
    try:
        folder = Path(tempfile.gettempdir())
        with telling_disk_errors(folder):
            yield
    except FileNotFoundError as error:  # none of those that Python tries can be written, and it names them
        raise RunError(f"{error.strerror}. {_WAY_OUT}") from None
    except RunError as error:
        raise RunError(f"{error}. {_WAY_OUT}") from None


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def digest(adapter: Path) -> str:
    """SHA-256 of an adapter's weights file."""
    return hashlib.sha256((adapter / WEIGHTS_FILE).read_bytes()).hexdigest()
