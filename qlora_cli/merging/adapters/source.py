"""What is to be merged: where the adapter is, over which base it was trained, and how that was stored."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError, QloraError
from qlora_cli.merging.adapters.locating import Located, locate
from qlora_cli.model.adapter_config import CONFIG_FILE, WEIGHTS_FILE
from qlora_cli.model.files import read_config, read_json_object
from qlora_cli.model.source import ModelSource
from qlora_cli.model.storage import describe_storage
from qlora_cli.recipe.data_files import shown_path
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.paths import HUB_NAME, expand_home, looks_local, model_problem
from qlora_cli.recipe.schema import QuantizationSection, Recipe
from qlora_cli.training.run_folder import RunFolder

# The words of --trained-base, and what they say of the base: bits, quant_type, double_quant.
TRAINED_BASES: dict[str, dict[str, Any]] = {
    "16bit": {"bits": 16},
    "nf4": {"bits": 4, "quant_type": "nf4", "double_quant": False},
    "nf4-double": {"bits": 4, "quant_type": "nf4", "double_quant": True},
    "fp4": {"bits": 4, "quant_type": "fp4", "double_quant": False},
    "fp4-double": {"bits": 4, "quant_type": "fp4", "double_quant": True},
}


@dataclass(frozen=True)
class AdapterSource:
    """An adapter on disk and what is known of its training.

    Attributes:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        base: the model it was trained over.
        quantization: how the base was stored while it was trained.
        told_by: who says so, as in `the run's recipe`; it is said to the user.
        run: the run it comes from, if it comes from one.
        recipe: that run's recipe.
        step: the optimizer step of a checkpoint; None for a finished run or a folder from elsewhere.
        remarks: whole sentences on what was taken, such as a checkpoint of a run that did not finish.
    """

    folder: Path
    base: ModelSource
    quantization: QuantizationSection
    told_by: str
    run: RunFolder | None = None
    recipe: Recipe | None = None
    step: int | None = None
    remarks: tuple[str, ...] = ()


def find_adapter(
    path: Path, *, base_model: str | None, revision: str | None, trained_base: str | None
) -> AdapterSource:
    """The adapter at `path`: a run folder, a checkpoint of one, the `adapter/` inside either, or any PEFT folder.

    Of a run that did not finish it is the newest whole checkpoint. No weights are read, but the base's `config.json`
    is looked at where nothing else tells how the base was stored.

    Args:
        base_model: where the base is, a folder or a hub name, if not where the adapter says.
        revision: of a hub base, if not the one the adapter says.
        trained_base: one of `TRAINED_BASES`, where nothing tells how the base was stored.

    Raises:
        ModelError: if there is no adapter there, its base is not known or not there, or what is said contradicts what
            is known.
        RecipeError: if the run's recipe cannot be read.
        HubUnreachableError: if the base's configuration is on the hub, and that gives no answer.
    """
    found = locate(path)
    recipe = None if found.run is None else load_recipe(found.run.recipe, must_exist=False)
    said, by = _said_base(found, recipe)
    base = _base(said, by, base_model, revision)
    quantization, told_by = _storage_of(base, said, recipe, trained_base)
    remarks = found.remarks
    if told_by == _ASSUMED:
        remarks += (_ASSUMPTION,)
    if base.trust_remote_code:
        remarks += ("the base model's own code may run here: trust_remote_code in the run's recipe allows it",)
    return AdapterSource(found.folder, base, quantization, told_by, found.run, recipe, found.step, remarks)


def read_adapter_json(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` as it is written; whether it can be applied is for others to say.

    Raises:
        ModelError: if it cannot be read or is no JSON object.
    """
    file = folder / CONFIG_FILE
    try:
        return read_json_object(file)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from None


def adapter_sha256(folder: Path) -> str:
    """The SHA-256 of the adapter's weights file, in hex."""
    file = folder / WEIGHTS_FILE
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from None


def _said_base(found: Located, recipe: Recipe | None) -> tuple[ModelSource | None, str]:
    """The base that the run's recipe or the adapter names, and which of the two does."""
    if recipe is not None:
        return ModelSource(recipe.base_model, recipe.revision, recipe.trust_remote_code), _RECIPE
    config = read_adapter_json(found.folder)
    named, commit = config.get("base_model_name_or_path"), config.get("revision")
    by = shown_path(found.folder / CONFIG_FILE)
    if not isinstance(named, str) or not named:
        return None, by
    return ModelSource(_resolved(named), commit if isinstance(commit, str) and commit else None), by


def _base(said: ModelSource | None, by: str, base_model: str | None, revision: str | None) -> ModelSource:
    """The base that is to be read: the one that was said, but for what the arguments change."""
    if base_model is None:
        if said is None:
            raise ModelError(f"{by} does not say which model the adapter was trained over. Say it with --base-model")
        base = said
    else:
        by, name, before = "--base-model", _resolved(base_model), said or ModelSource("")
        # A revision belongs to the name it was said with; leave to run its code, to the model wherever it now is.
        base = replace(before, name=name, revision=before.revision if name == before.name else None)
    _check_base(base.name, by)
    if not Path(base.name).is_absolute():
        return base if revision is None else replace(base, revision=revision)
    if revision is not None:
        folder = shown_path(Path(base.name))
        raise ModelError(
            f"--revision: is for models of the hub, and the base model is a local folder, {folder}: leave it out"
        )
    return replace(base, revision=None)


