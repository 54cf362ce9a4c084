"""What the name of a target stands for: an adapter, a model folder, or something on the hub.

Without torch: a command tells a mistyped name before anything heavy is imported. This is a look at what is there, and
no check of it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from qlora_cli.errors import ModelError, QloraError
from qlora_cli.merging.adapters.peek import holds_adapter_files, holds_run
from qlora_cli.recipe.data_files import near_name, shown_path
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.paths import HUB_NAME, expand_home, looks_local
from qlora_cli.recipe.words import misspelt

_CONFIG = "config.json"
_MANY = 5  # names that a message lists
_MANY_FOLDERS = 2000  # to look into


@dataclass(frozen=True)
class Looked:
    """What a target is by its look.

    Attributes:
        kind: `adapter` is a run, a checkpoint of one, or a PEFT folder.
        name: an absolute path, or the name on the hub.
        meant: of a name for the hub, the end of a message: something here that is called much like it.
    """

    kind: Literal["adapter", "model", "hub"]
    name: str
    meant: str = ""


def look_at(target: str) -> Looked:
    """What `target` stands for; nothing is read.

    Raises:
        ModelError: if it is nothing that could be scored: what was looked for, what is there, what may have been meant.
    """
    text = expand_home(target)
    if not text.strip():
        raise ModelError(f"expected {_WANTED}, got nothing")
    path = Path(text).absolute()
    # `runs/x/adapter/..` and `.` are the folders they mean; symbolic links stay as they were given.
    path = path.resolve() if path.name in ("..", "") else path
    try:
        if path.is_dir():
            return _folder(path)
        if path.is_file():
            raise ModelError(_file(path))
    except OSError as error:  # not ours to read, or a name that no file can have
        raise ModelError(f"{text[:200]}: cannot be looked up: {error.strerror or error}") from None
    meant = near_name(path)
    if looks_local(text) or not HUB_NAME.fullmatch(text) or _misspelt_run(path):
        raise ModelError(
            f"{shown_path(path)}: there is no such folder{meant} Expected {_WANTED}, or a hub name such as org/name"
        )
    return Looked("hub", text, meant if meant.startswith("; did you mean") else "")


_WANTED = "the folder of a run, a checkpoint, an adapter or a model"
_KINDS = (
    "a run (adapter/ or checkpoints/ in it), a checkpoint of one, an adapter (adapter_config.json and "
    "adapter_model.safetensors), or a model (config.json and *.safetensors)"
)


def _folder(path: Path) -> Looked:
    if holds_adapter_files(path) or holds_run(path) or _is_checkpoint(path):
        return Looked("adapter", str(path))
    if (path / _CONFIG).is_file():
        return Looked("model", str(path))
    shown = shown_path(path)
    within = _targets_within(path)
    if within:
        names = ", ".join(shown_path(folder) for folder in within[:_MANY])
        more = f", … ({len(within)} in all)" if len(within) > _MANY else ""
        raise ModelError(f"{shown}: nothing to score in this folder, but in folders inside. Name one: {names}{more}")
    if next(path.glob("*.gguf"), None) is not None:
        raise ModelError(f"{shown}: holds GGUF files, which are not read. Give the model that they were made from")
    raise ModelError(f"{shown}: nothing to score in this folder. Expected {_KINDS}")


def _is_checkpoint(path: Path) -> bool:
    """Of a damaged checkpoint, too, it is told what is damaged."""
    return path.name.startswith("step-") and (path / "adapter").is_dir()


def _file(path: Path) -> str:
    """Why a file is no target, and what is."""
    shown, suffix = shown_path(path), path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        run = ""
        with suppress(QloraError):
            run = f", which it says is {load_recipe(path, must_exist=False).output_dir}"
        return f"{shown} is a recipe; expected the folder of the run that was made with it{run}"
    if suffix == ".gguf":
        return f"{shown}: GGUF files are not read. Give the model that it was made from"
    if path.name == _CONFIG or suffix in (".safetensors", ".bin") or holds_adapter_files(path.parent):
        return f"{shown} is a file; expected the folder that it lies in: {shown_path(path.parent)}"
    return f"{shown} is a file; expected {_WANTED}"


def _misspelt_run(path: Path) -> bool:
    """Whether this is a slip away from a run beside it: `runs/name` has the look of a hub name."""
    names = [folder.name for folder in _targets_within(path.parent) if not (folder / _CONFIG).is_file()]
    return misspelt(path.name, names) is not None


def _targets_within(path: Path) -> list[Path]:
    """Folders directly inside that hold something to score."""
    with suppress(OSError):
        folders = sorted(folder for folder in islice(path.iterdir(), _MANY_FOLDERS) if folder.is_dir())
        return [f for f in folders if holds_adapter_files(f) or holds_run(f) or (f / _CONFIG).is_file()]
    return []
