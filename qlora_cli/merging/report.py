"""`merge_report.json`: what was merged, onto what, and how near the result is to the model that was trained."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from qlora_cli.merging.folder.markdown import harmless
from qlora_cli.training.environment import versions

if TYPE_CHECKING:  # it brings along what reads rows and runs models
    from qlora_cli.merging.fidelity.measures import Fidelity, Reference

REPORT_FILE = "merge_report.json"


@dataclass(frozen=True, eq=False)
class Verification:
    """What the comparison found.

    Attributes:
        rows: what the models read, in words.
        held_out: whether those are rows that the run held out.
        reference: what the trained model says of them.
        merges: every merged model that was looked at, by what it was merged onto.
        quantized: each of them stored in 4 bits again, if that was asked for.
        refused: those of them that are not the trained model, and why.
        findings: of the others, how much of the adapter's effect they have, in a sentence.
        winner: the one that is kept.
        reason: why.
    """

    rows: str
    held_out: bool
    reference: Reference
    merges: dict[str, Fidelity]
    quantized: dict[str, Fidelity]
    refused: dict[str, str]
    findings: dict[str, str]
    winner: str
    reason: str


@dataclass(frozen=True, eq=False)
class MergeReport:
    """What is to be known of a merge afterwards.

    Attributes:
        adapter: its folder, the SHA-256 of its weights, its run and step.
        base: the base model's name and revision.
        stored: how the base was stored in training, and who says so.
        merged_onto: `original` or `dequantized`.
        dtype: of the weights written, None where each is as the base has it.
        changes: how many weights the adapter changes, by the kind of change.
        verification: None if there was none.
        quantized: the 4-bit form of what was written, None for plain weights.
        remarks: whole sentences on what was carried over, and on what was taken.
    """

    adapter: dict[str, Any]
    base: dict[str, Any]
    stored: str
    merged_onto: str
    dtype: str | None
    changes: str
    verification: Verification | None
    quantized: str | None = None
    remarks: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain data, with no folder of this machine, with the day and the versions."""
        return {
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "adapter": self.adapter,
            "base": self.base,
            "base_in_training": self.stored,
            "merged_onto": self.merged_onto,
            "dtype": self.dtype,
            "changes": self.changes,
            "quantized": self.quantized,
            "verification": None if self.verification is None else _verification(self.verification),
            "remarks": [harmless(remark) for remark in self.remarks],
            "versions": versions(),
        }


def _verification(found: Verification) -> dict[str, Any]:
    reference = found.reference
    return {
        "rows": harmless(found.rows),
        "held_out": found.held_out,
        "trained_loss": reference.trained_loss,
        "base_loss": reference.base_loss,
        "mean_kl_of_base": reference.effect,
        "max_kl_of_base": reference.max_effect,
        "mean_kl_of_rounding": reference.noise,
        "merges": {name: fidelity.record() for name, fidelity in found.merges.items()},
        "quantized": {name: fidelity.record() for name, fidelity in found.quantized.items()},
        "findings": found.findings,
        "refused": found.refused,
        "chosen": found.winner,
        "reason": found.reason,
    }
