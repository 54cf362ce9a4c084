"""The tokenizer of a merged model: the adapter's, whole, if it brings one; else the base's, as training adapted it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.data.chat import has_template
from qlora_cli.data.templates import adopt_template
from qlora_cli.disk import json_text
from qlora_cli.errors import QloraError
from qlora_cli.merging.adapters.source import AdapterSource
from qlora_cli.model.files import read_json_object
from qlora_cli.model.source import ModelSource, load_tokenizer
from qlora_cli.recipe.schema import DatasetSection

_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
# A folder with one of these has a tokenizer of its own.
_VOCABULARIES = (
    "tokenizer.json",
    "*.model",
    "*.model.v[0-9]*",
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)
_BESIDE = (
    _CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "normalizer.json",
    "bpe.codes",
    "dict.txt",
)
# All the places in which a chat template may be, beside the configuration.
_MORE_TEMPLATES = "additional_chat_templates"
_TEMPLATES = (_TEMPLATE, "chat_template.json", f"{_MORE_TEMPLATES}/*.jinja")


@dataclass(frozen=True)
class CarriedTokenizer:
    """Whose tokenizer it is (`the adapter`, `the base`, or "" for none), where that lies, and what to say of it."""

    origin: str
    folder: Path
    remarks: tuple[str, ...] = ()


def carry_tokenizer(base_folder: Path, adapter: AdapterSource, staging: Path) -> CarriedTokenizer:
    """Copy the adapter's tokenizer if it has one, else the base's with the chat template of the adapter's run.

    The two are never mixed: ids of one mean nothing to the other.

    Raises:
        DataError, ModelError: if the run's chat template, or the tokenizer it is put on, cannot be read.
    """
    if _found(adapter.folder, _VOCABULARIES):
        copy_tokenizer(adapter.folder, staging)
        return CarriedTokenizer("the adapter", adapter.folder)
    remarks = []
    if parts := _found(adapter.folder, (*_BESIDE, *_TEMPLATES)):
        names = ", ".join(sorted(part.name for part in parts))
        remarks.append(f"the adapter has {names}, but no vocabulary: the base's tokenizer is taken, and all of that")
    if not _found(base_folder, _VOCABULARIES):
        return CarriedTokenizer("", base_folder, (*remarks, "neither the adapter nor the base has a tokenizer"))
    copy_tokenizer(base_folder, staging)
    if adapter.recipe is not None:
        remarks += _adopt(base_folder, adapter, adapter.recipe.dataset, staging)
    return CarriedTokenizer("the base", base_folder, tuple(remarks))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the folder's tokenizer, chat templates included; none if it has no vocabulary of its own."""
    return _found(folder, (*_VOCABULARIES, *_BESIDE, *_TEMPLATES)) if _found(folder, _VOCABULARIES) else []


def copy_tokenizer(source: Path, staging: Path) -> None:
    """Copy the files of a folder's tokenizer."""
    for file in tokenizer_files(source):
        target = staging / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _adopt(base_folder: Path, adapter: AdapterSource, section: DatasetSection, staging: Path) -> list[str]:
    """Write the chat template that the run's rows were rendered with, if it is not the base's."""
    tokenizer = load_tokenizer(ModelSource(str(base_folder.absolute()), None, adapter.base.trust_remote_code))
    before = tokenizer.chat_template
    remarks, conversations = [], False
    if section.chat_template is None and not has_template(tokenizer):
        try:
            conversations = has_conversations(section)
        except QloraError as error:
            remarks.append(
                f"whether the run's rows are conversations, which would be rendered with a template, cannot be told: "
                f"{error}"
            )
    adopt_template(tokenizer, section.chat_template, conversations=conversations)
    template = tokenizer.chat_template
    if template == before or not isinstance(template, str):
        return remarks
    for file in _found(staging, _TEMPLATES):
        file.unlink()
    shutil.rmtree(staging / _MORE_TEMPLATES, ignore_errors=True)
    (staging / _TEMPLATE).write_text(template, encoding="utf-8")
    if (staging / _CONFIG).is_file():
        config = read_json_object(staging / _CONFIG)
        if config.pop("chat_template", None) is not None:
            # Or a client that looks there first would render other texts.
            (staging / _CONFIG).write_text(json_text(config), encoding="utf-8")
    return [*remarks, "the chat template is that of the run, not the base's own"]


def has_conversations(section: DatasetSection) -> bool:
    """Whether a run's rows are conversations, which are rendered with a template even where the base has none.

    Raises:
        QloraError: if only the rows would tell, and they cannot be had.
    """
    sources = (*section.train_sources, *section.validation_sources)
    formats = {source.format for source in sources}
    if formats & {"messages", "conversations"}:
        return True
    if "auto" not in formats:
        return False
    # Here alone: what reads rows takes 80 MB of memory by itself, and a merge has to do with little.
    from qlora_cli.training.preparation import lay_out

    laid_out = lay_out("dataset.train", sources, section)
    return any(part.format in ("messages", "conversations") for part in laid_out)


def _found(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file()]
