"""What a merge has to tell its model card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_cli.merging.folder.model_card import CardFacts, FidelityRow, read_front_matter, recipe_for_card
from qlora_cli.merging.plan import MergePlan
from qlora_cli.merging.report import MergeReport
from qlora_cli.model.files import CONFIG_FILE, read_json_object
from qlora_cli.training.environment import versions

if TYPE_CHECKING:  # it brings along what reads rows and runs models
    from qlora_cli.merging.fidelity.measures import Fidelity


def card_of(plan: MergePlan, report: MergeReport, title: str) -> CardFacts:
    """The facts of a merge, for the README of the model called `title`."""
    found = report.verification
    rows = []
    if found is not None:
        names = sorted(found.merges, key=lambda name: name != found.winner)
        rows = [_row(f"{name}, in 4 bits again", found.quantized[name]) for name in names if name in found.quantized]
        rows += [_row(f"merged onto the {name} weights", found.merges[name]) for name in names]
    # One of several: why this one.
    chosen = [] if found is None or len(found.merges) == 1 else [f"merged onto both bases: {found.reason}"]
    recipe = plan.source.recipe
    config = read_json_object(plan.folder / CONFIG_FILE)
    return CardFacts(
        title=title,
        base=report.base["name"],
        base_revision=report.base["revision"],
        adapter_sha256=report.adapter["sha256"],
        adapter=_adapter(plan),
        trained_base=f"{report.stored} ({plan.source.told_by})",
        merged_into=report.merged_onto,
        dtype=report.dtype or str(config.get("dtype") or config.get("torch_dtype") or "as the base has each"),
        task_type=plan.task_type,
        quantized=report.quantized,
        held_out="" if found is None else found.rows,
        fidelity=rows,
        recipe=None if recipe is None else recipe_for_card(recipe),
        base_card=read_front_matter(plan.folder),
        versions=versions(),
        remarks=[*report.remarks, *chosen],
        custom_code=plan.source.base.trust_remote_code and bool(config.get("auto_map")),
    )


def _adapter(plan: MergePlan) -> str:
    config = plan.adapter.config
    step = "" if plan.source.step is None else f", step {plan.source.step}"
    # What is not written has PEFT's default.
    return f"rank {config.get('r', 8)}, alpha {config.get('lora_alpha', 8)}: {plan.describe_changes()}{step}"


def _row(name: str, fidelity: Fidelity) -> FidelityRow:
    return FidelityRow(
        name=name,
        mean_kl=fidelity.mean_kl,
        max_kl=fidelity.max_kl,
        top1_agreement=fidelity.top1_agreement,
        loss=fidelity.loss,
        loss_difference=fidelity.loss_difference,
        worst_layer=fidelity.worst_layer,
        worst_layer_error=fidelity.worst_layer_error,
    )
