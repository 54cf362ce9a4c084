"""Rows packed into one sequence: which attention keeps them apart in a given model, and the proof that it does.

Two ways are tried in turn, and each is put to the test on the model itself before the first step: variable-length
attention (`varlen.py`), and the block-diagonal mask that transformers makes where positions begin anew. A model whose
rows still see each other, because a recurrent state or a convolution runs on from row to row or because its attention
takes no heed of positions, cannot be trained on packs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from qlora_cli.errors import ModelError
from qlora_cli.model.varlen import VARLEN, register_varlen, run_lengths

VARIABLE_LENGTH = "variable-length attention"
BLOCK_DIAGONAL = "block-diagonal mask"

_SEE_EACH_OTHER = "rows in one pack would see each other"
_NOT_AS_ALONE = "a row in a pack would not be computed as it is alone"

# Tokens of the rows of the trial pack; the middle one is looked at, the last stands for padding.
_TRIAL = (7, 9, 6, 4)
# Mean over positions of |packed - alone| / |alone|, logits centred. SmolLM2-135M on a CPU shows 2e-6 in float32 and,
# in bfloat16, 0.06 of rounding; rows that see each other show 0.8, positions that are wrong 0.4.
_TOLERANCE = {torch.float32: 1e-3}
_HALF_TOLERANCE = 0.25


def prepare_packing(model: PreTrainedModel) -> str:
    """Give the model attention that keeps packed rows apart, and show on the model that it does.

    Weights, gradients, random state and training mode stay as they are. It costs a forward pass of 9 tokens, and for
    each way tried one of 26 tokens and its backward pass.

    Args:
        model: not wrapped for data parallelism; quantised or not, with LoRA layers or without, on its device.

    Returns:
        `VARIABLE_LENGTH` or `BLOCK_DIAGONAL`.

    Raises:
        ModelError: if the model cannot be trained on packs.
    """
    usual = model.config._attn_implementation
    if usual == VARLEN:  # prepared before
        usual = "sdpa"
        model.set_attn_implementation(usual)
    with _at_rest(model):
        trial = _Trial.of(model)
        if _can_vary(model):
            register_varlen()
            model.set_attn_implementation(VARLEN)
            if model.config._attn_implementation == VARLEN and _succeeds(trial, model):
                return VARIABLE_LENGTH
            model.set_attn_implementation(usual)
        fault = _SEE_EACH_OTHER if not _takes(model, "position_ids") else _fault_of_mask(trial, model)
    if fault is None and _cuts_into_chunks(model):
        fault = _NOT_AS_ALONE
    if fault is not None:
        raise ModelError(f"dataset.packing: {fault} in {type(model).__name__}; set packing: false")
    return BLOCK_DIAGONAL


@contextmanager
def without_packing(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model attends as it did before `prepare_packing`: to whole sequences, with padding or with a cache.

    Args:
        model: not wrapped for data parallelism; one that was never prepared stays as it is.
    """
    varies = model.config._attn_implementation == VARLEN
    if varies:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if varies:
            model.set_attn_implementation(VARLEN)


def packed_inputs(model: nn.Module, position_ids: Tensor) -> dict[str, Any]:
    """What `model` takes beside the tokens of packed rows, after `prepare_packing`; an attention mask it must not get.

    Args:
        model: wrapped for data parallelism or not.
        position_ids: int64 [batch, seq], 0 at the first token of every row, padding being a row of its own.
    """
    inner: Any = getattr(model, "module", model)  # DistributedDataParallel's
    if inner.config._attn_implementation != VARLEN:
        return {"position_ids": position_ids}
    return {"position_ids": position_ids, **run_lengths(position_ids)}


@dataclass(frozen=True, eq=False)
class _Trial:
    """A pack of random rows, and what the model as it came says of the one that is looked at.

    Attributes:
        tokens, position_ids: int64 [1, seq].
        row: bool [seq], true in the row looked at.
        alone: that row's logits with nothing around it, float32 [length, vocabulary].
        tolerance: how far the same row's logits in the pack may be from them.
    """

    tokens: Tensor
    position_ids: Tensor
    row: Tensor
    alone: Tensor
    tolerance: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Trial:
        weight = model.get_input_embeddings().weight
        # From the second quarter: special tokens stand at the ends.
        quarter = max(weight.shape[0] // 4, 1)
        drawn = torch.randint(quarter, 2 * quarter, (1, sum(_TRIAL)), generator=torch.Generator().manual_seed(0))
        tokens = drawn.to(weight.device)
        position_ids = torch.cat([torch.arange(length) for length in _TRIAL])[None].to(weight.device)
        row = torch.zeros(tokens.shape[1], dtype=torch.bool, device=weight.device)
        row[_TRIAL[0] : _TRIAL[0] + _TRIAL[1]] = True
        with torch.no_grad():
            given = tokens[:, row]
            logits = model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False).logits[0]
        tolerance = _TOLERANCE.get(logits.dtype, _HALF_TOLERANCE)
        return cls(tokens, position_ids, row, logits.float(), tolerance)

    def fault(self, model: PreTrainedModel) -> str | None:
        """Why the model as it is cannot be trained on packs; None if it can."""
        logits, influence = self._packed(model)
        # Exactly zero: what is kept out has no way into the row, and rounding cannot make one.
        if not torch.isfinite(influence).all() or influence[~self.row].any() or not influence[self.row].any():
            return _SEE_EACH_OTHER
        centred = self.alone - self.alone.mean(-1, keepdim=True)
        difference = (logits - self.alone).norm(dim=-1) / centred.norm(dim=-1)
        return None if difference.mean() <= self.tolerance else _NOT_AS_ALONE

    def _packed(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """The row's logits in the pack, float32 [length, vocabulary], and the gradient of a random sum of them with
        respect to every token's embedding, [seq, hidden]."""
        embedded: list[Tensor] = []

        def track(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[0].clone()  # models may change it in place, which a leaf does not allow

        hook = model.get_input_embeddings().register_forward_hook(track)
        try:
            with torch.enable_grad():
                inputs = packed_inputs(model, self.position_ids)
                logits = model(input_ids=self.tokens, use_cache=False, **inputs).logits[0, self.row].float()
                weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.device)
                (influence,) = torch.autograd.grad((logits * weights).sum(), embedded[:1], materialize_grads=True)
        finally:
            hook.remove()
        return logits.detach(), influence[0]


def _succeeds(trial: _Trial, model: PreTrainedModel) -> bool:
    """Whether variable-length attention does in this model; not being able to is no error, there is another way."""
    try:
        return trial.fault(model) is None
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it asks for more than this attention does, or passes nothing on to it
        return False


def _fault_of_mask(trial: _Trial, model: PreTrainedModel) -> str | None:
    """Why the model cannot be trained on packs under a mask; None if it can."""
    try:
        return trial.fault(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # remote code may do anything with positions and no mask
        return f"a trial pack fails with {type(error).__name__} ({error})"


def _can_vary(model: PreTrainedModel) -> bool:
    """Whether variable-length attention may be tried: what is not packed then goes through SDPA, so it must before."""
    usual = {part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)}
    return usual == {"sdpa"} and model.is_backend_compatible() and _takes(model, "cu_seq_lens_q")


def _takes(model: PreTrainedModel, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _cuts_into_chunks(model: PreTrainedModel) -> bool:
    """Whether attention goes by chunks, counted from where the pack begins: early 5.x of transformers count so."""
    chunked = getattr(model.config.get_text_config(), "attention_chunk_size", None) is not None
    return chunked and not hasattr(masking_utils, "packed_sequence_compatibility_function")


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards all is as before, random state included."""
    training = [module for module in model.modules() if module.training]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    model.eval()
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        for module in training:
            module.training = True
