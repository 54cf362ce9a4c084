"""All of a merge that is known before a weight is read or written: the adapter, the base, and what goes where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import MergeError, ModelError
from qlora_cli.merging.adapters.changes import BiasUpdate, Change, LowRank
from qlora_cli.merging.adapters.reading import AdapterChanges, read_changes
from qlora_cli.merging.adapters.replacements import Replacement, TokenRows
from qlora_cli.merging.adapters.source import AdapterSource, find_adapter, read_adapter_json
from qlora_cli.merging.base.packed import PackedTensor
from qlora_cli.merging.base.skeleton import Skeleton, build_skeleton
from qlora_cli.merging.pairing import Pairing, pair
from qlora_cli.merging.request import MergeBase, MergeRequest
from qlora_cli.merging.tensors.files import StoredTensor, read_model_tensors
from qlora_cli.model.files import CONFIG_FILE, model_folder, read_json_object
from qlora_cli.model.source import ModelSource
from qlora_cli.model.storage import compute_dtype, describe_storage
from qlora_cli.recipe.data_files import shown_path

_NAMED = 5
_KINDS: tuple[tuple[type[Change], str], ...] = (
    (LowRank, "LoRA on {}"),
    (BiasUpdate, "LoRA's own bias on {}"),
    (TokenRows, "single rows of {}"),
    (Replacement, "{} replaced whole"),
)


@dataclass(frozen=True, eq=False)
class MergePlan:
    """What will be merged.

    Attributes:
        folder: the base's files.
        task_type: PEFT's name for what the adapter was trained for, if it says.
        stored: names of the base's tensors.
        onto: the bases that merged models are made on, the better guess last.
    """

    source: AdapterSource
    folder: Path
    task_type: str | None
    skeleton: Skeleton
    adapter: AdapterChanges
    pairing: Pairing
    stored: tuple[str, ...]
    onto: tuple[MergeBase, ...]
    config_changes: Mapping[str, Any]

    @property
    def unchanged(self) -> list[str]:
        """Names of the base's tensors that the adapter leaves as they are: a client may pass them over as it did."""
        changed = {target.name for target in self.pairing.changed}
        return [name for name in self.stored if name not in changed]

    @property
    def trained_over_originals(self) -> bool:
        """Whether training computed with the base's weights as its files have them, neither in 4 bits nor rounded."""
        computed = compute_dtype(self.source.quantization)
        kinds = {target.base.dtype for target in self.pairing.changed if isinstance(target.base, StoredTensor)}
        return self.source.quantization.bits == 16 and (computed is torch.float32 or kinds <= {computed})

    def describe_changes(self) -> str:
        """How many weights are changed, by the kind of change."""
        counts = Counter(_kind_of(target.change) for target in self.pairing.changed if target.change is not None)
        return ", ".join(kind.format(f"{count:,} weight{'' if count == 1 else 's'}") for kind, count in counts.items())

    def describe_adapter(self) -> str:
        """Where it is, for the screen."""
        source = self.source
        folder = shown_path(source.folder if source.run is None else source.run.path)
        return folder if source.step is None else f"{folder}, step {source.step}"

    def describe_base(self) -> str:
        """How the base was stored in training."""
        return describe_storage(self.source.quantization)


def make_plan(request: MergeRequest) -> MergePlan:
    """Find the adapter and its base, and a place for every change.

    Raises:
        ModelError: if one of them is not there, or they do not fit; listing all that is wrong.
        MergeError: if the adapter is empty: some weights would stay as they are, whatever the base.
        HubUnreachableError: if the base is on the hub, and that gives no answer.
    """
    source = find_adapter(
        request.adapter, base_model=request.base_model, revision=request.revision, trained_base=request.trained_base
    )
    folder = model_folder(source.base)
    base = ModelSource(str(folder.absolute()), None, source.base.trust_remote_code)
    stored = read_model_tensors(folder)
    said = read_adapter_json(source.folder).get("task_type")
    task = said if isinstance(said, str) else None
    skeleton = build_skeleton(base, task, source.quantization)
    adapter = read_changes(source.folder, skeleton.kinds, skeleton.module, skeleton.shapes)
    if not request.allow_unchanged:
        _check_does_something(adapter, source.folder)

    def changed(changes: Mapping[str, Any]) -> Skeleton:
        return build_skeleton(base, task, source.quantization, config_changes=changes)

    described = f"the adapter in {source.folder} and the base model {source.base.name}"
    pairing = pair(stored, skeleton, adapter, lambda: changed({"tie_word_embeddings": False}), described=described)
    sizes = {**_vocabulary(pairing, skeleton), **_labels(pairing, skeleton, task)}
    _check_sizes(pairing, changed(sizes) if sizes else skeleton, described)
    if pairing.unroundable and request.base == "auto":
        remark = f"merged onto the original weights alone, as {_in_pieces(source, pairing.unroundable)}"
        source = replace(source, remarks=(*source.remarks, remark))
    packed = any(isinstance(target.base, PackedTensor) for target in pairing.targets)
    return MergePlan(
        source=source,
        folder=folder,
        task_type=task,
        skeleton=skeleton,
        adapter=adapter,
        pairing=pairing,
        stored=tuple(stored),
        onto=choose_bases(request, source, packed=packed, unroundable=pairing.unroundable),
        config_changes={**pairing.config_changes, **sizes, **_architecture(skeleton, folder)},
    )


