"""A byte-level BPE tokenizer small enough to train in milliseconds, and chat templates to put on it."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Neither a header before the answer nor a marker after it.
PLAIN = (
    "{% for message in messages %}"
    "{{ ('Q: ' + message['content'] + '\nA: ') if message['role'] == 'user' else (message['content'] + '\n') }}"
    "{% endfor %}"
)

PAD, START, END, BOS = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|bos|>"

_SPECIAL = (PAD, START, END, BOS)  # ids 0 to 3, whatever the corpus
_VOCAB_SIZE = 384
_CORPUS = (
    "user assistant system What is the answer to this question? The answer is four.",
    "A number plus a number is another number, and the sum of 12 and 30 is 42.",
    "How many apples does the farmer have in the end? He has three apples in the basket.",
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "the of and to in is that it for was on are with as they at be this have from or one had by",
)


@functools.lru_cache(maxsize=8)
def _trained(corpus: tuple[str, ...], vocab_size: int) -> str:
    """The trained backend as JSON, so that callers get objects of their own to change."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # One repetition would leave ties between pairs seen once, and most merges unlearned.
    backend.train_from_iterator([line for line in corpus for _ in range(4)], trainer)
    return json.dumps(json.loads(backend.to_str()))


def tiny_tokenizer(
    chat_template: str | None = CHATML,
    *,
    pad_is_eos: bool = False,
    add_bos: bool = False,
    extra_special: Sequence[str] = (),
    corpus: Sequence[str] | None = None,
) -> PreTrainedTokenizerFast:
    """A fresh fast tokenizer of at most 384 tokens (plus `extra_special`), the same on every call.

    Ids 0 to 3 are ``<|pad|>``, ``<|im_start|>``, ``<|im_end|>`` (eos) and ``<|bos|>``. With `add_bos`, plain
    text is opened with bos when special tokens are added, as Llama's tokenizers do. `chat_template=None`
    leaves it without a template. Every text can be encoded and decoded back exactly.
    """
    backend = Tokenizer.from_str(_trained(tuple(corpus or _CORPUS), _VOCAB_SIZE))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in extra_special])
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=END,
        pad_token=END if pad_is_eos else PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer
