"""What of an adapter may be on the hub, looked up without the libraries that would ask for it.

The hub's client has to be told before it is imported whether it shall ask. This is a look at what is written, and no
check: what is wrong with it is told later, in full.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from qlora_cli.errors import QloraError
from qlora_cli.model.adapter_config import CONFIG_FILE, WEIGHTS_FILE
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.paths import expand_home
from qlora_cli.training.run_folder import RunFolder

PICKLE = "adapter_model.bin"


def holds_adapter_files(path: Path) -> bool:
    """Whether a folder has a file of an adapter in it, the weights as pickle included."""
    return any((path / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE, PICKLE))


def holds_run(path: Path) -> bool:
    """Whether a folder has something in it that only a run leaves, or an adapter in its `adapter/`."""
    run = RunFolder(path)
    begun = run.recipe.is_file() or run.record.is_file() or run.checkpoints.is_dir()
    return begun or (run.adapter / CONFIG_FILE).is_file()


def named_sources(path: Path) -> list[str]:
    """Names of models and data that an adapter, a checkpoint or a run at `path` mentions: of the hub, or local."""
    folder = Path(expand_home(str(path)))
    names: dict[str, None] = {}
    # A run may be two folders up from a checkpoint, and three from the adapter in it.
    for place in (folder, folder.parent, folder.parent.parent, folder.parent.parent.parent):
        with suppress(OSError, QloraError):
            if (place / "recipe.yaml").is_file():
                recipe = load_recipe(place / "recipe.yaml", must_exist=False)
                sources = (*recipe.dataset.train_sources, *recipe.dataset.validation_sources)
                names |= dict.fromkeys([recipe.base_model, *(source.path for source in sources)])
                break
    for config in (folder, folder / "adapter"):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            data = json.loads((config / "adapter_config.json").read_text(encoding="utf-8"))
            if isinstance(name := data["base_model_name_or_path"], str):
                names[name] = None
    return list(names)
