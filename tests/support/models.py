"""Tiny random models of every architecture family, built from configs; seconds to train, no download."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)

from tests.support.tokenizers import tiny_tokenizer

# Widths are multiples of 64, the NF4 block size, so that a row never shares a block with the next.
_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_POSITIONS = {"max_position_embeddings": 256}

FAMILIES = ("llama", "gpt2", "gpt_neox", "qwen2", "mistral", "gemma", "opt")

# Families that are no causal language models, by the task (PEFT's name) that their tiny models are made for.
TASK_TYPES = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
_CLASSES = {"SEQ_CLS": AutoModelForSequenceClassification, "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM}


def tiny_config(family: str, vocab_size: int) -> PreTrainedConfig:
    """A two-layer, 64-wide configuration of the family."""
    grouped = {"num_key_value_heads": 2}
    match family:
        case "llama":
            return LlamaConfig(vocab_size=vocab_size, **_SHAPE, **_POSITIONS, **grouped)
        case "mistral":
            return MistralConfig(vocab_size=vocab_size, **_SHAPE, **_POSITIONS, **grouped, sliding_window=None)
        case "qwen2":
            return Qwen2Config(vocab_size=vocab_size, **_SHAPE, **_POSITIONS, **grouped)
        case "gemma":
            return GemmaConfig(vocab_size=vocab_size, **_SHAPE, **_POSITIONS, num_key_value_heads=1, head_dim=16)
        case "gpt_neox":
            return GPTNeoXConfig(vocab_size=vocab_size, **_SHAPE, **_POSITIONS)
        case "gpt2":
            return GPT2Config(vocab_size=vocab_size, n_embd=64, n_layer=2, n_head=4, n_positions=256)
        case "opt":
            return OPTConfig(
                vocab_size=vocab_size,
                hidden_size=64,
                ffn_dim=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=64,
                **_POSITIONS,
            )
        case "bert":
            return BertConfig(vocab_size=vocab_size, **_SHAPE, **_POSITIONS, num_labels=3)
        case "roberta":
            return RobertaConfig(vocab_size=vocab_size, **_SHAPE, **_POSITIONS, type_vocab_size=1, num_labels=3)
        case "t5":
            return T5Config(
                vocab_size=vocab_size,
                d_model=64,
                d_kv=16,
                d_ff=128,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        case _:
            raise ValueError(family)


def tiny_model(family: str, *, vocab_size: int = 512, seed: int = 0) -> PreTrainedModel:
    """A randomly initialised float32 model in eval mode; the same seed gives the same weights."""
    made = _CLASSES.get(TASK_TYPES.get(family, ""), AutoModelForCausalLM)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return made.from_config(tiny_config(family, vocab_size), dtype=torch.float32).eval()


def save_tiny_model(
    folder: Path, family: str = "llama", *, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0
) -> Path:
    """A model folder with safetensors, config and tokenizer, as a hub snapshot would be."""
    tokenizer = tokenizer or tiny_tokenizer()
    model = tiny_model(family, vocab_size=len(tokenizer), seed=seed)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = None
    if model.can_generate():
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
