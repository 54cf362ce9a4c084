"""Names and words of other tools, answered with ours."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from qlora_cli.recipe.foreign import (
    FOREIGN_VALUES,
    ForeignName,
    all_foreign_names,
    explain,
    foreign_name,
    foreign_value,
)
from qlora_cli.recipe.schema import QuantizationSection, Recipe

NAMES = list(all_foreign_names())


def fields(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every dotted name of the grammar, sections among them, with its annotation."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fields(field.annotation, f"{prefix}{name}.")
    return found


def sentence(key: str) -> str:
    name = foreign_name(key)
    assert name is not None
    return explain(key, name)


# ---------------------------------------------------------------------------------------------------------- Sentences


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("lora_r", "`lora_r` is PEFT's name; here it is `lora.rank`"),
        ("r", "`r` is PEFT's name; here it is `lora.rank`"),
        ("model_name_or_path", "`model_name_or_path` is Hugging Face's name; here it is `base_model`"),
        ("optim", "`optim` is Hugging Face's name; here it is `training.optimizer`"),
        ("max_seq_length", "`max_seq_length` is TRL's name; here it is `dataset.max_length`"),
        ("sequence_len", "`sequence_len` is axolotl's name; here it is `dataset.max_length`"),
        ("num_epochs", "`num_epochs` is axolotl's name; here it is `training.num_train_epochs`"),
        ("cutoff_len", "`cutoff_len` is LLaMA-Factory's name; here it is `dataset.max_length`"),
        ("lr", "`lr` is torchtune's name; here it is `training.learning_rate`"),
        ("random_state", "`random_state` is Unsloth's name; here it is `training.seed`"),
        ("model", "`model` is mlx-lm's name; here it is `base_model`"),
        ("out_dir", "`out_dir` is litgpt's name; here it is `output_dir`"),
        ("lora_config", "`lora_config` is PEFT's name; here it is `lora`"),
        ("training_args", "`training_args` is Hugging Face's name; here it is `training`"),
        ("quant", "`quant` is another tool's name; here it is `quantization`"),
        ("datasets", "`datasets` is axolotl's name; here it is `dataset.train`"),
        ("sample_packing", "`sample_packing` is axolotl's name; here it is `dataset.packing`"),
        ("chat_template_path", "`chat_template_path` is TRL's name; here it is `dataset.chat_template`"),
        ("dataset_streaming", "`dataset_streaming` is TRL's name; here it is `dataset.streaming`"),
    ],
)
def test_the_same_value_under_another_name(key: str, told: str) -> None:
    """Whose name it is and ours, and the value can be taken over."""
    assert sentence(key) == told
    name = foreign_name(key)
    assert name is not None
    assert name.same_value


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (
            "load_in_4bit",
            "`load_in_4bit` is Hugging Face's name; here it is `quantization.bits`: "
            "4 in place of true, 16 in place of false",
        ),
        ("adapter", "`adapter` is axolotl's name; here it is `quantization.bits`: 4 for qlora, 16 for lora"),
        (
            "bf16",
            "`bf16` is Hugging Face's name; here it is `quantization.compute_dtype`: bfloat16 in place of true",
        ),
        (
            "fp16",
            "`fp16` is Hugging Face's name; here it is `quantization.compute_dtype`: "
            "bfloat16 or float32; float16 is not offered",
        ),
        (
            "lora_target_linear",
            "`lora_target_linear` is axolotl's name; here it is `lora.target_modules`: all-linear in place of true",
        ),
        (
            "lora_target",
            "`lora_target` is LLaMA-Factory's name; here it is `lora.target_modules`: "
            "a list, or all-linear in place of all",
        ),
        ("scale", "`scale` is mlx-lm's name; here it is `lora.alpha`: scale times rank"),
        (
            "train_on_inputs",
            "`train_on_inputs` is axolotl's name; here it is `dataset.supervise`: everything in place of true, "
            "all_assistant in place of false",
        ),
        (
            "assistant_only_loss",
            "`assistant_only_loss` is TRL's name; here it is `dataset.supervise`: all_assistant in place of true, "
            "everything in place of false",
        ),
        (
            "mask_history",
            "`mask_history` is LLaMA-Factory's name; here it is `dataset.supervise`: last_assistant in place of true, "
            "all_assistant in place of false",
        ),
        (
            "template",
            "`template` is LLaMA-Factory's name; here it is `dataset.chat_template`: a Jinja file, the template "
            "itself, or plain; without it, the tokenizer's own",
        ),
        (
            "dataset_mixer",
            "`dataset_mixer` is alignment-handbook's name; here it is `dataset.train`: "
            "a list, as in [{path: a.jsonl, weight: 0.5}, b.jsonl]",
        ),
        (
            "skip_bad_rows",
            "`skip_bad_rows` is another tool's name; here it is `dataset.on_bad_row`: skip in place of true, "
            "error in place of false",
        ),
        (
            "val_set_size",
            "`val_set_size` is axolotl's name; here it is `dataset.validation_fraction`: "
            "a share above 0 and below 1; without validation rows, leave it out",
        ),
        (
            "warmup_ratio",
            "`warmup_ratio` is Hugging Face's name; here it is `training.warmup_steps`: "
            "a number of steps, not a share of them",
        ),
        (
            "max_steps_per_epoch",
            "`max_steps_per_epoch` is torchtune's name; here it is `training.max_steps`: "
            "the steps of all epochs together",
        ),
        (
            "global_batch_size",
            "`global_batch_size` is litgpt's name; here it is `training.gradient_accumulation_steps`: "
            "the rows of a step, divided by per_device_train_batch_size and by the number of processes",
        ),
        ("iters", "`iters` is mlx-lm's name; here it is `training.max_steps`: counted in optimizer steps"),
        (
            "use_gradient_checkpointing",
            "`use_gradient_checkpointing` is Unsloth's name; here it is `training.gradient_checkpointing`: "
            "true or false",
        ),
        (
            "source_max_len",
            "`source_max_len` is QLoRA's name; here it is `dataset.max_length`: "
            "the longest row, prompt and answer together",
        ),
    ],
)
def test_another_value_under_another_name(key: str, told: str) -> None:
    """Where the value is written otherwise here, how; it cannot be taken over."""
    assert sentence(key) == told
    name = foreign_name(key)
    assert name is not None
    assert not name.same_value


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (
            "dataset_num_proc",
            "`dataset_num_proc` is TRL's name; rows are encoded once, by worker processes, and kept in "
            "$XDG_CACHE_HOME/qlora or ~/.cache/qlora",
        ),
        (
            "message_field_role",
            "`message_field_role` is axolotl's name; a turn has the keys role and content, or from and value; "
            "rename others in the data",
        ),
        (
            "flash_attention",
            "`flash_attention` is axolotl's name; "
            "attention is what transformers picks for the model, SDPA where it can, or what keeps packed rows apart",
        ),
        (
            "report_to",
            "`report_to` is Hugging Face's name; there are no trackers: the metrics are in metrics.jsonl in the run "
            "folder",
        ),
        (
            "resume_from_checkpoint",
            "`resume_from_checkpoint` is Hugging Face's name; "
            "`qlora train RECIPE --resume` goes on from the newest whole checkpoint of the run",
        ),
        (
            "overwrite_output_dir",
            "`overwrite_output_dir` is Hugging Face's name; "
            "a run is never overwritten: delete its folder, or name another with --output-dir",
        ),
        (
            "use_rslora",
            "`use_rslora` is PEFT's name; the update is scaled by alpha / rank; "
            "for alpha / sqrt(rank), multiply `lora.alpha` by sqrt(rank)",
        ),
        ("use_dora", "`use_dora` is PEFT's name; DoRA is not offered: the update is plain LoRA"),
        ("modules_to_save", "`modules_to_save` is PEFT's name; only LoRA layers are trained and saved"),
        (
            "finetuning_type",
            "`finetuning_type` is LLaMA-Factory's name; the base model stays frozen: a LoRA adapter is what is trained",
        ),
        (
            "deepspeed",
            "`deepspeed` is Hugging Face's name; every process has a whole copy of the model: it is not sharded",
        ),
        (
            "early_stopping_threshold",
            "`early_stopping_threshold` is Hugging Face's name; any lower held-out loss is an improvement, for "
            "`training.early_stopping_patience` and `training.load_best`",
        ),
    ],
)
def test_what_there_is_nothing_for(key: str, told: str) -> None:
    """What holds here instead."""
    assert sentence(key) == told
    name = foreign_name(key)
    assert name is not None
    assert (name.here, name.same_value) == (None, False)


def test_eight_bits_are_not_offered() -> None:
    """As it is told; the day they are, `load_in_8bit` has to say so."""
    assert sentence("load_in_8bit") == (
        "`load_in_8bit` is Hugging Face's name; 8-bit weights are not offered: `quantization.bits` is 4 or 16"
    )
    assert get_args(QuantizationSection.model_fields["bits"].annotation) == (4, 16)


def test_the_sentence_quotes_the_key_as_it_was_written() -> None:
    assert explain("loraR", ForeignName("PEFT", "lora.rank")) == "`loraR` is PEFT's name; here it is `lora.rank`"


# ---------------------------------------------------------------------------------------------------------- Keys


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("LORA_R", "lora_r"),
        ("lora-r", "lora_r"),
        ("loraR", "lora_r"),
        ("perGpuTrainBatchSize", "per_gpu_train_batch_size"),
        ("micro-batch-size", "micro_batch_size"),
        ("loadIn4bit", "load_in_4bit"),
        ("loadIn4Bit", "load_in_4bit"),
        ("useDoRA", "use_dora"),
        ("bnb-4bit-quant-type", "bnb_4bit_quant_type"),
        ("max_memory_MB", "max_memory_mb"),
    ],
)
def test_case_and_separators_do_not_matter(written: str, name: str) -> None:
    assert foreign_name(written) == foreign_name(name) is not None


@pytest.mark.parametrize("key", ["", "_", "lora.r", "lora_rr", "ré", "rank", "learning_rate", "no_such_key"])
def test_what_is_nobodys_name(key: str) -> None:
    """Neither a near miss, nor a dotted path, nor a name of ours is taken for another tool's."""
    assert foreign_name(key) is None


