"""A merged model written in 4 bits, as transformers and bitsandbytes store one, and read by blocks of rows.

A safetensors file has its widest types first, so that the parts of one weight lie apart in it; and how long the text
that describes a weight is, is known only when the weight is rounded. So what is rounded goes into a file of its own
first, and is copied from there to its places.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from qlora_cli.disk import json_text
from qlora_cli.errors import ModelError
from qlora_cli.merging.base.rounding import round_weight, state_shapes
from qlora_cli.merging.base.skeleton import Skeleton, build_skeleton
from qlora_cli.merging.folder.model_card import CARD_FILE
from qlora_cli.merging.report import REPORT_FILE
from qlora_cli.merging.tensors.files import StoredTensor, TensorReader, read_model_tensors, row_blocks
from qlora_cli.merging.tensors.header import tensor_bytes
from qlora_cli.merging.tensors.writer import Output, write_model
from qlora_cli.model.files import CONFIG_FILE, INDEX_FILE, read_json_object
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection

# Of a model's folder, what does not hold for the same model with other weights.
_ABOUT_THE_WEIGHTS = (INDEX_FILE, CARD_FILE, REPORT_FILE)
_SPOOL = ".rounded"
# The text that describes a weight, where its length is not known yet.
_TEXT_BYTES = 256


@dataclass(frozen=True)
class RoundingPlan:
    """Which tensors of a model are to be in 4 bits.

    Attributes:
        tensors: all that are stored, in the order of the files.
        transposed: for the name of each that is to be rounded, whether it is stored as [in, out].
        quantization: the form that is wanted; its `compute_dtype` has no part in it.
        dtype: of the weights, in which a client computes.
    """

    tensors: Mapping[str, StoredTensor]
    transposed: Mapping[str, bool]
    quantization: QuantizationSection
    dtype: torch.dtype

    @property
    def total_bytes(self) -> int:
        """What `write_rounded` reports together, but for headers and index: the bytes rounded, and those written."""
        return sum(self.tensors[name].nbytes for name in self.transposed) + self._written_bytes()

    @property
    def disk_bytes(self) -> int:
        """What `write_rounded` needs on the disk at most, but for headers and index."""
        return self._written_bytes() + sum(self._rounded_bytes(name) for name in self.transposed)

    def _written_bytes(self) -> int:
        return sum(
            self._rounded_bytes(name) if name in self.transposed else tensor.nbytes
            for name, tensor in self.tensors.items()
        )

    def _rounded_bytes(self, name: str) -> int:
        tensor = self.tensors[name]
        shapes = state_shapes(tensor.shape, self.quantization, dtype=tensor.dtype, transposed=self.transposed[name])
        return _TEXT_BYTES + sum(tensor_bytes(dtype, shape) for dtype, shape in shapes.values())


def plan_rounding(
    model: ModelSource, quantization: QuantizationSection, *, task_type: str | None = None
) -> RoundingPlan:
    """Which tensors of the model in the folder `model.name` transformers would hold in 4 bits.

    Args:
        quantization: of 4 bits.
        task_type: PEFT's; None is what the model's configuration says.

    Raises:
        ModelError: if the model cannot be read or is stored quantised; listing the weights that should be in 4 bits and
            are absent, of another shape, or stored in pieces.
    """
    tensors = read_model_tensors(Path(model.name))
    skeleton = build_skeleton(model, task_type, quantization)
    wanted = {f"{path}.weight": skeleton.kinds[path] == "conv1d" for path in skeleton.quantized}
    stored = {renamed: name for name, renamed in skeleton.stored_names(tensors).items() if renamed in wanted}
    if problems := _problems(tensors, stored, wanted, skeleton):
        raise ModelError(f"{model.name}: cannot be written in 4 bits:\n" + "\n".join(problems))
    if not wanted:
        raise ModelError(f"{model.name}: {skeleton.architecture} has no layer that bitsandbytes would hold in 4 bits")
    transposed = {name: wanted[renamed] for renamed, name in stored.items()}
    most = max(transposed, key=lambda name: tensors[name].nbytes)
    return RoundingPlan(tensors, transposed, quantization, tensors[most].dtype)


def _problems(
    tensors: Mapping[str, StoredTensor], stored: Mapping[str, str], wanted: Mapping[str, bool], skeleton: Skeleton
) -> list[str]:
    pieces = {
        target: name for name, targets in skeleton.combined(tensors).items() for target in targets if target in wanted
    }
    problems = []
    for weight in sorted(wanted):
        name = stored.get(weight)
        if name is None:
            where = f"it is made of {pieces[weight]} and others on loading" if weight in pieces else "it is not there"
            problems.append(f"  {weight}: should be rounded, but {where}")
            continue
        tensor = tensors[name]
        if tensor.shape != skeleton.shapes[weight]:
            problems.append(f"  {name}: expected {list(skeleton.shapes[weight])}, got {list(tensor.shape)}")
        elif not tensor.dtype.is_floating_point:
            problems.append(f"  {name}: expected floating-point values, got {tensor.dtype}")
    return problems


def write_rounded(
    plan: RoundingPlan, folder: Path, device: torch.device, *, max_shard_bytes: int, report: Callable[[int], None]
) -> list[Path]:
    """Write the weights in 4 bits, and what else the model has as it is; returns the files.

    They are those that transformers writes for the same model loaded in 4 bits, tensor by tensor.

    Args:
        folder: is there, and has no weights; what is rounded waits in it for its place, and is deleted in the end.
        device: on which bitsandbytes rounds.
        report: told how many bytes more were rounded or written; together `plan.total_bytes`, but for some kilobytes.

    Raises:
        ModelError: if a tensor cannot be read.
        OSError: if the files cannot be written.
    """
    spool = folder / _SPOOL
    outputs: list[Output] = []
    try:
        with TensorReader() as reader, spool.open("xb", buffering=0) as file:
            for name, tensor in plan.tensors.items():
                if name not in plan.transposed:
                    outputs.append(Output(name, tensor.dtype, tensor.shape, tensor))
                    continue
                rounded = round_weight(
                    _blocks(reader, tensor, report),
                    tensor.shape,
                    plan.quantization,
                    device,
                    dtype=tensor.dtype,
                    transposed=plan.transposed[name],
                )
                module = name.removesuffix("weight")
                for suffix, part in rounded.state_tensors().items():
                    stored = _append(file, spool, module + suffix, part)
                    outputs.append(Output(stored.name, stored.dtype, stored.shape, stored))
        return write_model(outputs, folder, max_shard_bytes=max_shard_bytes, report=report)
    finally:
        spool.unlink(missing_ok=True)


def quantization_config(plan: RoundingPlan) -> dict[str, Any]:
    """`quantization_config` of the model's config.json, as transformers writes it."""
    config: dict[str, Any] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=plan.quantization.quant_type,
        bnb_4bit_use_double_quant=plan.quantization.double_quant,
        bnb_4bit_compute_dtype=plan.dtype,
    ).to_dict()
    return config


