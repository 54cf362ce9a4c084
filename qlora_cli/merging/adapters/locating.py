"""Which folder a path to an adapter means: one may name a run, a checkpoint of it, or the adapter itself."""

from __future__ import annotations

import filecmp
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import ModelError, QloraError
from qlora_cli.merging.adapters.peek import PICKLE, holds_adapter_files, holds_run
from qlora_cli.model.adapter_config import CONFIG_FILE, WEIGHTS_FILE
from qlora_cli.recipe.data_files import near_name, shown_path
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.paths import HUB_NAME, expand_home
from qlora_cli.training.checkpoint import ADAPTER, checkpoint_step, list_checkpoints, newest_valid
from qlora_cli.training.manifest import find_fault
from qlora_cli.training.run_folder import RunFolder

_MANY = 5  # names that a message lists
_MANY_FOLDERS = 2000  # to look into for adapters


@dataclass(frozen=True)
class Located:
    """Where the adapter's two files are, the run around them, and the step of a checkpoint."""

    folder: Path
    run: RunFolder | None = None
    step: int | None = None
    remarks: tuple[str, ...] = ()


def locate(path: Path) -> Located:
    """The adapter that `path` means.

    Raises:
        ModelError: if there is none, with what is there instead and what to do; if a checkpoint is damaged.
    """
    given = Path(expand_home(str(path)))
    path = given.absolute()
    if not path.is_dir():
        raise ModelError(_no_folder(given, path))
    # `runs/x/adapter/..` and `.` are the folders they mean; symbolic links stay as they were given.
    path = path.resolve() if path.name in ("..", "") else path
    if _is_checkpoint(path):
        return _checkpoint(path)
    if holds_adapter_files(path):
        if path.name == ADAPTER and _is_checkpoint(path.parent):
            return _checkpoint(path.parent)
        _check_files(path)
        return Located(path, _run_at(path.parent) if path.name == ADAPTER else None)
    if holds_run(path):
        return _of_run(RunFolder(path))
    raise ModelError(_no_adapter(path))


def _of_run(run: RunFolder) -> Located:
    """The adapter of a finished run, else its newest whole checkpoint."""
    known = _run_at(run.path)
    status = _status(run)
    finished = (run.adapter / CONFIG_FILE).is_file()
    if finished and status in (None, "completed"):
        _check_files(run.adapter)
        return Located(run.adapter, known)
    newest, damaged = newest_valid(run.checkpoints)
    passed_over = tuple(f"passed over checkpoint {path.name}: {fault}" for path, fault in damaged.items())
    if finished and (newest is None or _same_weights(run.adapter, newest / ADAPTER)):
        # Resumed to go on for longer, and stopped before there was more to take.
        _check_files(run.adapter)
        return Located(run.adapter, known, remarks=passed_over)
    if newest is not None:
        taken = f"{_how_it_stands(status)}: its newest whole checkpoint, {newest.name}, is taken"
        remarks = (*passed_over, f"the run in {shown_path(run.path)} {taken}")
        return Located(newest / ADAPTER, known, checkpoint_step(newest), remarks)
    if damaged:
        faults = "".join(f"\n  {path.name}: {fault}" for path, fault in damaged.items())
        raise ModelError(f"{shown_path(run.path)}: the run has no adapter, and no checkpoint of it is whole:{faults}")
    raise ModelError(
        f"{shown_path(run.path)}: the run {_how_it_stands(status)}, and has no checkpoint yet. Go on with it: "
        "qlora train RECIPE --resume"
    )


def _how_it_stands(status: str | None) -> str:
    if status == "completed":
        return "has lost its adapter/"
    return "did not finish" if status in (None, "running") else f"did not finish ({status})"


