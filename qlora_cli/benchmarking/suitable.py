"""Which models can be asked what comes next: what cannot is refused by name, before weights are read."""

from __future__ import annotations

from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from qlora_cli.errors import ModelError
from qlora_cli.merging.adapters.source import read_adapter_json
from qlora_cli.model.source import ModelSource

# Ends of the names of classes that do not predict the next token, and what they are.
_OTHERS = {
    "ForSequenceClassification": "a classifier of texts",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a finder of answers within a text",
    "ForMultipleChoice": "a chooser between texts",
    "ForMaskedLM": "a model that fills gaps",
    "ForPreTraining": "a model that fills gaps",
    "ForNextSentencePrediction": "a judge of sentences",
    "ForImageClassification": "a classifier of images",
    "ForCTC": "a reader of speech",
}
# PEFT's task types of adapters that answer otherwise.
_TASKS = {
    "SEQ_CLS": "to classify texts",
    "TOKEN_CLS": "to classify tokens",
    "SEQ_2_SEQ_LM": "for an encoder-decoder",
    "QUESTION_ANS": "to find answers within a text",
    "FEATURE_EXTRACTION": "to embed texts",
}
_ONLY = "only causal language models can be scored yet"


def check_answers(config: PreTrainedConfig, base: ModelSource, adapter: Path | None = None) -> None:
    """Refuse what is no causal language model.

    Args:
        config: the base's.
        adapter: the folder of the adapter over it.

    Raises:
        ModelError: naming what it is.
    """
    if adapter is not None and (task := read_adapter_json(adapter).get("task_type")) in _TASKS:
        raise ModelError(f"{adapter}: the adapter was trained {_TASKS[task]} (task_type {task}); {_ONLY}")
    architecture = next(iter(config.architectures or ()), "")
    named = f"{base.name} ({architecture or config.model_type})"
    if config.is_encoder_decoder:
        raise ModelError(f"{named} is an encoder-decoder; {_ONLY}")
    # An adapter may bring the head; what it is trained for is looked at above.
    other = next((what for end, what in _OTHERS.items() if architecture.endswith(end)), None)
    if other is not None and adapter is None:
        raise ModelError(f"{named} is {other}; {_ONLY}")
    remote = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in remote:
        raise ModelError(f"{named}: transformers has no causal language model of this kind; {_ONLY}")
