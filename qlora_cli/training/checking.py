"""Everything that can be known of a recipe's training without the weights: its data as the model would see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qlora_cli.data.encode import check_shape
from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.fitting import NAMED_ROWS, Numbers
from qlora_cli.data.sources import Rows, hold_out, load_training_rows, load_validation_rows
from qlora_cli.errors import HubUnreachableError, RequestError
from qlora_cli.model.source import ModelSource, context_length, load_config, load_tokenizer
from qlora_cli.model.storage import check_stored_quantization
from qlora_cli.recipe.schema import ALL_LINEAR, DatasetSection, Recipe, TrainingSection
from qlora_cli.training.examples import first_examples
from qlora_cli.training.facts import Facts, Lengths, Overlong, SomeRows, SplitFacts, Steps
from qlora_cli.training.preparation import Split, doubts, encode_split, split_refusals
from qlora_cli.training.run_folder import RunFolder
from qlora_cli.training.schedule import endless_warmup, rows_per_step, step_plan, total_steps

T = TypeVar("T")


class _Base(NamedTuple):
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig


@dataclass
class _Findings:
    """What has come up so far; a failure is noted down, and the check goes on with what does not need it."""

    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def attempt(self, action: Callable[[], T], unknown: str = "not checked") -> T | None:
        """What `action` returns, or None if it fails; `unknown` is what is not known for want of the hub."""
        try:
            return action()
        except HubUnreachableError as error:
            self.notices.append(f"{unknown}: {error}")
        except RequestError as error:
            self.problems.append(str(error))
        return None


def check_data(recipe: Recipe, *, examples: int = 0) -> Facts:
    """Read the tokenizer and the rows, encode them, and say what training would make of them.

    No weights are read. Steps are counted for one process. `examples` is how many of the training rows to give back;
    fewer if there are fewer.
    """
    found = _Findings()
    _look_at_the_folder(recipe.output_dir, found)
    found.notices += _not_here(recipe)
    base = found.attempt(lambda: _read_base(recipe), "tokens were not counted")
    if base is not None:
        stored = getattr(base.config, "quantization_config", None)
        found.attempt(lambda: check_stored_quantization(stored, recipe.quantization))
        config = base.config
        found.attempt(lambda: _check_targets(config, recipe))
    train_rows, validation_rows = _load_rows(recipe, found)
    section = recipe.dataset
    train = _encode("train", train_rows, section, base, found)
    validation = _encode("validation", validation_rows, section, base, found)
    facts = None if train is None else _split_facts(train, section)
    steps = _steps(recipe.training, train.kept) if train is not None and len(train.kept) else None
    if train is not None:
        found.notices += doubts(train, validation, section)
    if steps is not None and (doubt := endless_warmup(recipe.training, steps.total)):
        found.notices.append(doubt)
    held_out = section.validation is not None or section.validation_fraction is not None
    known = train is not None and (validation is not None or not held_out)
    return Facts(
        checked="recipe and data" if known else "recipe",
        context_length=None if base is None else context_length(base.config),
        train=facts,
        validation=None if validation is None else _split_facts(validation, section),
        steps=steps,
        notices=tuple(dict.fromkeys(found.notices)),
        problems=tuple(dict.fromkeys(found.problems)),
        examples=() if train is None or base is None else first_examples(train.kept, base.tokenizer, examples),
    )


def _look_at_the_folder(output_dir: str, found: _Findings) -> None:
    folder = RunFolder(Path(output_dir))
    begun = folder.holds_a_run()
    if begun:
        found.notices.append(
            f"output_dir: {folder.path} already holds a run: go on with it by --resume, or name another folder with "
            "--output-dir"
        )
    found.attempt(lambda: folder.check(resume=begun))


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


def _read_base(recipe: Recipe) -> _Base:
    source = ModelSource(recipe.base_model, recipe.revision, recipe.trust_remote_code)
    return _Base(load_tokenizer(source), load_config(source))


def _load_rows(recipe: Recipe, found: _Findings) -> tuple[Rows | None, Rows | None]:
    """The rows of each split; one that fails does not keep the other from being looked at."""
    section = recipe.dataset
    train = found.attempt(lambda: load_training_rows(section), "the training rows were not read")
    validation = found.attempt(lambda: load_validation_rows(section), "the validation rows were not read")
    fraction = section.validation_fraction
    if train is None or fraction is None:
        return train, validation
    parts = found.attempt(lambda: hold_out(train, fraction, recipe.training.seed))
    return parts or (train, None)


def _encode(
    name: str, rows: Rows | None, section: DatasetSection, base: _Base | None, found: _Findings
) -> Split | None:
    """The encoded split, with all that is to be said against it; without a tokenizer, what can be said without."""
    if rows is None:
        return None
    if base is None:
        found.attempt(lambda: check_shape(rows, section))
        return None
    split = found.attempt(lambda: encode_split(name, rows, section, base.tokenizer))
    if split is not None:
        found.problems += split_refusals(split, section, base.config)
    return split


def _split_facts(split: Split, section: DatasetSection) -> SplitFacts:
    whole, kept = split.whole, split.kept
    return SplitFacts(
        data=split.ready(),
        unit=kept.unit,
        lengths=_lengths(whole),
        max_length=section.max_length,
        overlong=_overlong(split, section),
        without_labels=_some(kept.row_numbers[kept.learned == 0]),
        silent=_some(split.silent_rows),
        end_of_turn=split.end,
    )


def _steps(section: TrainingSection, rows: EncodedRows) -> Steps:
    plan = step_plan(section, rows, num_processes=1)
    total = total_steps(section, plan)
    return Steps(
        total=total,
        rows_per_step=rows_per_step(section, num_processes=1),
        epochs=total / plan.steps_per_epoch,
        warmup=section.warmup_steps,
    )


def _lengths(rows: EncodedRows) -> Lengths:
    at = np.quantile(rows.lengths, [0, 0.5, 0.9, 0.95, 0.99, 1], method="inverted_cdf")
    return Lengths(*map(int, at))


def _overlong(split: Split, section: DatasetSection) -> Overlong:
    whole, kept = split.whole, split.kept
    over = int((whole.lengths > section.max_length).sum())
    lost = whole.supervised_tokens - kept.supervised_tokens
    match section.overlong:
        case "error":
            return Overlong(over, "refused", 0, 0)
        case "drop":
            return Overlong(over, "dropped", kept.dropped, lost)
        case "truncate":
            return Overlong(over, "truncated", split.rows_losing_labels, lost)


def _some(numbers: Numbers) -> SomeRows:
    return SomeRows(len(numbers), tuple(map(int, numbers[:NAMED_ROWS])))
