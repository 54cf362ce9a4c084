"""The grammar of a recipe, one frozen section per builder.

Names are the QLoRA paper's for quantisation and LoRA, Hugging Face's for training. Unknown keys are refused.
"""

from __future__ import annotations

import re
import warnings
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

Fraction = Annotated[float, Field(ge=0, lt=1)]

_LONGEST_EXPRESSION = 10_000  # characters; a longer one takes seconds to compile

# The word for every linear layer but the output head.
ALL_LINEAR = "all-linear"

# Marks the fields in which `${NAME}` stands for an environment variable.
ENVIRONMENT: dict[str, Any] = {"x-environment": True}


class Section(BaseModel):
    """A part of the recipe: immutable, closed to unknown keys, and strict (`"4"` is not a number)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class QuantizationSection(Section):
    """How the frozen base weights are stored (QLoRA, section 3)."""

    bits: Literal[4, 16] = Field(4, description="4 stores linear weights in 4 bits; 16 leaves them unquantised")
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="4-bit data type; NF4 is the QLoRA paper's")
    double_quant: bool = Field(True, description="quantise the block constants again: 0.127 in place of 0.5 bits")
    compute_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="dtype of every product, and of the weights that are not quantised"
    )


class LoraSection(Section):
    """The trained low-rank update (LoRA, section 4.1): h = W0 x + (alpha / rank) B A x."""

    rank: Annotated[int, Field(gt=0, le=65_536)] = Field(16, description="rank r of B A")
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="the update is scaled by alpha / rank")
    dropout: Fraction = Field(0.0, description="dropout on the input of A")
    target_modules: str | list[str] = Field(
        ALL_LINEAR,
        min_length=1,
        description="all-linear (every linear layer but the output head), a list of module names, "
        "or a regular expression that matches whole module paths",
    )

    @field_validator("target_modules")
    @classmethod
    def _is_an_expression(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, str):
            if len(value) > _LONGEST_EXPRESSION:
                raise ValueError(f"a regular expression of {len(value):,} characters; give a list of names")
            try:
                with warnings.catch_warnings(action="ignore"):  # of what a later Python may read otherwise
                    re.compile(value)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{value[:100]!r} is not a regular expression: {error}") from None
        return value


class Columns(NamedTuple):
    """The fields of a row that a format needs, and those it may have."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """Both."""
        return self.required + self.optional


# What `dataset.columns` may name, by `dataset.format`.
FORMAT_COLUMNS: dict[str, Columns] = {
    "messages": Columns(("messages",), ("tools",)),
    "conversations": Columns(("conversations",), ("system", "tools")),
    "alpaca": Columns(("instruction", "output"), ("input", "system")),
    "prompt_completion": Columns(("prompt", "completion")),
    "classification": Columns(("text", "label"), ("text_pair",)),
    "text": Columns(("text",)),
}


_ALL_COLUMNS = sorted({field for columns in FORMAT_COLUMNS.values() for field in columns.fields})

FormatName = Literal["auto", "messages", "conversations", "alpaca", "prompt_completion", "classification", "text"]


class SourceSection(Section):
    """One of several sources of rows; what it leaves out is as the dataset has it."""

    path: str = Field(
        min_length=1,
        description="file, folder, glob or hub name; a path is relative to the recipe",
        json_schema_extra=ENVIRONMENT,
    )
    weight: Annotated[float, Field(gt=0, le=1000)] = Field(
        1.0, description="how often its rows are seen in an epoch; 0.5: half of them, the others in the next epoch"
    )
    hub_config: str | None = Field(None, description="configuration of a hub dataset, such as `main`")
    split: str | None = Field(None, description="split of a hub dataset")
    format: FormatName | None = Field(None, description="shape of a row; auto recognises it by its columns")
    columns: dict[str, str] | None = Field(
        None,
        description="the format's field: your column, as in {prompt: question}",
        json_schema_extra={"propertyNames": {"enum": [*_ALL_COLUMNS]}},
    )


RowSource = str | Annotated[list[Annotated[str, Field(min_length=1)] | SourceSection], Field(min_length=1)]


class DatasetSection(Section):
    """What is learned, and how a row becomes text."""

    train: RowSource = Field(
        min_length=1,
        description="file, folder, glob or hub name, or a list of them; a path is relative to the recipe",
        json_schema_extra=ENVIRONMENT,
    )
    validation: RowSource | None = Field(
        None, min_length=1, description="held-out rows, named like `train`", json_schema_extra=ENVIRONMENT
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="hold out this share of `train` instead"
    )
    hub_config: str | None = Field(None, description="configuration of a hub dataset, such as `main`")
    train_split: str = Field("train", description="split of a hub dataset to train on")
    validation_split: str = Field("validation", description="split of a hub dataset to evaluate on")
    streaming: bool = Field(False, description="read a hub dataset as it comes, in place of downloading it first")
    format: FormatName = Field("auto", description="shape of a row; auto recognises it by its columns")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="the format's field: your column, as in {prompt: question}",
        json_schema_extra={"propertyNames": {"enum": [*_ALL_COLUMNS]}},
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        description="a Jinja file (relative to the recipe), the template itself, or plain; "
        "by default the tokenizer's own, and plain for conversations where it has none",
        json_schema_extra=ENVIRONMENT,
    )
    supervise: Literal["all_assistant", "last_assistant", "everything"] = Field(
        "all_assistant", description="which turns are learned: each answer, the last one alone, or the prompts too"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="what to do with a row that cannot be read")
    max_length: Annotated[int, Field(ge=2)] = Field(2048, description="longest row, in tokens")
    overlong: Literal["error", "drop", "truncate"] = Field("error", description="what to do with longer rows")
    packing: bool = Field(
        False, description="several rows in one sequence of up to max_length tokens, none of which sees another"
    )

    @property
    def pack_to(self) -> int | None:
        """The tokens that rows are packed to; None where each is a sequence of its own."""
        return self.max_length if self.packing else None

    @property
    def train_sources(self) -> tuple[SourceSection, ...]:
        """Where the training rows come from, each with its own format, columns, configuration and split."""
        return self._sources(self.train, self.train_split)

    @property
    def validation_sources(self) -> tuple[SourceSection, ...]:
        """Where the validation rows come from, if anywhere."""
        return () if self.validation is None else self._sources(self.validation, self.validation_split)

    def _sources(self, named: RowSource, split: str) -> tuple[SourceSection, ...]:
        given = named if isinstance(named, list) else [named]
        sources = [SourceSection(path=source) if isinstance(source, str) else source for source in given]
        return tuple(
            source.model_copy(
                update={
                    "hub_config": self.hub_config if source.hub_config is None else source.hub_config,
                    "split": source.split or split,
                    "format": source.format or self.format,
                    "columns": self.columns if source.columns is None else source.columns,
                }
            )
            for source in sources
        )


OptimizerName = Literal[
    "adamw_torch",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_8bit",
    "paged_lion_8bit",
]


class TrainingSection(Section):
    """The training loop."""

    num_train_epochs: Annotated[float, Field(gt=0, le=10_000)] = Field(1.0, description="passes over the training rows")
    max_steps: PositiveInt | None = Field(None, description="optimizer steps, in place of num_train_epochs")
    per_device_train_batch_size: PositiveInt = Field(
        8, description="rows, or packs of rows, in one forward pass on one device"
    )
    per_device_eval_batch_size: PositiveInt | None = Field(
        None, description="rows, or packs, in one evaluation pass; by default as in training"
    )
    gradient_accumulation_steps: PositiveInt = Field(1, description="forward passes per optimizer step")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(2e-4, description="peak learning rate")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="shape of the learning rate after warmup"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps of linear warmup")
    optimizer: OptimizerName = Field("paged_adamw_32bit", description="paged ones run unpaged on a CPU")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled weight decay")
    adam_beta1: Fraction = Field(0.9, description="decay of the first moment")
    adam_beta2: Fraction = Field(0.999, description="decay of the second moment (lion: of its momentum)")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        0.3, description="clip the gradient to this norm; null does not clip"
    )
    on_nonfinite: Literal["stop", "skip_step"] = Field(
        "stop",
        description="what to do at a step whose loss or gradient is NaN or infinite; skip_step: it changes nothing, "
        "and the next one follows",
    )
    max_skipped_steps: PositiveInt = Field(
        10, description="steps that may be skipped, over the whole run; at the next one that would be, it stops"
    )
    gradient_checkpointing: bool = Field(True, description="recompute activations in the backward pass")
    logging_steps: PositiveInt = Field(10, description="steps between two training records")
    eval_steps: PositiveInt | None = Field(
        None, description="steps between evaluations; with validation rows there is always one at the end"
    )
    eval_on_start: bool = Field(True, description="evaluate before the first step, too")
    early_stopping_patience: PositiveInt | None = Field(
        None,
        description="stop after so many evaluations in a row without a lower held-out loss; null goes to the last step",
    )
    load_best: bool = Field(
        False,
        description="keep the checkpoint with the lowest held-out loss, whatever is rotated; its adapter is the result",
    )
    save_steps: PositiveInt | None = Field(500, description="steps between checkpoints; null: only at the end")
    save_total_limit: PositiveInt | None = Field(2, description="checkpoints to keep; null keeps all")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(42, description="of A, data order and dropout")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one")


Name = Annotated[str, Field(min_length=1)]


class EvaluationSection(Section):
    """Benchmarks of lm-evaluation-harness that the model is scored on while it trains, as QLoRA did with MMLU."""

    tasks: Name | list[Name] = Field(
        default_factory=list, description="a task or a group of lm-eval, or a list of them: [mmlu, arc_easy]"
    )
    every_steps: PositiveInt | None = Field(
        None, description="steps between two scorings; there is always one at the end"
    )
    at_start: bool = Field(False, description="score before the first step, too")
    limit: PositiveInt | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="score on the first so many documents of each task, or on a share of them"
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="examples in a prompt; by default as many as the task says"
    )
    apply_chat_template: bool = Field(False, description="render the prompts as conversations")
    per_device_batch_size: PositiveInt | None = Field(
        None, description="sequences in one forward pass on one device; by default as many as it takes"
    )
    data_root: str | None = Field(
        None,
        min_length=1,
        description="folder with the tasks' data, in place of the hub; relative to the recipe",
        json_schema_extra=ENVIRONMENT,
    )
    task_path: str | None = Field(
        None,
        min_length=1,
        description="folder with task definitions beside lm-eval's own; relative to the recipe",
        json_schema_extra=ENVIRONMENT,
    )
    allow_partial: bool = Field(False, description="score a group on those of its tasks whose data is there")
    keep_best: str | None = Field(
        None,
        min_length=1,
        description="TASK/METRIC, as in mmlu/acc: the checkpoint with the best score is kept, whatever is rotated",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks and groups asked for, alone or in a list; empty: nothing is scored."""
        return (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)


class Recipe(Section):
    """A whole recipe, as written in YAML."""

    extends: str | None = Field(
        None,
        min_length=1,
        description="another recipe that this one builds on (relative to this one): what is said here goes before",
        json_schema_extra=ENVIRONMENT,
        exclude=True,  # resolved on reading: what is loaded is whole
    )
    base_model: str = Field(
        min_length=1,
        description="hub name or local folder (relative to the recipe)",
        json_schema_extra=ENVIRONMENT,
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the base model")
    task: Literal["causal_lm"] = Field("causal_lm", description="what the model learns to do")
    quantization: QuantizationSection = Field(default_factory=lambda: QuantizationSection())
    lora: LoraSection = Field(default_factory=lambda: LoraSection())
    dataset: DatasetSection
    training: TrainingSection = Field(default_factory=lambda: TrainingSection())
    evaluation: EvaluationSection = Field(default_factory=lambda: EvaluationSection())
    output_dir: str = Field(
        min_length=1,
        description="the run folder, relative to where the command is run",
        json_schema_extra=ENVIRONMENT,
    )
