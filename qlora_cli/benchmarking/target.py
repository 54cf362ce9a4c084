"""What is scored: a run, a checkpoint, an adapter or a whole model, found, described and loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.benchmarking.fingerprint import adapter_facts, base_facts, fingerprint, machine_facts, vocabulary_facts
from qlora_cli.benchmarking.forms import Bits, adapter_form, model_form
from qlora_cli.benchmarking.hub_adapter import fetch_adapter
from qlora_cli.benchmarking.looking import Looked, look_at
from qlora_cli.benchmarking.suitable import check_answers
from qlora_cli.data.templates import adopt_template
from qlora_cli.errors import HubUnreachableError, ModelError, QloraError
from qlora_cli.merging.adapters.source import AdapterSource, adapter_sha256, find_adapter
from qlora_cli.merging.fidelity.trained import adapter_off, trained_model
from qlora_cli.merging.folder.tokenizer_files import has_conversations, tokenizer_files
from qlora_cli.model.base import load_base
from qlora_cli.model.files import CONFIG_FILE, read_config
from qlora_cli.model.source import ModelSource, load_adapter_tokenizer, load_config, load_tokenizer
from qlora_cli.model.storage import StorageForm, compute_dtype, describe_storage
from qlora_cli.recipe.data_files import shown_path
from qlora_cli.recipe.schema import DatasetSection


@dataclass(frozen=True)
class Target:
    """A model that can be scored; no weights are read before `load`.

    Attributes:
        name: as it is shown: a path, `PATH, step N`, or a hub name.
        kind: what was found.
        base: the whole model: the target itself, or what its adapter lies over.
        form: how the base's weights are held for this evaluation.
        adapter: the adapter and what is known of its training, if it is one.
        remarks: whole sentences on what was taken.
    """

    name: str
    kind: Literal["run", "checkpoint", "adapter", "model folder", "hub model", "hub adapter"]
    base: ModelSource
    form: StorageForm
    adapter: AdapterSource | None = None
    remarks: tuple[str, ...] = ()

    @property
    def storage(self) -> str:
        """How the base's weights are held, in words, such as `NF4, double quantisation, bfloat16 compute`."""
        return describe_storage(self.form)

    @property
    def called(self) -> str:
        """A hub name, or what the folder itself is called, which `.` does not tell; of a checkpoint, its run's."""
        if self.kind.startswith("hub"):
            return self.name
        if self.adapter is None:
            return Path(self.base.name).name
        run = self.adapter.run
        return (self.adapter.folder if run is None else run.path).resolve().name

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether a tokenizer lies with the adapter, or its run's: one that has the template of the run's rows."""
        return self._tokenizer_folder() is not None

    @cached_property
    def adapter_sha256(self) -> str | None:
        """Of the adapter's weights file, in hex; None of a whole model."""
        return None if self.adapter is None else adapter_sha256(self.adapter.folder)

    def config(self) -> PreTrainedConfig:
        """The base's configuration; raises what `load_config` raises."""
        return load_config(self.base)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The adapter's own tokenizer if it or its run has one; else the base's, with the run's chat template.

        Raises:
            ModelError, DataError: if it or the run's template cannot be read.
            HubUnreachableError: if it is on the hub and that gives no answer.
        """
        beside = self._tokenizer_folder()
        if beside is not None:
            return load_adapter_tokenizer(beside, trust_remote_code=self.base.trust_remote_code)
        tokenizer = load_tokenizer(self.base)
        if self.adapter is not None and self.adapter.recipe is not None:
            _adopt(tokenizer, self.adapter.recipe.dataset)
        return tokenizer

    def load(self, device: torch.device) -> PreTrainedModel:
        """The model on `device`, frozen, in eval mode, with the adapter beside the base's weights.

        Raises:
            ModelError: if the base or the adapter cannot be read, or they do not fit each other.
            HubUnreachableError: if the base is on the hub and that gives no answer.
        """
        if self.adapter is None:
            return load_base(self.base, self.form, device).eval()
        return trained_model(self.adapter, device, self.form)

    @contextmanager
    def without_adapter(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, a model that `load` gave answers as its base.

        Raises:
            ModelError: if there is no adapter to take away.
        """
        if self.adapter is None:
            raise ModelError(f"{self.name} is a whole model: there is no base without an adapter to set beside it")
        with adapter_off(model):
            yield

    def fingerprint(self, device: torch.device, *, with_adapter: bool = True) -> str:
        """A hash, in hex, that is another one where an answer to the same tokens may be another one.

        Of the base, what a change of its files shows in: a hub's commit, or names, sizes and times in a folder.

        Args:
            device: where the model answers.
            with_adapter: whether the adapter answers along; False is the baseline.

        Raises:
            ModelError: if files are not there any more.
        """
        form = self.form
        beside = None if self.adapter is None else self._tokenizer_folder()
        return fingerprint(
            base=base_facts(self.base),
            adapter=adapter_facts(self.adapter.folder) if self.adapter is not None and with_adapter else None,
            # The baseline's products are the adapter's layers', which round in another place than plain ones.
            layers="plain" if self.adapter is None else "adapted",
            form=[form.bits, form.quant_type, form.double_quant, str(compute_dtype(form)), describe_storage(form)],
            vocabulary=vocabulary_facts(self.base, beside),
            **machine_facts(device),
        )

    def facts(self) -> dict[str, Any]:
        """What a results file says of it: plain values for JSON, no folder that tells whose machine it was."""
        base = Path(self.base.name)
        step = None if self.adapter is None else self.adapter.step
        return {
            "target": self.called if step is None else f"{self.called}, step {step}",
            "kind": self.kind,
            "base_model": base.name if base.is_absolute() else self.base.name,
            "base_revision": self.base.revision,
            "storage": self.storage,
            "compute_dtype": self.form.compute_dtype,
            "step": step,
            "adapter_sha256": self.adapter_sha256,
        }

    def _tokenizer_folder(self) -> Path | None:
        """Where the adapter's own tokenizer lies: beside it, or, of a checkpoint, beside its run's adapter."""
        if self.adapter is None:
            return None
        run = self.adapter.run
        folders = [self.adapter.folder, *([] if run is None else [run.adapter])]
        return next((folder for folder in folders if tokenizer_files(folder)), None)


