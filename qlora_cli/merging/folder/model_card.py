"""The merged model's README: what it was made of, how near it is to the model that was trained, how to load it.

It goes wherever the model goes, so that it names no folder of the machine it was made on, and repeats no secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qlora_cli.merging.folder.markdown import code, fenced, harmless, is_hub_name, plain, table, without_secrets
from qlora_cli.model.files import commit_of
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.dump import RecipeDumper, dump_recipe
from qlora_cli.recipe.schema import Recipe

CARD_FILE = "README.md"

# Of a base's own card, what holds for a model made from it.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LARGEST_CARD = 1 << 20  # bytes of a base's README that are looked at

# What a task of PEFT's is called on the hub, and the class of transformers that loads it.
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": (None, "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}


@dataclass(frozen=True)
class FidelityRow:
    """One merged model set against the model that was trained; None for what was not or cannot be measured.

    The divergences are in nats per token, `top1_agreement` is a share from 0 to 1, `loss_difference` the merged model's
    loss less the trained one's, `worst_layer_error` relative.
    """

    name: str
    mean_kl: float | None = None
    max_kl: float | None = None
    top1_agreement: float | None = None
    loss: float | None = None
    loss_difference: float | None = None
    worst_layer: str | None = None
    worst_layer_error: float | None = None


@dataclass(frozen=True)
class CardFacts:
    """What the card tells. Texts may hold anything: they are made harmless on rendering.

    Attributes:
        title: the model's name, as a rule that of its folder.
        base: name and revision, as `describe_base` gives them.
        adapter_sha256: of `adapter_model.safetensors`, in hex.
        adapter: the adapter in words, such as `LoRA, rank 16, on 210 layers`.
        trained_base: how the base was stored in training, and who says so.
        merged_into: `original` or `dequantized`.
        dtype: of the weights written.
        task_type: PEFT's name for the task; None if it is not known.
        quantized: how the weights are stored, if they were quantised again, such as `4 bits (NF4)`.
        held_out: in words, the rows that fidelity was measured on.
        fidelity: one row for each model that was measured, the one that this is first.
        recipe: of the run, as `recipe_for_card` gives it.
        base_card: the base's front matter, as `read_front_matter` gives it.
        versions: package: version.
        remarks: whole sentences.
        custom_code: whether the model comes with code of its own.
    """

    title: str
    base: str
    base_revision: str | None
    adapter_sha256: str
    adapter: str
    trained_base: str
    merged_into: str
    dtype: str
    task_type: str | None = "CAUSAL_LM"
    quantized: str | None = None
    held_out: str = ""
    fidelity: Sequence[FidelityRow] = ()
    recipe: str | None = None
    base_card: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    custom_code: bool = False


def describe_base(base: ModelSource, folder: Path) -> tuple[str, str | None]:
    """The base's name as others may know it, and its revision: the hub's name and commit, else the folder's name."""
    commit = commit_of(folder)
    if not Path(base.name).is_absolute():
        return base.name, commit or base.revision
    cached = re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", folder.parent.parent.name)
    if commit is not None and cached:  # a folder in the hub's cache
        return f"{cached[1]}/{cached[2]}", commit
    return folder.name, base.revision


def recipe_for_card(recipe: Recipe) -> str:
    """The recipe as YAML, with every default, and of paths the last part alone."""
    data = yaml.safe_load(dump_recipe(recipe))
    return yaml.dump(_without_folders(data), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True)