@pytest.mark.parametrize(
    ("here", "names"),
    [
        ("base_model", "model_name_or_path model"),
        ("quantization.bits", "load_in_4bit adapter quantization_bit"),
        ("quantization.quant_type", "quantization_type bnb_4bit_quant_type"),
        ("quantization.double_quant", "double_quantization use_bnb_nested_quant"),
        ("lora.rank", "lora_r lora_rank r"),
        ("lora.alpha", "lora_alpha"),
        ("lora.dropout", "lora_dropout"),
        (
            "lora.target_modules",
            "lora_target_modules lora_target_linear lora_target lora_attn_modules apply_lora_to_mlp",
        ),
        ("dataset.train", "path dataset_dir dataset_name datasets interleave_probs mix_strategy"),
        ("dataset.packing", "sample_packing neat_packing packed packing_strategy"),
        ("dataset.supervise", "train_on_inputs train_on_prompt mask_prompt train_on_source roles_to_train"),
        ("dataset.chat_template", "chat_template_jinja template chat_template_path"),
        ("dataset.format", "type"),
        ("dataset.max_length", "sequence_len cutoff_len max_seq_length model_max_length max_seq_len"),
        ("training.per_device_train_batch_size", "micro_batch_size batch_size"),
        ("training.num_train_epochs", "num_epochs epochs"),
        ("training.max_steps", "max_steps_per_epoch"),
        ("training.learning_rate", "lr"),
        ("training.lr_scheduler_type", "lr_scheduler"),
        ("training.warmup_steps", "warmup_ratio"),
        ("training.optimizer", "optim"),
        (None, "_component_"),
    ],
)
def test_every_name_of_the_comparison_is_known(here: str | None, names: str) -> None:
    """The key names of axolotl, LLaMA-Factory, TRL, Hugging Face and torchtune that a recipe is most often written
    in, but for those that are also ours."""
    for key in names.split():
        name = foreign_name(key)
        assert name is not None, key
        assert name.here == here, key


