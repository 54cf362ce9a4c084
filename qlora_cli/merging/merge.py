"""A whole merge: from an adapter to a model folder that is the trained model, or to an error and no folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from qlora_cli.disk import telling_read_errors, write_json, write_text
from qlora_cli.errors import MergeError
from qlora_cli.merging.adapters.source import adapter_sha256
from qlora_cli.merging.card import card_of
from qlora_cli.merging.events import Emit, Listener, Merged, Planned, Writing, Written
from qlora_cli.merging.folder.model_card import CARD_FILE, describe_base, render_card
from qlora_cli.merging.folder.surroundings import carry_over
from qlora_cli.merging.output_folder import check_output, check_space, writing
from qlora_cli.merging.plan import MergePlan, make_plan, still_unchanged
from qlora_cli.merging.report import REPORT_FILE, MergeReport, Verification
from qlora_cli.merging.requantize import carry_beside, plan_rounding, write_rounded
from qlora_cli.merging.request import MergeBase, MergeRequest
from qlora_cli.merging.sums import Sums
from qlora_cli.merging.tensors.files import TensorReader
from qlora_cli.merging.tensors.sizes import parse_size
from qlora_cli.merging.tensors.threads import one_thread
from qlora_cli.merging.tensors.writer import Output, output_bytes, write_model
from qlora_cli.model.base import choose_device
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.data_files import shown_path
from qlora_cli.recipe.schema import QuantizationSection
from qlora_cli.training.events import Notice, Stage

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def merge(request: MergeRequest, *, listeners: Sequence[Listener] = ()) -> Merged:
    """Fold an adapter into its base's weights, and show that the result is the model that was trained.

    Whatever goes wrong, and whenever the process is killed: at the output's place there is the whole merged model or
    nothing.

    Raises:
        RequestError: if it cannot be done as asked; nothing was written.
        MergeError: if it was done, and the result is not the trained model.
        RunError: if the disk refuses.
    """
    began = time.monotonic()
    emit = Emit(listeners)
    shard_bytes = parse_size(request.max_shard_size, "--max-shard-size")
    request = replace(request, output=check_output(request.output))
    device = choose_device(request.device, "--device")
    emit(Stage("reading the adapter and the headers of the base's files"))
    with telling_read_errors():
        plan = make_plan(request)
    job = _Job(request, plan, device, shard_bytes, emit)
    for remark in plan.source.remarks:
        emit(Notice(remark))
    job.check_space()
    emit(
        Planned(
            adapter=plan.describe_adapter(),
            changes=plan.describe_changes(),
            base=shown_path(Path(plan.source.base.name)),
            stored=plan.describe_base(),
            onto=plan.onto,
        )
    )
    with writing(request.output) as staging:
        report = job.run(staging)
    files = [file for file in request.output.rglob("*") if file.is_file()]
    merged = Merged(
        output=request.output,
        files=len(files),
        bytes=sum(file.stat().st_size for file in files),
        seconds=time.monotonic() - began,
        report=report,
    )
    emit(merged)
    return merged


@dataclass
class _Job:
    """One merge under way."""

    request: MergeRequest
    plan: MergePlan
    device: torch.device
    shard_bytes: int
    emit: Emit

    def check_space(self) -> None:
        """Refuse what the disk cannot hold: every merged model stands there until the best is known."""
        needed = 0
        with TensorReader() as reader:
            for onto in self.plan.onto:
                outputs = self._outputs(self._sums(onto, reader))
                size = output_bytes(outputs, max_shard_bytes=self.shard_bytes)
                # In 4 bits, and once more on the way there, it is less than in 16.
                needed += size if self.request.quantize is None else 2 * size
        half = "; one --base in place of auto needs about half" if len(self.plan.onto) > 1 else ""
        check_space(self.request.output, needed, saving=half)

    def run(self, staging: Path) -> MergeReport:
        """Write into `staging` what the output shall hold."""
        merges = {str(onto): staging / f".{onto}" for onto in self.plan.onto}
        for onto in self.plan.onto:
            self._write(onto, merges[onto])
        remarks = [*self.plan.source.remarks, *self._carry_over(merges.values(), staging / ".beside")]
        quantized: dict[str, Path] = {}
        if (quant_type := self.request.quantize) is not None:
            quantized = {onto: staging / f".{onto}-{quant_type}" for onto in merges}
            for name, folder in quantized.items():
                self._quantize(name, merges[name], folder, quant_type)
        verification = self._verify(merges, quantized) if self.request.verify else None
        chosen = self.plan.onto[-1] if verification is None else verification.winner
        _move_up((quantized or merges)[chosen], staging)
        for folder in (*merges.values(), *quantized.values()):
            shutil.rmtree(folder, ignore_errors=True)
        report = self._report(chosen, verification, remarks)
        write_json(staging / REPORT_FILE, report.as_json())
        write_text(staging / CARD_FILE, render_card(card_of(self.plan, report, self.request.output.name)))
        return report

    def _write(self, onto: MergeBase, folder: Path) -> None:
        """Write the weights of one merged model."""
        folder.mkdir()
        request = self.request
        with TensorReader() as reader:
            sums = self._sums(onto, reader)
            outputs = self._outputs(sums)
            self.emit(Writing(onto, output_bytes(outputs, max_shard_bytes=self.shard_bytes)))
            # What bitsandbytes rounds depends, in its last bit, on the number of threads: there it is that of training.
            with one_thread() if onto == "original" else nullcontext():
                write_model(
                    outputs,
                    folder,
                    max_shard_bytes=self.shard_bytes,
                    report=lambda count: self.emit(Written(count)),
                )
        if sums.unchanged and not request.allow_unchanged:
            dtype = f" in {request.dtype}" if request.dtype else ""
            raise MergeError(still_unchanged(sums.unchanged, f"what the adapter adds is lost in rounding{dtype}"))

    def _carry_over(self, folders: Collection[Path], beside: Path) -> tuple[str, ...]:
        """Put what lies beside the weights, the same for all, into every folder; returns what there is to say of it.

        Args:
            beside: where it is made, gone afterwards.
        """
        beside.mkdir()
        carried = carry_over(
            self.plan.folder,
            self.plan.source,
            beside,
            dtype=self.request.dtype,
            config_changes=self.plan.config_changes,
        )
        for folder in folders:
            shutil.copytree(beside, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        shutil.rmtree(beside)
        return carried.remarks

    def _verify(self, merges: Mapping[str, Path], quantized: Mapping[str, Path]) -> Verification:
        # Not before: what reads rows and runs models takes memory that a merge does without.
        from qlora_cli.merging.verification import Verifier

        limit, lenient = self.request.verify_rows, self.request.allow_unchanged
        tokenizer_folder = next(iter(merges.values()))
        verifier = Verifier(self.plan, tokenizer_folder, limit, self.device, self.emit, lenient=lenient)
        return verifier.verify(merges, quantized, self.request.quantize)

    def _quantize(self, onto: str, merged: Path, folder: Path, quant_type: Literal["nf4", "fp4"]) -> None:
        """Write a merged model once more, in 4 bits."""
        folder.mkdir()
        trusted = self.plan.source.base.trust_remote_code
        section = QuantizationSection(quant_type=quant_type)
        rounding = plan_rounding(ModelSource(str(merged), None, trusted), section, task_type=self.plan.task_type)
        self.emit(Writing(f"{onto} in 4 bits", rounding.total_bytes))
        write_rounded(
            rounding,
            folder,
            self.device,
            max_shard_bytes=self.shard_bytes,
            report=lambda count: self.emit(Written(count)),
        )
        carry_beside(rounding, merged, folder)

    def _form(self) -> str | None:
        """The 4-bit form that the merged model is to be stored in, in words."""
        quantize = self.request.quantize
        return None if quantize is None else f"{quantize.upper()} with double quantisation"

    def _sums(self, onto: MergeBase, reader: TensorReader) -> Sums:
        dtype = None if self.request.dtype is None else _DTYPES[self.request.dtype]
        quantization = self.plan.source.quantization
        return Sums(reader, self.plan.adapter.tensors, onto, quantization, dtype=dtype, device=self.device)

    def _outputs(self, sums: Sums) -> list[Output]:
        return [sums.output(target) for target in self.plan.pairing.targets]

    def _report(self, chosen: str, verification: Verification | None, remarks: Sequence[str]) -> MergeReport:
        plan = self.plan
        name, revision = describe_base(plan.source.base, plan.folder)
        return MergeReport(
            adapter={
                "name": (plan.source.folder if plan.source.run is None else plan.source.run.path).name,
                "sha256": adapter_sha256(plan.source.folder),
                "step": plan.source.step,
                "task_type": plan.task_type,
            },
            base={"name": name, "revision": revision},
            stored=plan.describe_base(),
            merged_onto=chosen,
            dtype=self.request.dtype,
            changes=plan.describe_changes(),
            verification=verification,
            quantized=self._form(),
            remarks=tuple(remarks),
        )


def _move_up(folder: Path, target: Path) -> None:
    for entry in folder.iterdir():
        entry.rename(target / entry.name)
    folder.rmdir()
