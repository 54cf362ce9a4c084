"""What a run leaves as its result."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.disk import replacing_folder
from qlora_cli.errors import CheckpointError
from qlora_cli.model.adapter import save_adapter
from qlora_cli.model.source import ModelSource
from qlora_cli.training.checkpoint import ADAPTER
from qlora_cli.training.events import BestKept
from qlora_cli.training.manifest import find_fault


def write_result(
    target: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelSource,
    loaded: BestKept | None,
) -> None:
    """Write the adapter as it is in the model, or that of the checkpoint `loaded`, bit for bit, with the tokenizer.

    Raises:
        CheckpointError: if that checkpoint is not what was written.
    """
    fault = None if loaded is None else find_fault(loaded.path)
    if loaded is not None and fault is not None:
        raise CheckpointError(
            f"training.load_best: the adapter of {loaded.path} was to be the result, and that checkpoint is damaged "
            f"({fault}). Go on with --resume, for the best of the others"
        )
    with replacing_folder(target) as staging:
        if loaded is None:
            save_adapter(model, staging, source)
        else:
            shutil.copytree(loaded.path / ADAPTER, staging, dirs_exist_ok=True)
        tokenizer.save_pretrained(staging)