def test_every_field_that_is_pointed_at_is_there() -> None:
    """`here` is a field or a section of the grammar; so is what an advice has in backticks, but for commands."""
    known = set(fields())
    for name, meaning in NAMES:
        assert meaning.here is None or meaning.here in known, name
        for quoted in meaning.advice.split("`")[1::2]:
            assert quoted.split()[0].rstrip(":") in known | {"accelerate", "hf", "qlora"}, name


def test_no_name_of_ours_is_called_anothers() -> None:
    """At any level, however it is separated: it would be refused where it is right."""
    ours = {dotted.rsplit(".", 1)[-1].replace("_", "") for dotted in fields()}
    assert not [name for name, _ in NAMES if name.replace("_", "").lower() in ours]


def test_every_name_is_one_tools() -> None:
    """A name that stood twice would be answered by chance."""
    counted = Counter(name.replace("_", "").lower() for name, _ in NAMES)
    assert not [name for name, times in counted.items() if times > 1]
    for name, meaning in NAMES:
        assert foreign_name(name) == meaning


def test_advice_completes_a_sentence() -> None:
    """There is some wherever the value cannot be taken over; no full stop, as the sentence may go on."""
    for name, meaning in NAMES:
        assert meaning.same_value or meaning.advice, name
        assert meaning.same_value or not meaning.advice.endswith("."), name
        assert not (meaning.same_value and meaning.here is None), name


