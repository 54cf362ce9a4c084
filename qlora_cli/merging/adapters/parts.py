"""Adapters that are to be added up: read, set against each other, and refused where their sum is not plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_cli.errors import ModelError, RequestError
from qlora_cli.merging.adapters.locating import locate
from qlora_cli.merging.adapters.names import PREFIX
from qlora_cli.merging.tensors.files import StoredTensor, TensorReader, read_tensor_file, row_blocks
from qlora_cli.model.adapter_config import CONFIG_FILE, WEIGHTS_FILE, rank_of, read_adapter_config, scale_of
from qlora_cli.recipe.data_files import shown_path

# What a module's two tensors are called: those of a linear layer, and those of an embedding.
LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_FROZEN = ".base_layer.weight"

# Settings that make of an adapter more than a product added to a weight, and what keeps that from being added up.
_MORE_THAN_A_SUM = {
    "use_dora": "DoRA rescales the base's weights, and that does not add up",
    "modules_to_save": "modules saved whole stand in the base's place, and cannot be added to each other",
    "bias": "trained biases stand in the base's place, and cannot be added to each other",
    "lora_bias": "the adapter written has no biases of its own",
    "trainable_token_indices": "tokens trained whole stand in the base's place, and cannot be added to each other",
}
_UNSET: tuple[object, ...] = (None, False, "none", [], {})


@dataclass(frozen=True)
class Pair:
    """What one adapter does to one module: scale × B A.

    Attributes:
        a: [rank, in, ...]; of an embedding [rank, vocabulary].
        b: [out, rank, ...]; of an embedding [width, rank].
        scale: alpha / rank, or alpha / √rank.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def is_embedding(self) -> bool:
        return self.a.name.endswith(EMBEDDING[0])

    @property
    def fits(self) -> tuple[bool, tuple[int, ...], tuple[int, ...]]:
        """What must be the same in all pairs for one module: its kind and the dimensions of its weight."""
        return self.is_embedding, self.a.shape[1:], self.b.shape[:1] + self.b.shape[2:]

    def described(self) -> str:
        """The module that it is for."""
        size, width = self.a.shape[1], self.b.shape[0]
        if self.is_embedding:
            return f"an embedding of {size} tokens, {width} wide"
        return f"a layer of {size} inputs and {width} outputs"


@dataclass(frozen=True)
class Part:
    """One adapter of a sum, and the weight that it has in it.

    Attributes:
        folder: holds the adapter's two files.
        pairs: by the path of the module.
        saved: tensors of the base that lie in the adapter's file, by name: PEFT puts embeddings there that are adapted
            or have grown.
        remarks: on which adapter was taken, whole sentences.
    """

    folder: Path
    weight: float
    config: dict[str, Any]
    pairs: dict[str, Pair]
    saved: dict[str, StoredTensor]
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is called where no path may be; a run's adapter lies in a folder that is named as all of them are."""
        return self.folder.parent.name if self.folder.name == "adapter" else self.folder.name

    @property
    def config_file(self) -> str:
        """As messages name it."""
        return shown_path(self.folder / CONFIG_FILE)

    @property
    def weights_file(self) -> str:
        """As messages name it."""
        return shown_path(self.folder / WEIGHTS_FILE)


def read_parts(paths: Sequence[Path], weights: Sequence[float], base_model: str | None = None) -> list[Part]:
    """The adapters at `paths`, which can be added up with these weights.

    Args:
        paths: of run folders, checkpoints of runs or PEFT's folders.
        weights: one for each; may be negative.
        base_model: the base that they share, whatever name each of them has for it.

    Raises:
        RequestError: if there are no adapters, or not as many weights, or a weight that is no number or 0.
        ModelError: listing everything that keeps the adapters from being read or added up.
    """
    _check_weights(paths, weights)
    parts = []
    problems = []
    for path, weight in zip(paths, weights, strict=True):
        try:
            parts.append(_read_part(path, weight))
        except ModelError as error:
            problems.append(str(error))
    problems += _differences(parts, base_model)
    if problems:
        raise ModelError("the adapters cannot be combined:\n" + "\n".join(problems))
    return parts


def _check_weights(paths: Sequence[Path], weights: Sequence[float]) -> None:
    if not paths:
        raise RequestError("--into-adapter: expected an adapter, got none")
    if len(paths) != len(weights):
        raise RequestError(
            f"--weights: expected a number for each --into-adapter, in their order: {len(paths)} of them, got "
            f"{len(weights)}"
        )
    for path, weight in zip(paths, weights, strict=True):
        if not math.isfinite(weight):
            raise RequestError(f"--weights: expected a number such as 0.5 for {path}, got {weight}")
        if weight == 0:
            raise RequestError(f"--weights: got 0 for {path}: leave that adapter out, for it adds nothing")


def _read_part(path: Path, weight: float) -> Part:
    """One adapter, without fault in itself; ModelError lists what is wrong with it."""
    located = locate(path)
    config = read_adapter_config(located.folder, supported=_MORE_THAN_A_SUM)
    pairs, saved, faults = _sort_out(read_tensor_file(located.folder / WEIGHTS_FILE), config)
    part = Part(located.folder, weight, config, pairs, saved, located.remarks)
    problems = [
        f"{part.config_file}: {name}: {reason}"
        for name, reason in _MORE_THAN_A_SUM.items()
        if config.get(name) not in _UNSET
    ]
    if not problems:  # or most of these would say the same in other words
        problems = [f"{part.weights_file}: {fault}" for fault in (*faults, *_not_finite(pairs))]
    if problems:
        raise ModelError("\n".join(problems))
    return part


