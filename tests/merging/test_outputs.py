"""What a model of any task says about a row, in one form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from qlora_cli.errors import ModelError
from qlora_cli.merging.fidelity.held_out import CheckRow
from qlora_cli.merging.fidelity.measures import compare, record
from qlora_cli.merging.fidelity.outputs import block_paths, outputs
from tests.support.models import tiny_config, tiny_model

ROW = CheckRow(torch.arange(5, 29), torch.arange(24) >= 6)


def test_blocks_are_found() -> None:
    """The blocks of every kind of model, outermost lists only: none of the parts inside a block."""
    assert block_paths(tiny_model("llama")) == ["model.layers.0", "model.layers.1"]
    assert block_paths(tiny_model("gpt2")) == ["transformer.h.0", "transformer.h.1"]
    assert block_paths(tiny_model("t5")) == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "roberta", "t5"])
def test_language_models_are_scored_where_tokens_count(family: str) -> None:
    """18 of 24 tokens count: so many scores and targets, and states of the blocks that made the scores."""
    model = tiny_model(family) if family != "roberta" else _made("roberta", AutoModelForMaskedLM)
    said = outputs(model, ROW)
    if family == "roberta":  # sees both sides of a token: there is nothing to predict
        assert (tuple(said.scores.shape), said.targets) == ((24, 512), None)
        return
    assert tuple(said.scores.shape) == (18, 512)
    assert said.targets is not None
    assert said.targets.tolist() == list(range(11, 29))
    expected = [18, 18] if family != "t5" else [6, 6, 18, 18]
    assert [len(hidden) for hidden in said.blocks.values()] == expected


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize(
    ("made", "shape"),
    [
        (AutoModelForSequenceClassification, (1, 2)),
        (AutoModelForTokenClassification, (24, 2)),
        (AutoModelForQuestionAnswering, (2, 24)),
        (AutoModel, (24, 64)),
    ],
    ids=["row", "tokens", "span", "states"],
)
def test_other_tasks_are_scored(family: str, made: Any, shape: tuple[int, int]) -> None:
    """Classes of the row, of each token, where a span begins and ends, plain states: compared with themselves, none of
    them is off, and nothing is told of a loss."""
    model = _made(family, made)
    said = outputs(model, ROW)
    assert (tuple(said.scores.shape), said.targets, said.are_logits) == (shape, None, made is not AutoModel)
    assert [len(hidden) for hidden in said.blocks.values()] == [24, 24]
    found = compare(record(model, [ROW, ROW]), model, [ROW, ROW])
    assert (found.mean_kl, found.worst_layer_error, found.loss) == (0, 0, None)
    assert (found.measure, found.top1_agreement) == (("squared_distance", None) if made is AutoModel else ("kl", 1))


@pytest.mark.parametrize(("labels", "problem"), [(1, None), (1, "regression"), (3, "multi_label_classification")])
def test_numbers_that_are_no_choice_are_compared_as_such(labels: int, problem: str | None) -> None:
    """A reward, a regression, labels of which several may hold: as probabilities they would hide what differs, and all
    of it where there is one alone."""
    config = tiny_config("llama", 512)
    config.num_labels, config.problem_type = labels, problem
    one, other = (AutoModelForSequenceClassification.from_config(config).eval() for _ in range(2))
    assert not outputs(one, ROW).are_logits
    found = compare(record(one, [ROW]), other, [ROW])
    assert (found.measure, found.top1_agreement) == ("squared_distance", None)
    assert found.mean_kl > 0


def test_an_encoder_decoder_without_a_head_reads_its_own_input() -> None:
    """T5 for features: states of the decoder."""
    assert tuple(outputs(_made("t5", AutoModel), ROW).scores.shape) == (24, 64)


def test_a_model_that_reads_no_text_is_told() -> None:
    """T5's classifier wants an end of sequence in its input: told in its own words, with the way out."""
    model = _made("t5", AutoModelForSequenceClassification)
    with pytest.raises(ModelError, match=r"cannot be compared on rows of text: .* Merge it with --no-verify"):
        outputs(model, ROW)


def _made(family: str, made: Any) -> Any:
    config = tiny_config(family, 512)
    config.num_labels = 2
    if made is AutoModelForQuestionAnswering:
        config.type_vocab_size = 2
    return made.from_config(config).eval()
