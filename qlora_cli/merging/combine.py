"""Adapters of one base added up into one: ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ, written as a PEFT adapter.

Exact: the ranks are set side by side, A one below the other and B beside each other, so that their product is the sum
of the products. Weights and scales go into B, rounded once to float32; alpha is the rank, so that the scale is 1.
"""

from __future__ import annotations

import filecmp
import hashlib
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_cli.disk import telling_read_errors
from qlora_cli.errors import MergeError
from qlora_cli.merging.adapters.names import PREFIX
from qlora_cli.merging.adapters.parts import EMBEDDING, LINEAR, Pair, Part, read_parts
from qlora_cli.merging.folder.adapter_card import CardPart, render_adapter_card
from qlora_cli.merging.folder.model_card import CARD_FILE
from qlora_cli.merging.folder.tokenizer_files import copy_tokenizer, tokenizer_files
from qlora_cli.merging.output_folder import check_output, writing
from qlora_cli.merging.tensors.files import StoredTensor, TensorReader, row_blocks
from qlora_cli.merging.tensors.writer import Output, write_model
from qlora_cli.model.adapter import lora_config, write_adapter_config
from qlora_cli.model.adapter_config import WEIGHTS_FILE
from qlora_cli.model.source import ModelSource


@dataclass(frozen=True)
class Combined:
    """What was written.

    Attributes:
        base: the model that the adapters were trained over, as the first of them names it.
        rank: the largest of any layer.
        modules: layers that are adapted.
        parameters: values of all A and B together.
        remarks: whole sentences for the screen.
    """

    folder: Path
    base: ModelSource
    rank: int
    modules: int
    parameters: int
    remarks: tuple[str, ...]


def combine(
    adapters: Sequence[Path],
    weights: Sequence[float],
    output: Path,
    *,
    base_model: str | None = None,
    revision: str | None = None,
) -> Combined:
    """Write the sum of the adapters, each times its weight, as one adapter into the folder `output`.

    They may have other ranks, other layers and other scales. The tokenizer is that of the first one that has one.

    Args:
        adapters: run folders, checkpoints of runs or PEFT's folders.
        weights: one for each; may be negative.
        output: not there, or empty; written beside and renamed when it is whole.
        base_model: the base that they share, where they have several names for it or none; it is written as theirs.
        revision: of `base_model`.

    Raises:
        RequestError: if the weights do not go with the adapters.
        ModelError: listing everything that keeps the adapters from being added up.
        OutputError: if the output folder is in the way.
        MergeError: if a weight makes values too large for float32.
        RunError: if it cannot be written.
    """
    output = check_output(output)
    with telling_read_errors():
        parts = read_parts(adapters, weights, base_model)
    told = parts[0].config
    base = ModelSource(base_model or told["base_model_name_or_path"], revision if base_model else told.get("revision"))
    ranks: Counter[str] = Counter()
    for part in parts:
        ranks.update({path: pair.rank for path, pair in part.pairs.items()})
    remarks = [remark for part in parts for remark in part.remarks]
    with writing(output) as staging, TensorReader() as reader:
        outputs = _outputs(parts, reader)
        [file] = write_model(outputs, staging, max_shard_bytes=sys.maxsize, report=lambda _: None)
        file.rename(staging / WEIGHTS_FILE)
        config = _config(parts, base, ranks)
        write_adapter_config(config, staging)
        remarks += [*_carry_tokenizer(parts, staging), *_saved(parts)]
        on_card = [_on_card(part) for part in parts]
        card = render_adapter_card(output.name, base, config["task_type"], on_card, remarks)
        (staging / CARD_FILE).write_text(card, encoding="utf-8")
    parameters = sum(math.prod(output.shape) for output in outputs if not isinstance(output.source, StoredTensor))
    return Combined(output, base, max(ranks.values()), len(ranks), parameters, tuple(remarks))


def _outputs(parts: Sequence[Part], reader: TensorReader) -> list[Output]:
    """A and B of every layer that any adapter has, float32, and what the adapters hold of their base."""
    together: dict[str, list[tuple[Part, Pair]]] = {}
    saved: dict[str, StoredTensor] = {}
    for part in parts:
        for path, pair in part.pairs.items():
            together.setdefault(path, []).append((part, pair))
        saved.update(part.saved)
    outputs = [Output(name, tensor.dtype, tensor.shape, tensor) for name, tensor in saved.items()]
    for path, terms in together.items():
        first = terms[0][1]
        rank = sum(pair.rank for _, pair in terms)
        names = EMBEDDING if first.is_embedding else LINEAR
        shape_a = (rank, *first.a.shape[1:])
        shape_b = (first.b.shape[0], rank, *first.b.shape[2:])
        outputs += [
            Output(PREFIX + path + names[0], torch.float32, shape_a, partial(_below, terms, reader)),
            Output(PREFIX + path + names[1], torch.float32, shape_b, partial(_beside, terms, shape_b, reader)),
        ]
    return outputs