def _sort_out(
    tensors: dict[str, StoredTensor], config: dict[str, Any]
) -> tuple[dict[str, Pair], dict[str, StoredTensor], list[str]]:
    """Pairs by module, tensors of the base by name, and what is wrong with the rest."""
    pairs: dict[str, Pair] = {}
    saved: dict[str, StoredTensor] = {}
    problems = []
    for name, tensor in tensors.items():
        ending = next((ending for ending in (*LINEAR, *EMBEDDING) if name.endswith(ending)), None)
        if not name.startswith(PREFIX) or (ending is None and ".lora_" in name):
            problems.append(f"{name}: unknown tensor; expected {PREFIX}<module>{LINEAR[0]} or {LINEAR[1]}")
        elif ending is None:
            saved[name] = tensor
        else:
            kind = LINEAR if ending in LINEAR else EMBEDDING
            partner = name.removesuffix(ending) + kind[1 - kind.index(ending)]
            if partner not in tensors:
                problems.append(f"{name}: without {partner}")
            elif ending == kind[0]:
                path = name[len(PREFIX) : -len(ending)]
                pairs[path] = Pair(tensor, tensors[partner], scale_of(config, path))
                problems += _misfit(pairs[path], config, path)
    return pairs, saved, problems or ([] if pairs else ["it has no LoRA weights"])


def _misfit(pair: Pair, config: dict[str, Any], path: str) -> list[str]:
    """Whether A, B and the config mean one rank."""
    a, b, rank = pair.a.shape, pair.b.shape, rank_of(config, path)
    if len(a) < 2 or len(b) < 2 or a[0] != rank or b[1] != rank:
        return [f"{path}: expected A [{rank}, in] and B [out, {rank}], got {list(a)} and {list(b)}"]
    return []


def _not_finite(pairs: dict[str, Pair]) -> list[str]:
    with TensorReader() as reader:
        return [
            f"{tensor.name}: has values that are NaN or infinite"
            for pair in pairs.values()
            for tensor in (pair.a, pair.b)
            if not all(torch.isfinite(reader.rows(tensor, *block)).all() for block in row_blocks(tensor.shape))
        ]


def _differences(parts: Sequence[Part], base_model: str | None) -> list[str]:
    """What keeps adapters that are sound from being added to each other."""
    problems: list[str] = []
    for part in parts:
        if base_model is None:
            problems += _other_base(parts[0], part)
        problems += _other_task(parts[0], part)
    problems += _other_shapes(parts)
    problems += _other_saved(parts)
    return problems


def _other_base(first: Part, part: Part) -> Iterator[str]:
    expected, got = (each.config.get("base_model_name_or_path") for each in (first, part))
    file, other = part.config_file, shown_path(first.folder)
    if not got:
        yield f"{file}: does not say which base it was trained over; if you know, --base-model says it for all"
    elif expected and not _same_path(expected, got):
        yield (
            f"{file}: was trained over {got}, and {other} over {expected}; only changes to one base can be "
            "added up. If these are one model under two names, --base-model NAME says so"
        )
    elif (expected_revision := first.config.get("revision") or "main") != (part.config.get("revision") or "main"):
        yield f"{file}: was trained over revision {part.config.get('revision') or 'main'} of {got}, and " + (
            f"{other} over {expected_revision}; only changes to one base can be added up"
        )


def _same_path(one: str, other: str) -> bool:
    if one == other:
        return True
    paths = Path(one), Path(other)
    return all(path.is_absolute() for path in paths) and paths[0].resolve() == paths[1].resolve()


def _other_task(first: Part, part: Part) -> Iterator[str]:
    """Models of two tasks have other heads, and other names for what is below them."""
    expected, got = (each.config.get("task_type") for each in (first, part))
    if expected and got and expected != got:
        yield f"{part.config_file}: task_type: expected {expected} as in {shown_path(first.folder)}, got {got}"


def _other_shapes(parts: Sequence[Part]) -> Iterator[str]:
    seen: dict[str, tuple[Part, Pair]] = {}
    for part in parts:
        for path, pair in part.pairs.items():
            first, there = seen.setdefault(path, (part, pair))
            if pair.fits != there.fits:
                yield (
                    f"{part.weights_file}: {path}: is for {pair.described()}, and in {shown_path(first.folder)} for "
                    f"{there.described()}"
                )


def _other_saved(parts: Sequence[Part]) -> Iterator[str]:
    """Tensors of the base that lie in adapters are carried over as they are: two that differ would be two bases."""
    reason = "weights saved whole cannot be added to each other"
    seen: dict[str, tuple[Part, StoredTensor]] = {}
    with TensorReader() as reader:
        for part in parts:
            for name, tensor in part.saved.items():
                first, there = seen.setdefault(name, (part, tensor))
                if there is not tensor and not _equal(reader, there, tensor):
                    other = shown_path(first.folder)
                    yield f"{part.weights_file}: {name}: is saved whole, and differs from that in {other}: {reason}"
    for name, (first, _) in seen.items():
        for part in parts:
            # What is beneath a LoRA layer is frozen, and so the base's own; anything else may have been trained.
            if name not in part.saved and not name.endswith(_FROZEN):
                other = shown_path(part.folder)
                yield f"{first.weights_file}: {name}: is saved whole, and {other} has none: {reason}"


def _equal(reader: TensorReader, one: StoredTensor, other: StoredTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    blocks = row_blocks(one.shape, one.dtype.itemsize)
    return all(torch.equal(reader.rows(one, *block), reader.rows(other, *block)) for block in blocks)
