"""What a model says about one row, whatever its task: scores at the positions that count, and what its blocks give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from qlora_cli.data.batches import Batch
from qlora_cli.data.encoded import IGNORED
from qlora_cli.errors import ModelError
from qlora_cli.merging.fidelity.held_out import CheckRow
from qlora_cli.training.loss import supervised_logits


class Outputs(NamedTuple):
    """What a model says about one row.

    Attributes:
        scores: [positions, classes], in the model's dtype: logits, or the last hidden states of a model without a head,
            or numbers that are no choice between classes.
        targets: int64 [positions], what should be said there; None where the rows do not tell.
        blocks: by module path, what each block of the model gives, [positions, width].
        are_logits: whether `scores` are logits of classes that exclude each other.
    """

    scores: Tensor
    targets: Tensor | None
    blocks: dict[str, Tensor]
    are_logits: bool = True


def outputs(model: PreTrainedModel, row: CheckRow, *, with_blocks: bool = True) -> Outputs:
    """Run the model on one row.

    A causal language model is scored where the next token counts. An encoder-decoder is given the tokens that do not
    count and scored on those that do (on all of them after themselves, where all count). Anything else has no targets:
    classes of the row or of each token, the start and the end of a span, or hidden states.

    Raises:
        ModelError: if the model does not read rows of text.
    """
    try:
        return _outputs(model, row, with_blocks=with_blocks)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be compared on rows of text: {error}. Merge it with --no-verify, and look "
            "at the result yourself"
        ) from error


@torch.no_grad()
def _outputs(model: PreTrainedModel, row: CheckRow, *, with_blocks: bool) -> Outputs:
    device = _device_of(model)
    ids = row.ids.to(device)[None]
    found: dict[str, Tensor] = {}
    with _listening(model, found if with_blocks else None):
        if model.config.is_encoder_decoder and model.get_output_embeddings() is not None:
            scores, targets = _sequence_to_sequence(model, row, device)
            return Outputs(scores, targets, _tokens_of(found))
        if _predicts_the_next(model):
            scores, targets = supervised_logits(model, _batch(row, device))
            before = F.pad(row.learned[1:], (0, 1)).to(device)
            return Outputs(scores, targets, _tokens_of(found, before))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder and model.base_model is model:
            inputs["decoder_input_ids"] = ids
        answer = model(**inputs)
    if (start := getattr(answer, "start_logits", None)) is not None:
        return Outputs(torch.cat([start, answer.end_logits]), None, _tokens_of(found))
    if (logits := getattr(answer, "logits", None)) is not None:
        scores = logits.reshape(-1, logits.shape[-1])
        return Outputs(scores, None, _tokens_of(found), are_logits=_excludes(model, scores.shape[-1]))
    return Outputs(answer.last_hidden_state[0], None, _tokens_of(found), are_logits=False)


def _predicts_the_next(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings() is not None and "MaskedLM" not in type(model).__name__


def _excludes(model: PreTrainedModel, labels: int) -> bool:
    """Whether a classifier's labels exclude each other: not those of a regression or a reward, or where many hold."""
    problem = getattr(model.config, "problem_type", None)
    return labels > 1 and problem not in ("regression", "multi_label_classification")


def _device_of(model: PreTrainedModel) -> torch.device:
    """Where rows are put; a model whose weights stay in files until they are needed takes them from anywhere."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def _batch(row: CheckRow, device: torch.device) -> Batch:
    ids = row.ids.to(device)[None]
    labels = torch.where(row.learned, row.ids, IGNORED).to(device)[None]
    number = int(row.learned[1:].sum())
    return Batch(ids, torch.ones_like(ids), labels, rows=[0], tokens=ids.numel(), supervised_tokens=number)


def _sequence_to_sequence(model: Any, row: CheckRow, device: torch.device) -> tuple[Tensor, Tensor]:
    given = row.ids[~row.learned] if (~row.learned[1:]).any() else row.ids
    targets = row.ids[row.learned].to(device)
    inputs = given.to(device)[None]
    logits = model(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels=targets[None]),
        use_cache=False,
    ).logits
    return logits[0], targets


def block_paths(model: nn.Module) -> list[str]:
    """Paths of the model's blocks: the members of its outermost lists of modules, in the model's order."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    return [f"{path}.{name}" for path in outer for name, _ in model.get_submodule(path).named_children()]


@contextmanager
def _listening(model: nn.Module, found: dict[str, Tensor] | None) -> Iterator[None]:
    """Put what each block gives into `found`, while inside."""

    def keep(path: str, given: Any) -> None:
        hidden = given[0] if isinstance(given, tuple | list) and given else given
        if found is not None and isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.is_floating_point():
            found[path] = hidden.detach()

    handles = []
    for path in [] if found is None else block_paths(model):
        module = model.get_submodule(path)
        handles.append(module.register_forward_hook(lambda _, __, given, path=path: keep(path, given)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tokens_of(found: dict[str, Tensor], chosen: Tensor | None = None) -> dict[str, Tensor]:
    """[1, seq, width] of each block to [positions, width]: those that are chosen, or all."""
    flat = {path: hidden.flatten(0, 1) for path, hidden in found.items()}
    if chosen is None:
        return flat
    # A model that memory does not hold whole may compute in several places.
    return {
        path: hidden[chosen.to(hidden.device)] if len(hidden) == len(chosen) else hidden
        for path, hidden in flat.items()
    }