def _below(terms: Sequence[tuple[Part, Pair]], reader: TensorReader) -> Iterator[Tensor]:
    """[Σ rank, in]: every A as it is, one below the other."""
    for _, pair in terms:
        for start, stop in row_blocks(pair.a.shape):
            yield reader.rows(pair.a, start, stop).float()


def _beside(terms: Sequence[tuple[Part, Pair]], shape: tuple[int, ...], reader: TensorReader) -> Iterator[Tensor]:
    """[out, Σ rank]: every B times its weight and its scale, beside each other."""
    for start, stop in row_blocks(shape, itemsize=8):
        rows = [
            reader.rows(pair.b, start, stop).double().mul_(part.weight * pair.scale).float() for part, pair in terms
        ]
        for (part, pair), scaled in zip(terms, rows, strict=True):
            if not scaled.isfinite().all():
                raise MergeError(
                    f"{part.weights_file}: {pair.b.name}: times its scale {pair.scale:g} and the weight "
                    f"{part.weight:g} it is too large for float32"
                )
        yield torch.cat(rows, dim=1)


def _config(parts: Sequence[Part], base: ModelSource, ranks: Mapping[str, int]) -> dict[str, Any]:
    """`adapter_config.json`; alpha is the rank everywhere, also for readers that know no patterns."""
    rank = max(ranks.values())
    pattern = _pattern(ranks, rank)
    configs = [part.config for part in parts]
    mappings = [config["auto_mapping"] for config in configs if config.get("auto_mapping")]
    return lora_config(
        base,
        task_type=next((config["task_type"] for config in configs if config.get("task_type")), None),
        rank=rank,
        alpha=rank,
        dropout=0.0,
        target_modules=_targets(parts),
        fan_in_fan_out=any(config.get("fan_in_fan_out") for config in configs),
        rank_pattern=pattern,
        alpha_pattern=pattern,
    ) | ({"auto_mapping": mappings[0]} if mappings else {})


def _pattern(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """Ranks other than the default, by the last part of the path where all layers of that name have one rank.

    A key is an expression for the end of a path, and the first in the file that fits counts: none may fit two ranks.
    """
    of_name: dict[str, set[int]] = {}
    for path, rank in ranks.items():
        of_name.setdefault(_last(path), set()).add(rank)
    pattern = {}
    for path, rank in ranks.items():
        if len(of_name[_last(path)]) > 1:
            is_end_of_another = any(other.endswith(f".{path}") for other in ranks)
            pattern[f"^{path}" if is_end_of_another else path] = rank
        elif rank != default:
            pattern[_last(path)] = rank
    return pattern


def _targets(parts: Sequence[Part]) -> list[str]:
    """What selects the layers of all adapters: their own lists of names, if that is all by which they chose."""
    names: set[str] = set()
    for part in parts:
        listed = part.config.get("target_modules")
        narrowed = any(part.config.get(name) not in (None, []) for name in ("exclude_modules", "layers_to_transform"))
        if narrowed or not isinstance(listed, list) or not all(_is_among(path, listed) for path in part.pairs):
            return sorted({path for part in parts for path in part.pairs})
        names.update(listed)
    return sorted(names)


def _is_among(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _carry_tokenizer(parts: Sequence[Part], staging: Path) -> Iterator[str]:
    """Copy the first tokenizer that there is; says what others have that is not the same."""
    found = [
        (part, files)
        for part in parts
        if (files := {file.relative_to(part.folder): file for file in tokenizer_files(part.folder)})
    ]
    if not found:
        return
    chosen, copied = found[0]
    copy_tokenizer(chosen.folder, staging)
    for part, files in found[1:]:
        same = [name for name in files.keys() & copied.keys() if filecmp.cmp(files[name], copied[name], shallow=False)]
        if differing := sorted(str(name) for name in (files.keys() | copied.keys()) - set(same)):
            yield f"the tokenizer is that of {chosen.name}; {part.name} has another ({', '.join(differing)})"


def _saved(parts: Sequence[Part]) -> list[str]:
    names = sorted({name.removeprefix(PREFIX) for part in parts for name in part.saved})
    return [f"{name}: the base's own weight, saved with an adapter, is carried over as it is" for name in names]


def _on_card(part: Part) -> CardPart:
    with (part.folder / WEIGHTS_FILE).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    ranks = sorted({pair.rank for pair in part.pairs.values()})
    return CardPart(part.name, part.weight, ranks, len(part.pairs), sha256)