def _same_weights(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return filecmp.cmp(one / WEIGHTS_FILE, other / WEIGHTS_FILE, shallow=False)
    return False


def _checkpoint(path: Path) -> Located:
    if fault := find_fault(path):
        others = [other.name for other in list_checkpoints(path.parent) if other != path and find_fault(other) is None]
        instead = f". Whole ones beside it: {', '.join(others[:_MANY])}" if others else ""
        raise ModelError(f"{shown_path(path)}: the checkpoint is damaged: {fault}{instead}")
    _check_files(path / ADAPTER)
    run = _run_at(path.parent.parent) if path.parent.name == "checkpoints" else None
    return Located(path / ADAPTER, run, checkpoint_step(path))


def _is_checkpoint(path: Path) -> bool:
    """Whether a run wrote this folder; what is damaged in it is another matter."""
    if not (path.name.startswith("step-") and path.name.removeprefix("step-").isdigit() and (path / ADAPTER).is_dir()):
        return False
    return path.parent.name == "checkpoints" or (path / "manifest.json").is_file()


def _run_at(path: Path) -> RunFolder | None:
    """The run in this folder, if it has its recipe: without that, nothing is known of it."""
    run = RunFolder(path)
    return run if run.recipe.is_file() else None


def _status(run: RunFolder) -> str | None:
    try:
        status = json.loads(run.record.read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return status if isinstance(status, str) else None


def _check_files(folder: Path) -> None:
    """Both files have to be there, and the weights not as pickle."""
    shown = shown_path(folder)
    has_config, has_weights = (folder / CONFIG_FILE).is_file(), (folder / WEIGHTS_FILE).is_file()
    if not has_weights and (folder / PICKLE).is_file():
        raise ModelError(
            f"{shown}: has its weights only as pickle ({PICKLE}), which can run code when read. If you trust it, "
            "convert it with PEFT: load it with PeftModel.from_pretrained and write it with save_pretrained"
        )
    if not has_weights:
        raise ModelError(f"{shown}: has {CONFIG_FILE}, but no {WEIGHTS_FILE} beside it")
    if not has_config:
        raise ModelError(f"{shown}: has {WEIGHTS_FILE}, but no {CONFIG_FILE} beside it, which says how to apply it")


def _no_folder(given: Path, path: Path) -> str:
    """Why what was given is no folder at all."""
    shown = shown_path(path)
    if path.is_file() and path.name in (CONFIG_FILE, WEIGHTS_FILE, PICKLE):
        return f"{shown} is a file of an adapter; expected its folder: {shown_path(path.parent)}"
    if path.is_file() and path.suffix.lower() in (".yaml", ".yml"):
        return f"{shown} is a recipe; expected an adapter: the folder of the run{_run_of_recipe(path)}"
    if path.is_file():
        return f"{shown} is a file; expected a run folder, a checkpoint or an adapter folder"
    text = str(given)
    hub = HUB_NAME.fullmatch(text) and "/" in text and not text.startswith((".", "~")) and not path.parent.exists()
    if hub:
        return (
            f"{shown}: there is no such folder. If it is an adapter on the hub, fetch it first: "
            f"hf download {text} --local-dir {path.name}"
        )
    return f"{shown}: there is no such folder{near_name(path)}"


def _run_of_recipe(recipe: Path) -> str:
    with suppress(QloraError):
        return f", which it says is {load_recipe(recipe, must_exist=False).output_dir}"
    return " that was made with it"


def _no_adapter(path: Path) -> str:
    """What is in a folder that holds no adapter, and what to name instead."""
    shown = shown_path(path)
    within = _adapters_within(path)
    if within:
        names = ", ".join(shown_path(folder) for folder in within[:_MANY])
        more = f", … ({len(within)} in all)" if len(within) > _MANY else ""
        return f"{shown}: no adapter in this folder, but in folders inside. Name one: {names}{more}"
    if (path / "config.json").is_file():
        return (
            f"{shown} is a whole model, not an adapter. Give the adapter here, and the model it was trained over, if "
            "that is not where the adapter says, with --base-model"
        )
    return (
        f"{shown}: no adapter in this folder. Expected a run folder (adapter/ or checkpoints/ in it), a checkpoint, or "
        f"{CONFIG_FILE} and {WEIGHTS_FILE}"
    )


def _adapters_within(path: Path) -> list[Path]:
    """Folders directly inside that hold an adapter or a run."""
    with suppress(OSError):
        folders = sorted(p for p, _ in zip(path.iterdir(), range(_MANY_FOLDERS), strict=False) if p.is_dir())
        return [f for f in folders if (f / CONFIG_FILE).is_file() or (f / "recipe.yaml").is_file()]
    return []