def choose_bases(
    request: MergeRequest, source: AdapterSource, *, packed: bool, unroundable: Collection[str] = ()
) -> tuple[MergeBase, ...]:
    """The bases to merge onto.

    Args:
        packed: whether the base's own files hold its weights in 4 bits.
        unroundable: weights that cannot be had as they were in training.

    Raises:
        ModelError: if the one that was asked for cannot be had.
    """
    wanted, in_4_bits = request.base, source.quantization.bits == 4
    if packed:
        if wanted == "original":
            raise ModelError(
                f"--base original: {source.base.name} holds its weights in 4 bits alone. Name the model that it was "
                "made from with --base-model, or merge onto what it holds with --base dequantized"
            )
        return ("dequantized",)
    if not in_4_bits:
        if wanted == "dequantized":
            raise ModelError(
                f"--base dequantized: no weight was in 4 bits while the adapter was trained ({source.told_by}). Use "
                "--base original, or say how the base was stored with --trained-base"
            )
        return ("original",)
    if unroundable:
        if wanted == "dequantized":
            raise ModelError(
                f"--base dequantized: {_in_pieces(source, unroundable)}: these cannot be rounded as they were. Use "
                "--base original"
            )
        return ("original",)
    if wanted == "auto":
        if request.verify:
            return ("original", "dequantized")
        # Without a measurement, the weights that the adapter was trained against are the safer choice. They are on the
        # grid of 4 bits, though: rounded to it again, they lose what a small update has moved them by.
        return ("dequantized",) if request.quantize is None else ("original",)
    return (wanted,)


def _in_pieces(source: AdapterSource, unroundable: Collection[str]) -> str:
    return (
        f"{source.base.name} holds {len(unroundable)} of the weights that were in 4 bits in pieces, which are put "
        f"together when it is loaded, such as {next(iter(unroundable))}"
    )


def _architecture(skeleton: Skeleton, folder: Path) -> dict[str, Any]:
    """The model's class, where the base's configuration names another: a classifier over a language model's layers."""
    named = read_json_object(folder / CONFIG_FILE).get("architectures")
    return {} if named == [skeleton.architecture] else {"architectures": [skeleton.architecture]}


def _vocabulary(pairing: Pairing, skeleton: Skeleton) -> dict[str, Any]:
    """The number of tokens, where the adapter brought embeddings of another number."""
    for target in pairing.changed:
        if target.parameter == f"{skeleton.input_embedding}.weight":
            return {} if target.shape == skeleton.shapes[target.parameter] else {"vocab_size": target.shape[0]}
    return {}


def _check_sizes(pairing: Pairing, skeleton: Skeleton, described: str) -> None:
    """Everything has the shape that a client will expect: `skeleton` is of the merged model's configuration."""
    problems = [
        f"  {target.parameter}: would be {[*target.shape]}, and {[*expected]} is what goes with the rest"
        for target in pairing.targets
        if target.parameter is not None
        if (expected := skeleton.shapes.get(target.parameter, target.shape)) != target.shape
    ]
    if problems:
        raise ModelError(
            f"{described} do not fit: a part of the model alone would have other numbers of tokens or labels:\n"
            + "\n".join(problems)
        )


def _labels(pairing: Pairing, skeleton: Skeleton, task_type: str | None) -> dict[str, Any]:
    """How many labels the adapter's head tells apart, if not as many as the base's configuration says."""
    if task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return {}
    embeddings = (f"{skeleton.input_embedding}.weight", f"{skeleton.output_embedding}.weight")
    others = [
        target.shape[0]
        for target in pairing.changed
        if target.parameter not in embeddings and target.shape != skeleton.shapes.get(target.parameter or "")
    ]
    return {"num_labels": others[0]} if others else {}


def _kind_of(change: Change) -> str:
    if isinstance(change, LowRank) and change.magnitude is not None:
        return "DoRA on {}"
    return next(name for kind, name in _KINDS if isinstance(change, kind))


def _check_does_something(adapter: AdapterChanges, folder: Path) -> None:
    idle = [parameter for parameter, change in adapter.changes.items() if change.does_nothing(adapter.tensors)]
    if idle:
        raise MergeError(still_unchanged(idle, f"{folder}: A or B is zero, as before training"))


def still_unchanged(names: list[str], because: str) -> str:
    """The message for weights that a merge would leave as they are."""
    shown = "\n".join(f"  {name}" for name in names[:_NAMED])
    more = f"\n  … and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"{because}. These weights would not change by a bit, {len(names)} in all:\n{shown}{more}\n"
        "Is it the adapter that was meant, and was it trained? --allow-unchanged merges it all the same"
    )