def _resolved(name: str) -> str:
    """An absolute path for what is a path by its look, or is there; a hub name stays as it is."""
    name = expand_home(name)
    # os.path: keeps links, and what cannot be a path is none that is there.
    return os.path.abspath(name) if looks_local(name) or os.path.exists(name) else name  # noqa: PTH100, PTH110


def _check_base(name: str, by: str) -> None:
    elsewhere = "" if by == "--base-model" else ". If it is elsewhere now, say where with --base-model"
    if not Path(name).is_absolute():
        if not HUB_NAME.fullmatch(name):
            raise ModelError(
                f"{by}: the base model {name!r} is no folder that is there, and no hub name such as org/name{elsewhere}"
            )
    elif problem := model_problem(Path(name), shown_path(Path(name))):
        problem = problem.rstrip(".")
        further = elsewhere.removeprefix(".") if problem.endswith("?") else elsewhere
        raise ModelError(f"{by}: the base model {problem}{further}")


_RECIPE = "the run's recipe"
_ASSUMED = "assumed, as nothing tells"
_ASSUMPTION = (
    "nothing tells how the base was stored while this adapter was trained: 16 bits are assumed. If it was in 4 bits, "
    "say --trained-base nf4-double (QLoRA's own; or nf4, fp4, fp4-double)"
)


def _storage_of(
    base: ModelSource, said: ModelSource | None, recipe: Recipe | None, trained_base: str | None
) -> tuple[QuantizationSection, str]:
    """How the base was stored in training, and who says so. `said` is the base that the adapter names."""
    if trained_base is not None and trained_base not in TRAINED_BASES:
        raise ModelError(f"--trained-base: expected {_one_of(TRAINED_BASES)}, got {trained_base!r}")
    if recipe is not None:
        _check_agreement(trained_base, recipe.quantization, _RECIPE)
        return recipe.quantization, _RECIPE
    config = read_config(base)
    if (stored := _stored_quantization(config)) is not None:
        by = "the base's own quantization_config"
    elif said is not None and said.name != base.name:
        # Often a copy in 4 bits of the model that is now given whole.
        by = f"the quantization_config of {said.name}, which the adapter names"
        with suppress(QloraError):  # it may be nowhere any more
            stored = _stored_quantization(read_config(said))
    if stored is not None:
        _check_agreement(trained_base, stored, by)
        return stored, by
    dtype = _compute_dtype(_dtype_name(config))
    if trained_base is not None:
        return _section(TRAINED_BASES[trained_base], dtype), "--trained-base"
    return _section(TRAINED_BASES["16bit"], dtype), _ASSUMED


def _check_agreement(trained_base: str | None, known: QuantizationSection, by: str) -> None:
    if trained_base is None:
        return
    said = _section(TRAINED_BASES[trained_base], known.compute_dtype)
    same = said.bits == known.bits and (
        said.bits == 16 or (said.quant_type, said.double_quant) == (known.quant_type, known.double_quant)
    )
    if not same:
        raise ModelError(
            f"--trained-base: {trained_base} was said, but {by} has {describe_storage(known)}. Leave it out: it is for "
            "adapters of which nothing tells how their base was stored"
        )


def _stored_quantization(config: dict[str, Any]) -> QuantizationSection | None:
    """What a base that is stored in 4 bits by bitsandbytes says of it; None for a base that is stored plain.

    Raises:
        ModelError: if it is stored quantised in another way: neither base could be had from that.
    """
    stored = config.get("quantization_config")
    if stored is None:
        return None
    if not isinstance(stored, dict) or stored.get("load_in_4bit") is not True:
        kind = stored.get("quant_method") if isinstance(stored, dict) else stored
        in_8_bits = isinstance(stored, dict) and stored.get("load_in_8bit")
        raise ModelError(
            f"the base model's weights are stored quantised ({'8-bit ' if in_8_bits else ''}{kind}), which cannot be "
            "merged into. Name the model it was made from with --base-model"
        )
    quant_type = stored.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
    if quant_type not in ("nf4", "fp4"):
        raise ModelError(f"the base model's quantization_config: expected nf4 or fp4, got {quant_type!r}")
    double = stored.get("bnb_4bit_use_double_quant", False) is True
    dtype = _compute_dtype(str(stored.get("bnb_4bit_compute_dtype", "float32")))
    return _section({"bits": 4, "quant_type": quant_type, "double_quant": double}, dtype)


def _section(form: dict[str, Any], dtype: str) -> QuantizationSection:
    return QuantizationSection.model_validate({**form, "compute_dtype": dtype})


def _compute_dtype(name: str) -> str:
    """float32 holds every float16 value, bfloat16 does not: the latter is only for what was in it."""
    return "bfloat16" if name.removeprefix("torch.") == "bfloat16" else "float32"


def _dtype_name(config: dict[str, Any]) -> str:
    for section in (config, config.get("text_config")):
        if isinstance(section, dict) and (name := section.get("dtype") or section.get("torch_dtype")):
            return str(name)
    return "float32"


def _one_of(words: Any) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}"