def read_front_matter(folder: Path) -> dict[str, Any]:
    """The YAML at the head of a model's README.md; empty if there is none that can be read."""
    try:
        with (folder / CARD_FILE).open(encoding="utf-8") as file:
            text = file.read(_LARGEST_CARD)
    except (OSError, ValueError):
        return {}
    found = re.match(r"\ufeff?---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", text, re.DOTALL)
    if not found:
        return {}
    try:
        data = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def render_card(facts: CardFacts) -> str:
    """The README, front matter and text."""
    parts = [
        _front_matter(facts),
        f"# {plain(facts.title)}",
        _opening(facts),
        "## How it was made",
        table(("", ""), _provenance(facts)),
    ]
    if facts.remarks:
        parts.append("\n".join(f"- {plain(remark)}" for remark in facts.remarks))
    parts += ["## How near it is to the model that was trained", _fidelity(facts)]
    parts += ["## How to load it", _loading(facts)]
    if facts.recipe is not None:
        parts += ["## Recipe", fenced(without_secrets(facts.recipe).rstrip("\n"), "yaml")]
    if facts.versions:
        parts += ["## Versions", ", ".join(f"{plain(name)} {plain(v)}" for name, v in facts.versions.items())]
    return "\n\n".join(parts) + "\n"


def loading_class(task_type: str | None) -> str:
    """The class of transformers that loads a model for a task of PEFT's; an adapter that names none is for text."""
    return _TASKS.get(task_type or "CAUSAL_LM", (None, "AutoModel"))[1]


def _front_matter(facts: CardFacts) -> str:
    data: dict[str, Any] = {}
    if is_hub_name(facts.base):
        data |= {"base_model": facts.base, "base_model_relation": "quantized" if facts.quantized else "finetune"}
    data["library_name"] = "transformers"
    data |= {name: facts.base_card[name] for name in _INHERITED if facts.base_card.get(name)}
    if facts.task_type in _TASKS and (pipeline := _TASKS[facts.task_type][0]):
        data["pipeline_tag"] = pipeline
    data["tags"] = ["qlora", "lora", "merged"]
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{harmless(text)}---"


def _opening(facts: CardFacts) -> str:
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if is_hub_name(facts.base) else code(facts.base)
    stored = f", stored in {plain(facts.quantized)}" if facts.quantized else ""
    return f"{base} with a LoRA adapter merged into its weights{stored}."


def _provenance(facts: CardFacts) -> list[tuple[str, str]]:
    into = {
        "original": "the base's original weights (W + BA)",
        "dequantized": "the 4-bit weights that the adapter was trained against, dequantised (dequant(quant(W)) + BA)",
    }
    rows = [
        ("Base", code(facts.base)),
        ("Revision", code(facts.base_revision) if facts.base_revision else "not known (a local folder)"),
        ("Base in training", plain(facts.trained_base)),
        ("Adapter", plain(facts.adapter)),
        ("Adapter's SHA-256", code(facts.adapter_sha256)),
        ("Merged into", into.get(facts.merged_into) or plain(facts.merged_into)),
        ("Weights", plain(facts.dtype)),
    ]
    if facts.quantized:
        rows.append(("Stored in", plain(facts.quantized)))
    return rows


def _fidelity(facts: CardFacts) -> str:
    if not facts.fidelity:
        return "Not measured."
    rows = [
        (
            plain(row.name),
            _number(row.mean_kl, ".3g"),
            _number(row.max_kl, ".3g"),
            _number(row.top1_agreement, ".2%"),
            _number(row.loss, ".4f"),
            _number(row.loss_difference, "+.5f"),
            f"{code(row.worst_layer)} {_number(row.worst_layer_error, '.2%')}" if row.worst_layer else "",
        )
        for row in facts.fidelity
    ]
    heads = ("", "mean KL", "max KL", "same top token", "loss", "loss difference", "largest layer error")
    against = f"Against the base as it was stored in training with the adapter beside it, on {plain(facts.held_out)}."
    units = "KL is in nats per token, the loss is per token, and a layer's error is relative to its output."
    return f"{against if facts.held_out else ''}\n{units}\n\n{table(heads, rows)}".lstrip("\n")


def _loading(facts: CardFacts) -> str:
    name = loading_class(facts.task_type)
    code = ", trust_remote_code=True" if facts.custom_code else ""
    return fenced(
        f"from transformers import {name}, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its name on the hub\n'
        f"tokenizer = AutoTokenizer.from_pretrained(folder{code})\n"
        f'model = {name}.from_pretrained(folder, dtype="auto"{code})',
        "python",
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return f"…/{Path(value).name}"
    return value
