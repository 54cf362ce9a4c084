"""A tiny random model, its tokenizer, and rows to train it on: made here, in no time, out of nothing."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_PAD, _START, _END = "<|pad|>", "<|im_start|>", "<|im_end|>"
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SEED = 20_230_514


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and a chat template: any text can be encoded, and nothing has to be trained."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (_PAD, _START, _END)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=_PAD, eos_token=_END, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def save_model(folder: Path) -> None:
    """Write a Llama of two layers, 64 wide, with random weights, and its tokenizer, as a hub snapshot would be.

    The weights are the same on every machine, and the state of the random numbers stays as it is.
    """
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        # Multiples of 64, so that a row is a whole number of 4-bit blocks: bitsandbytes misreads others on some CPUs,
        # which is refused with a message of its own.
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(file: Path, count: int) -> None:
    """Write `count` rows of prompt and completion as JSON lines, no two completions beside each other equally long."""
    rows = [
        {"prompt": "How many is " + " and ".join(["one"] * (1 + i % 3)) + f", {i} times?", "completion": "one " * i}
        for i in (1 + (3 * number) % 7 for number in range(count))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
