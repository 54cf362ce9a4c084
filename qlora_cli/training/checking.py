"""Everything that can be known of a recipe's training without the weights: its data as the model would see it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from qlora_cli.data.encode import Report
from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.units import make_units
from qlora_cli.model.source import ModelSource, context_length, load_config, load_tokenizer
from qlora_cli.model.storage import check_stored_quantization
from qlora_cli.recipe.schema import ALL_LINEAR, Recipe
from qlora_cli.training.benchmark_plan import (
    BenchmarkPlan,
    check_answerable,
    count_documents,
    plan_benchmarks,
    times_scored,
)
from qlora_cli.training.checked_rows import Base, check_rows, split_facts
from qlora_cli.training.doubts import doubts
from qlora_cli.training.examples import first_examples
from qlora_cli.training.facts import BenchmarkFacts, Facts, Steps
from qlora_cli.training.findings import Findings
from qlora_cli.training.run_folder import RunFolder
from qlora_cli.training.schedule import endless_warmup, sequences_per_step, step_plan, total_steps


def check_data(recipe: Recipe, *, examples: int = 0, report: Report = lambda _: None) -> Facts:
    """Read the tokenizer and the rows, encode them, and say what training would make of them.

    No weights are read. Steps are counted for one process. `examples` is how many of the training rows to give back;
    fewer if there are fewer. `report` is told how far encoding has come.
    """
    found = Findings()
    _look_at_the_folder(recipe.output_dir, found)
    found.notices += _not_here(recipe)
    base = found.attempt_or_miss("tokens were not counted", _read_base, recipe)
    if base is not None:
        stored = getattr(base.config, "quantization_config", None)
        found.attempt(check_stored_quantization, stored, recipe.quantization)
        found.attempt(_check_targets, base.config, recipe)
    section = recipe.dataset
    train, validation = check_rows(section, base, found, seed=recipe.training.seed, report=report)
    facts = None if train is None else split_facts(train, section)
    steps = _steps(recipe, train.kept) if train is not None and len(train.kept) else None
    if train is not None and base is not None:
        found.notices += doubts(train, validation, section, base.tokenizer)
    if steps is not None and (doubt := endless_warmup(recipe.training, steps.total)):
        found.notices.append(doubt)
    scored_on = found.attempt_or_miss("the benchmarks were not looked at", plan_benchmarks, recipe.evaluation)
    if scored_on is not None:
        found.notices += scored_on.loaded.remarks
    if scored_on is not None and base is not None:
        found.attempt(check_answerable, scored_on, base.tokenizer, base.config, num_processes=1)
    held_out = section.validation is not None or section.validation_fraction is not None
    known = train is not None and (validation is not None or not held_out)
    return Facts(
        checked="recipe and data" if known else "recipe",
        context_length=None if base is None else context_length(base.config),
        train=facts,
        validation=None if validation is None else split_facts(validation, section),
        steps=steps,
        notices=tuple(dict.fromkeys(found.notices)),
        problems=tuple(dict.fromkeys(found.problems)),
        examples=() if train is None or base is None else first_examples(train.kept, base.tokenizer, examples),
        benchmarks=None if scored_on is None else _benchmark_facts(scored_on, steps),
    )


def _benchmark_facts(plan: BenchmarkPlan, steps: Steps | None) -> BenchmarkFacts:
    times = None if steps is None else times_scored(plan.section, steps.total)
    return BenchmarkFacts(plan.names, len(plan.loaded.tasks), count_documents(plan), times)


def _look_at_the_folder(output_dir: str, found: Findings) -> None:
    folder = RunFolder(Path(output_dir))
    begun = folder.holds_a_run()
    if begun:
        found.notices.append(
            f"output_dir: {folder.path} already holds a run: go on with it by --resume, or name another folder with "
            "--output-dir"
        )
    found.attempt(folder.check, resume=begun)


def _not_here(recipe: Recipe) -> Iterator[str]:
    """What training will need and a check does not; it may be there on another machine."""
    if recipe.training.device == "cuda" and not torch.cuda.is_available():
        yield "training.device is cuda, and there is no GPU here; training will need one"


def _check_targets(config: PreTrainedConfig, recipe: Recipe) -> None:
    """Whether `target_modules` names layers of this model, which is built without memory for its weights."""
    if recipe.lora.target_modules == ALL_LINEAR:
        return
    # Here, since model classes and bitsandbytes take seconds to import.
    from transformers import AutoModelForCausalLM

    from qlora_cli.model.inject import find_targets

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.trust_remote_code)
    find_targets(model, recipe.lora.target_modules)


def _read_base(recipe: Recipe) -> Base:
    source = ModelSource(recipe.base_model, recipe.revision, recipe.trust_remote_code)
    return Base(load_tokenizer(source), load_config(source))


def _steps(recipe: Recipe, rows: EncodedRows) -> Steps:
    section = recipe.training
    max_length = recipe.dataset.max_length
    units = make_units(rows, recipe.dataset.pack_to, section.seed)
    plan = step_plan(section, units, num_processes=1)
    total = total_steps(section, plan)
    return Steps(
        total=total,
        sequences_per_step=sequences_per_step(section, num_processes=1),
        epochs=total / plan.steps_per_epoch,
        warmup=section.warmup_steps,
        packed=units.packed,
        sequences=plan.units_per_epoch,
        padding=plan.padding,
        fill=float(units.lengths.mean() / max_length) if units.packed else None,
    )
