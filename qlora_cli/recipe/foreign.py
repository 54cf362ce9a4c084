"""Names that other fine-tuning tools give to what our recipe names, answered with ours.

The names themselves are data: `foreign_names`, what has a field here; `foreign_absent`, what has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qlora_cli.recipe.foreign_absent import NOTHING
from qlora_cli.recipe.foreign_names import OTHERWISE, SAME, Names


@dataclass(frozen=True)
class ForeignName:
    """What another tool calls something, and where that is here.

    Attributes:
        tool: whose name it is, as in `PEFT`.
        here: the dotted field or the section here, as in `lora.rank`; None where this tool has nothing of the kind.
        advice: completes the sentence of `explain`: what to write where it is not the same value, or what holds
            instead where there is nothing.
        same_value: whether the value can be taken over as it is, words included that `foreign_value` knows.
    """

    tool: str
    here: str | None
    advice: str = ""
    same_value: bool = True


def foreign_name(key: str) -> ForeignName | None:
    """What another tool means by a key, whatever its case and with `-`, `_` or neither between its words.

    `key` is one key, not a dotted path; None for a name that none of the known tools has.
    """
    return _NAMES.get(_compact(key))


def is_anothers(key: str) -> bool:
    """Whether a key is another tool's name to the letter."""
    return key in _WRITTEN


def explain(key: str, name: ForeignName) -> str:
    """A sentence without its full stop: whose name it is, and what to write here."""
    whose = f"`{key}` is {name.tool}'s name; "
    if name.here is None:
        return whose + name.advice
    return f"{whose}here it is `{name.here}`" + (f": {name.advice}" if name.advice else "")


def foreign_value(field: str, value: str) -> str | None:
    """The value of our `field` (dotted) that another tool's word for it stands for.

    A word that leaves something open stands for the one that there is here: `lion` for `lion_8bit`, `lion_32bit` for
    nothing. None if there is no such value here, or if `value` is ours already.
    """
    words = _WORDS.get(field, {})
    # `torch.optim.AdamW` is the AdamW of wherever it comes from.
    found = words.get(_compact(value)) or words.get(_compact(value.rsplit(".", 1)[-1]))
    return None if found == value else found


def all_foreign_names() -> Iterator[tuple[str, ForeignName]]:
    """Every known name, as its tool writes it."""
    for here, same in SAME.items():
        yield from _each(same, here, "", True)
    for otherwise in OTHERWISE:
        yield from _each(otherwise.names, otherwise.here, otherwise.advice, False)
    for nothing in NOTHING:
        yield from _each(nothing.names, None, nothing.advice, False)


def _each(names: Names, here: str | None, advice: str, same_value: bool) -> Iterator[tuple[str, ForeignName]]:
    for tool, text in names.items():
        for name in text.split():
            yield name, ForeignName(tool, here, advice, same_value)


def _compact(word: str) -> str:
    """Without case and separators: `loadIn4Bit`, `load-in-4bit` and `load_in_4bit` are one name."""
    return re.sub(r"[\s_:-]", "", word.lower())


_NAMES: Mapping[str, ForeignName] = {_compact(name): meaning for name, meaning in all_foreign_names()}
_WRITTEN = frozenset(name for name, _ in all_foreign_names())

# Our values and other tools' words for them. What has no value here has no word: 16-bit floats, cuda:1.
FOREIGN_VALUES: Mapping[str, Mapping[str, str]] = {
    "task": {"causal_lm": "CAUSAL_LM clm sft AutoModelForCausalLM text-generation language-modeling"},
    "quantization.quant_type": {"nf4": "NF4 bnb.nf4 bnb_nf4 nf4-dq", "fp4": "FP4 bnb.fp4 bnb_fp4 fp4-dq"},
    "quantization.compute_dtype": {
        "bfloat16": "bf16 bf16-true torch.bfloat16",
        "float32": "fp32 float 32-true torch.float32",
    },
    "lora.target_modules": {"all-linear": "all all_linear all-linear-layers linear"},
    "dataset.format": {
        "messages": "chat chat_template chatml openai conversational chat_dataset",
        "conversations": "sharegpt sharegpt_dataset vicuna",
        "alpaca": "instruction alpaca_dataset alpaca_cleaned_dataset",
        "prompt_completion": "prompt-completion completions",
        "classification": "text-classification sequence-classification",
        "text": "completion pretrain pretraining language-modeling text_completion_dataset",
    },
    "dataset.supervise": {
        "all_assistant": "train_on_assistant assistant",
        "last_assistant": "train_on_last last",
        "everything": "train_on_all all",
    },
    "dataset.on_bad_row": {"error": "raise fail", "skip": "drop ignore"},
    "dataset.overlong": {"error": "raise", "truncate": "truncation keep_start"},
    "training.lr_scheduler_type": {
        "linear": "linear_with_warmup get_linear_schedule_with_warmup",
        "cosine": "cosine_with_warmup get_cosine_schedule_with_warmup cosine_decay CosineAnnealingLR",
        "constant": "constant_with_warmup get_constant_schedule get_constant_schedule_with_warmup",
    },
    "training.optimizer": {
        "adamw_torch": "adamw adam adamw_hf adamw_torch_fused torch.optim.AdamW AdamW32bit",
        "adamw_8bit": "adamw_bnb_8bit AdamW8bit adam8bit adamw_torch_8bit ao_adamw_8bit",
        "paged_adamw_32bit": "paged_adamw PagedAdamW PagedAdamW32bit",
        "paged_adamw_8bit": "PagedAdamW8bit",
        "lion_8bit": "lion Lion8bit",
        "paged_lion_8bit": "paged_lion PagedLion PagedLion8bit",
    },
    "training.device": {"cuda": "gpu cuda:0"},
}

_WORDS: Mapping[str, Mapping[str, str]] = {
    field: {_compact(word): ours for ours, words in values.items() for word in [ours, *words.split()]}
    for field, values in FOREIGN_VALUES.items()
}
