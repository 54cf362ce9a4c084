"""Going on when memory runs out, with less of it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from transformers import PreTrainedModel

from qlora_cli.errors import EvaluationError, QloraError
from qlora_cli.evaluation.answering.sizes import size

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

# Fewer tokens than these in a forward pass free nothing worth the time.
_FEWEST = 16

# Tokens in a forward pass. What shares it looks at the keys of all and masks most of them, so that attention costs more
# the more there are: on a CPU, SmolLM2-135M in bfloat16 computes 593, 700, 645, 551 and 436 nodes of 5-shot MMLU per
# second with 128, 256, 512, 1024 and 2048; without shots 869, 919 and 810 with the first three.
_ON_CPU = 256
_MOST = 4096
_LEAST = 256

# Of configurations that do not tell: a model of some size.
_USUAL_WIDTH = 4096
_USUAL_LAYERS = 32
_USUAL_VOCABULARY = 1 << 17

# The share of what is free that a forward pass is planned to take: it takes more than is counted here.
_SHARE = 0.25


def within_memory(
    compute: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
) -> _Result | None:
    """What `compute` gives; None if there was not memory enough, which is free again then."""
    try:
        return compute(*args, **kwargs)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    # Outside the handler: the traceback kept alive what the computation had made.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def ran_out(error: BaseException) -> bool:
    """Whether this is a lack of memory, whosever words it is in."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, QloraError):
        return False  # a message of ours that tells of it is not it
    # CPU allocators raise a plain RuntimeError; drivers, cuBLAS and cuDNN have words of their own.
    text = str(error)
    return any(part in text for part in ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED"))


class Budget:
    """How many tokens one forward pass may compute; half as many each time that memory runs out.

    Attributes:
        tokens: now.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._fewest = min(tokens, _FEWEST)

    def halve(self, tokens: int) -> None:
        """Go on with half of the tokens that were too many.

        Raises:
            ExhaustedError: if that is too few to go on with.
        """
        half = min(self.tokens, tokens) // 2
        if half < self._fewest:
            raise exhausted(tokens)
        self.tokens = half


class ExhaustedError(EvaluationError):
    """Memory does not suffice for a forward pass that cannot be cut further."""


def exhausted(tokens: int) -> ExhaustedError:
    """Memory does not suffice for so many tokens, and they cannot be cut further."""
    return ExhaustedError(
        f"memory ran out in a forward pass of {counted(tokens, 'token')}, which cannot be cut further. Free memory, "
        "evaluate with --bits 4, or on a machine with more of it; answers that were given are kept"
    )


def counted(number: int, thing: str) -> str:
    """1 token, 1,024 tokens."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def planned_tokens(model: PreTrainedModel) -> int:
    """How many tokens a forward pass is planned with, by the model's device, its shape and the memory that is free."""
    device = model.get_input_embeddings().weight.device
    if device.type != "cuda":
        return _ON_CPU
    config = model.config.get_text_config(decoder=True)
    width = size(config, "hidden_size", _USUAL_WIDTH)
    inner = size(config, "intermediate_size", 4 * width)
    # The residual stream and its copies, a block's inside, keys and values of all layers, and the mask's row.
    each = 4 * (8 * width + 4 * inner) + 4 * width * size(config, "num_hidden_layers", _USUAL_LAYERS) + 4 * _MOST
    return max(_LEAST, min(_MOST, int(_SHARE * free_bytes(device) / each)))


def free_bytes(device: torch.device) -> int:
    """What can be taken of a GPU's memory: what nobody has, and what torch holds in reserve."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def planned_rows(model: PreTrainedModel) -> int:
    """How many rows of logits a forward pass is planned with: float32, as wide as the vocabulary."""
    device = model.get_input_embeddings().weight.device
    most = 1 << 30 if device.type == "cuda" else 1 << 28
    return max(1, most // (4 * size(model.config.get_text_config(decoder=True), "vocab_size", _USUAL_VOCABULARY)))