def carry_beside(plan: RoundingPlan, model: Path, folder: Path) -> None:
    """Copy what the model's folder holds beside its weights, its README and its report; config.json tells of 4 bits.

    Raises:
        ModelError: if config.json is no JSON object. OSError passes through.
    """
    for file in sorted(model.iterdir()):
        if file.is_dir():
            shutil.copytree(file, folder / file.name, copy_function=shutil.copyfile)
        elif file.suffix != ".safetensors" and file.name not in _ABOUT_THE_WEIGHTS:
            shutil.copyfile(file, folder / file.name)
    config = read_json_object(model / CONFIG_FILE) | {"quantization_config": quantization_config(plan)}
    (folder / CONFIG_FILE).write_text(json_text(config), encoding="utf-8")


def _blocks(reader: TensorReader, tensor: StoredTensor, report: Callable[[int], None]) -> Iterator[Tensor]:
    for start, stop in row_blocks(tensor.shape):
        block = reader.rows(tensor, start, stop)
        yield block
        report(block.numel() * block.element_size())


def _append(file: BinaryIO, path: Path, name: str, tensor: Tensor) -> StoredTensor:
    """Put a tensor's bytes at the end of the file."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    start, nbytes = file.tell(), len(data)
    while len(data):
        data = data[file.write(data) :]
    return StoredTensor(name, tensor.dtype, tuple(tensor.shape), path, start, nbytes)