def find_target(
    target: str,
    *,
    bits: Bits | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    trained_base: str | None = None,
    trust_remote_code: bool = False,
) -> Target:
    """What `target` means: a run folder, a checkpoint, a PEFT adapter, a model folder, or either on the hub.

    It is told apart by looking. No weights are read; of the hub, a `config.json` is fetched, or an adapter.

    Args:
        bits: how the base is held; None is as it was in training, or, of a whole model, as it is. 4 is NF4 with double
            quantisation unless it was trained in another 4-bit form; 8 is LLM.int8(); 16 is unquantised.
        base_model: where an adapter's base is, if not where the adapter says.
        revision: of a model or an adapter on the hub, or of a local adapter's base on the hub.
        trained_base: one of `TRAINED_BASES`, where nothing tells how an adapter's base was stored.
        trust_remote_code: whether code that comes with the model may run; a run's recipe may allow it as well.

    Raises:
        ModelError: if there is nothing that could be scored, or no causal language model, or what is said contradicts
            what is known.
        RecipeError: if a run's recipe cannot be read.
        HubUnreachableError: if something is on the hub and that gives no answer.
    """
    looked = look_at(target)
    if looked.kind == "adapter":
        return _of_adapter(
            Path(looked.name), bits, base_model, revision, trained_base, trust_remote_code=trust_remote_code
        )
    if looked.kind == "hub" and (folder := fetch_adapter(looked.name, revision)) is not None:
        found = _of_adapter(folder, bits, base_model, None, trained_base, trust_remote_code=trust_remote_code)
        return replace(found, name=looked.name, kind="hub adapter")
    given = {"--base-model": base_model, "--trained-base": trained_base}
    if said := [name for name, value in given.items() if value is not None]:
        raise ModelError(f"{', '.join(said)}: for adapters, and {target} is a whole model: leave it out")
    if looked.kind == "model" and revision is not None:
        raise ModelError(f"--revision: for models of the hub, and {target} is a local folder: leave it out")
    return _of_model(looked, bits, ModelSource(looked.name, revision, trust_remote_code, "TARGET"))


def _of_model(looked: Looked, bits: Bits | None, source: ModelSource) -> Target:
    try:
        stored = read_config(source)
        check_answers(load_config(source), source)
    except (ModelError, HubUnreachableError) as error:
        raise type(error)(f"{str(error).rstrip('.')}{looked.meant}") from None
    if looked.kind == "model" and next(Path(source.name).glob("*.safetensors"), None) is None:
        raise ModelError(f"TARGET: {source.name} holds no weights: no *.safetensors beside its {CONFIG_FILE}")
    form, remarks = model_form(stored, bits, source)
    if source.trust_remote_code and stored.get("auto_map"):
        remarks += ("the model's own code may run here: --trust-remote-code allows it",)
    if looked.kind == "hub":
        name = source.name if source.revision is None else f"{source.name}, revision {source.revision}"
        return Target(name, "hub model", source, form, remarks=remarks)
    return Target(shown_path(Path(source.name)), "model folder", source, form, remarks=remarks)


def _of_adapter(
    path: Path,
    bits: Bits | None,
    base_model: str | None,
    revision: str | None,
    trained_base: str | None,
    *,
    trust_remote_code: bool,
) -> Target:
    adapter = find_adapter(path, base_model=base_model, revision=revision, trained_base=trained_base)
    if trust_remote_code and not adapter.base.trust_remote_code:
        remark = "the base model's own code may run here: --trust-remote-code allows it"
        base = replace(adapter.base, trust_remote_code=True)
        adapter = replace(adapter, base=base, remarks=(*adapter.remarks, remark))
    check_answers(load_config(adapter.base), adapter.base, adapter.folder)
    form, remarks = adapter_form(adapter, bits)
    shown = shown_path(adapter.folder if adapter.run is None else adapter.run.path)
    kind: Literal["run", "checkpoint", "adapter"] = "adapter" if adapter.run is None else "run"
    if adapter.step is not None:
        kind, shown = "checkpoint", f"{shown}, step {adapter.step}"
    return Target(shown, kind, adapter.base, form, adapter, (*adapter.remarks, *remarks))


def _adopt(tokenizer: PreTrainedTokenizerBase, section: DatasetSection) -> None:
    """Give the base's tokenizer the template that the run's rows were rendered with."""
    conversations = False
    if section.chat_template is None and not tokenizer.chat_template:
        try:
            conversations = has_conversations(section)
        except QloraError:
            return  # rows that are gone: nothing tells that they were conversations
    adopt_template(tokenizer, section.chat_template, conversations=conversations)
