"""Setting merged models against the trained one: load each as a client would, compare, judge, choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from qlora_cli.errors import MergeError, ModelError
from qlora_cli.merging.events import Compared, Comparing, Emit, Measured
from qlora_cli.merging.fidelity.client import load_client, release_memory
from qlora_cli.merging.fidelity.held_out import CheckRows, check_rows
from qlora_cli.merging.fidelity.measures import Fidelity, Reference, compare, record
from qlora_cli.merging.fidelity.trained import adapter_off, with_adapter
from qlora_cli.merging.fidelity.verdict import check_effect, choose, judge, judge_quantized, needs_plain_base
from qlora_cli.merging.plan import MergePlan
from qlora_cli.merging.report import Verification
from qlora_cli.model.source import ModelSource, load_config, load_tokenizer
from qlora_cli.training.events import Notice, Stage


class Verifier:
    """Knows what the trained model says of some rows, and how near others are to that.

    Args:
        folder: a merged model's; its tokenizer reads the rows.
        limit: the most rows to look at.
        lenient: whether a merge that cannot be told from its base is told of and not refused.

    Raises:
        MergeError: if the adapter has no effect, unless `lenient`.
        ModelError: if there is no tokenizer.
    """

    def __init__(
        self, plan: MergePlan, folder: Path, limit: int, device: torch.device, emit: Emit, *, lenient: bool
    ) -> None:
        self._plan = plan
        self._device = device
        self._emit = emit
        self._lenient = lenient
        emit(Stage("reading the rows to compare on"))
        self.rows = _rows(plan, folder, limit)
        emit(Comparing("trained", len(self.rows.rows)))
        model = with_adapter(plan.source, plan.skeleton, plan.adapter, device)
        self.reference: Reference = record(model, self.rows.rows, advanced=self._advanced)
        del model
        release_memory(device)  # before the next one is loaded
        if not lenient:
            check_effect(self.reference)

    def measure(self, name: str, folder: Path) -> Fidelity:
        """Load the model in `folder` as a client would, and set it against the trained one."""
        fidelity = self._against(name, folder)
        self._emit(Measured(name, fidelity))
        return fidelity

    def verify(self, merges: Mapping[str, Path], quantized: Mapping[str, Path], quant_type: str | None) -> Verification:
        """Measure and judge merged models, by what they were merged onto, and choose the best.

        Args:
            quantized: the same in 4 bits of `quant_type`, one of which will be kept in place of those; or empty.

        Raises:
            MergeError: if none of them is the trained model.
        """
        measured, rounded = {}, {}
        refused: dict[str, str] = {}
        findings: dict[str, str] = {}
        for name, folder in merges.items():
            measured[name] = self.measure(name, folder)
            with _noting(refused, name):
                findings[name] = self._judge(name, measured[name])
        for name, folder in quantized.items():
            rounded[name] = self.measure(f"{name} in 4 bits", folder)
            with _noting(refused, name):
                findings[name] = judge_quantized(self.reference, rounded[name], quant_type or "")
        candidates = rounded or measured
        passed = {name: candidates[name] for name in merges if name not in refused}
        if not passed and not self._lenient:
            raise MergeError("\n".join(f"merged onto the {name} weights: {why}" for name, why in refused.items()))
        for name, why in refused.items():
            self._emit(Notice(f"merged onto the {name} weights: {why}"))
        choice = choose(passed or candidates, by_loss=self.rows.held_out)
        return Verification(
            rows=self.rows.origin,
            held_out=self.rows.held_out,
            reference=self.reference,
            merges=measured,
            quantized=rounded,
            refused=refused,
            findings=findings,
            winner=choice.winner,
            reason=choice.reason,
        )

    def _judge(self, name: str, merged: Fidelity) -> str:
        exact = name == "dequantized" or self._plan.trained_over_originals
        plain = None
        if needs_plain_base(self.reference, merged, exact=exact):
            plain = self._plain_base()
        return judge(self.reference, merged, plain, exact=exact)

    def _plain_base(self) -> Fidelity:
        """The original base without the adapter, set against the trained model."""
        name = "original without the adapter"
        if "architectures" not in self._plan.config_changes:
            with suppress(MergeError):  # other tokens or labels than the trained model has
                return self._against(name, self._plan.folder)
        # A base without the trained model's head gets one that says nothing, as the trained one's base has.
        plan = self._plan
        unquantised = plan.source.quantization.model_copy(update={"bits": 16})
        self._emit(Comparing(name, len(self.rows.rows)))
        model = with_adapter(replace(plan.source, quantization=unquantised), plan.skeleton, plan.adapter, self._device)
        with adapter_off(model):
            fidelity = compare(self.reference, model, self.rows.rows, advanced=self._advanced)
        del model
        release_memory(self._device)
        return fidelity

    def _against(self, name: str, folder: Path) -> Fidelity:
        self._emit(Comparing(name, len(self.rows.rows)))
        trusted = self._plan.source.base.trust_remote_code
        with load_client(folder, self._device, trust_remote_code=trusted, ignorable=self._plan.unchanged) as model:
            fidelity = compare(self.reference, model, self.rows.rows, advanced=self._advanced)
            del model
        release_memory(self._device)
        return fidelity

    def _advanced(self, rows: int) -> None:
        self._emit(Compared(rows))


@contextmanager
def _noting(refused: dict[str, str], name: str) -> Iterator[None]:
    """Note why something is not the trained model, the first reason for each; another one may be."""
    try:
        yield
    except MergeError as error:
        refused.setdefault(name, str(error))


def _rows(plan: MergePlan, folder: Path, limit: int) -> CheckRows:
    source = ModelSource(str(folder), None, plan.source.base.trust_remote_code)
    try:
        tokenizer = load_tokenizer(source)
    except ModelError as error:
        raise ModelError(
            f"the merged model cannot be set against the trained one without a tokenizer, and neither the adapter nor "
            f"the base has one that can be read: put one beside the adapter, or merge with --no-verify. {error}"
        ) from None
    return check_rows(plan.source, tokenizer, load_config(source), limit)