# ---------------------------------------------------------------------------------------------------------- Values


@pytest.mark.parametrize(
    ("field", "word", "ours"),
    [
        ("training.optimizer", "adamw_hf", "adamw_torch"),
        ("training.optimizer", "adamw_torch_fused", "adamw_torch"),
        ("training.optimizer", "adamw", "adamw_torch"),
        ("training.optimizer", "torch.optim.AdamW", "adamw_torch"),
        ("training.optimizer", "adamw_bnb_8bit", "adamw_8bit"),
        ("training.optimizer", "bitsandbytes.optim.AdamW8bit", "adamw_8bit"),
        ("training.optimizer", "paged_adamw", "paged_adamw_32bit"),
        ("training.optimizer", "bnb.optim.PagedAdamW8bit", "paged_adamw_8bit"),
        ("training.optimizer", "lion", "lion_8bit"),
        ("training.optimizer", "paged_lion", "paged_lion_8bit"),
        ("training.lr_scheduler_type", "constant_with_warmup", "constant"),
        ("training.lr_scheduler_type", "torchtune.modules.get_cosine_schedule_with_warmup", "cosine"),
        ("training.device", "gpu", "cuda"),
        ("training.device", "cuda:0", "cuda"),
        ("quantization.compute_dtype", "bf16", "bfloat16"),
        ("quantization.compute_dtype", "torch.bfloat16", "bfloat16"),
        ("quantization.compute_dtype", "bf16-true", "bfloat16"),
        ("quantization.compute_dtype", "fp32", "float32"),
        ("quantization.compute_dtype", "float", "float32"),
        ("quantization.quant_type", "NF4", "nf4"),
        ("quantization.quant_type", "bnb.nf4", "nf4"),
        ("dataset.format", "chat_template", "messages"),
        ("dataset.format", "conversational", "messages"),
        ("dataset.format", "instruction", "alpaca"),
        ("dataset.format", "prompt-completion", "prompt_completion"),
        ("dataset.format", "completion", "text"),
        ("dataset.format", "completions", "prompt_completion"),
        ("dataset.format", "sharegpt", "conversations"),
        ("dataset.format", "text-classification", "classification"),
        ("dataset.supervise", "train_on_last", "last_assistant"),
        ("dataset.overlong", "raise", "error"),
        ("dataset.overlong", "keep_start", "truncate"),
        ("lora.target_modules", "all", "all-linear"),
        ("lora.target_modules", "all_linear", "all-linear"),
        ("task", "CAUSAL_LM", "causal_lm"),
        ("task", "sft", "causal_lm"),
    ],
)
def test_words_for_our_values(field: str, word: str, ours: str) -> None:
    assert foreign_value(field, word) == ours


@pytest.mark.parametrize(
    ("field", "word"),
    [
        ("quantization.compute_dtype", "fp16"),
        ("quantization.compute_dtype", "torch.float16"),
        ("quantization.quant_type", "int8"),
        ("training.optimizer", "paged_lion_32bit"),
        ("training.optimizer", "adafactor"),
        ("training.lr_scheduler_type", "polynomial"),
        ("training.device", "cuda:1"),
        ("training.device", "mps"),
        ("dataset.format", "dpo"),
        ("dataset.overlong", "keep_end"),
        ("task", "SEQ_CLS"),
        ("lora.target_modules", "q_proj"),
        ("training.seed", "bf16"),
        ("no.such.field", "bf16"),
        ("training.optimizer", ""),
    ],
)
def test_words_for_what_there_is_not(field: str, word: str) -> None:
    """Nothing is suggested that would train otherwise than asked."""
    assert foreign_value(field, word) is None


def test_a_value_of_ours_needs_no_other() -> None:
    for field, values in FOREIGN_VALUES.items():
        assert [foreign_value(field, ours) for ours in values] == [None] * len(values)


def test_every_suggested_value_is_accepted() -> None:
    """What is said to be ours passes the grammar, and each word has one meaning in its field."""
    for field, values in FOREIGN_VALUES.items():
        for ours, words in values.items():
            data: dict[str, Any] = {"base_model": "m", "dataset": {"train": "t"}, "output_dir": "o"}
            *section, last = field.split(".")
            (data.setdefault(section[0], {}) if section else data)[last] = ours
            Recipe.model_validate(data)
            assert {word: foreign_value(field, word) for word in words.split()} == dict.fromkeys(words.split(), ours)
