"""Which rows a merge is checked on: the run's own, an even sample, or shipped prompts and the reason why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from qlora_cli.merging.adapters.source import AdapterSource
from qlora_cli.merging.fidelity.held_out import CheckRows, check_rows
from qlora_cli.merging.fidelity.prompts import PROMPTS, encode_prompts
from qlora_cli.model.source import ModelSource, load_tokenizer
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training.preparation import prepare
from qlora_cli.training.run_folder import RunFolder
from tests.support.encoded import DAY
from tests.support.runs import tiny_recipe
from tests.support.tokenizers import CHATML, tiny_tokenizer


def _source(recipe: Recipe, folder: Path) -> AdapterSource:
    """As a finished run would leave it, as far as rows go."""
    run = RunFolder(folder / "run")
    run.create()
    base = ModelSource(recipe.base_model)
    _, validation = _prepared(recipe)
    data = {} if validation is None else {"validation": {"fingerprint": validation.kept.fingerprint}}
    run.record.write_text(json.dumps({"started_at": f"{DAY}T10:00:00+00:00", "data": data}), encoding="utf-8")
    return AdapterSource(run.adapter, base, recipe.quantization, "the run's recipe", run, recipe)


def _prepared(recipe: Recipe) -> Any:
    base = ModelSource(recipe.base_model)
    config = AutoConfig.from_pretrained(recipe.base_model)
    return prepare(recipe.dataset, load_tokenizer(base), config, seed=recipe.training.seed, today=DAY)


def _rows(source: AdapterSource, limit: int = 100) -> CheckRows:
    config: PreTrainedConfig = AutoConfig.from_pretrained(source.base.name)
    return check_rows(source, load_tokenizer(source.base), config, limit)


def _as_sets(rows: CheckRows) -> set[tuple[tuple[int, ...], tuple[bool, ...]]]:
    return {(tuple(row.ids.tolist()), tuple(row.learned.tolist())) for row in rows.rows}


@pytest.mark.parametrize("held_out", ["file", "fraction"])
def test_they_are_the_rows_that_training_evaluated_on(held_out: str, tmp_path: Path) -> None:
    """Token for token, with what is learned of them, whether held out by a file or by a share of the training rows."""
    changes: dict[str, Any] = {"validation_rows": 6}
    if held_out == "fraction":
        changes = {"validation_rows": 0, "dataset": {"validation_fraction": 0.25}}
    recipe = tiny_recipe(tmp_path, **changes)
    kept = _prepared(recipe)[1].kept
    found = _rows(_source(recipe, tmp_path))
    expected = {(tuple(kept.read(i)[0].tolist()), tuple(kept.read(i)[1].tolist())) for i in range(len(kept))}
    assert _as_sets(found) == expected
    assert (found.origin, found.held_out) == (f"{len(kept)} validation rows of the run", True)
    assert found.tokens == kept.supervised_tokens
    assert found.rows[0].ids.dtype == torch.int64


def test_a_sample_is_even_and_always_the_same(tmp_path: Path) -> None:
    """Of 40 rows 8: one of every five, in no order, the same for the same seed."""
    source = _source(tiny_recipe(tmp_path, validation_rows=40), tmp_path)
    everything, some = _rows(source), _rows(source, 8)
    assert some.origin == "8 of 40 validation rows of the run"
    assert len(some.rows) == 8
    assert _as_sets(some) <= _as_sets(everything)
    assert [row.ids.tolist() for row in _rows(source, 8).rows] == [row.ids.tolist() for row in some.rows]


def test_rows_that_changed_are_told(tmp_path: Path) -> None:
    """The validation file says other things than when the run read it: used, and said."""
    recipe = tiny_recipe(tmp_path)
    source = _source(recipe, tmp_path)
    file = Path(str(recipe.dataset.validation))
    file.write_text(file.read_text().replace("sky", "sea"), encoding="utf-8")
    assert _rows(source).origin == "8 validation rows of the run, which have changed since it trained"


def test_rows_that_are_gone_are_made_up_for(tmp_path: Path) -> None:
    """Shipped prompts take the place of a validation file that is no longer there, and the reason is told."""
    recipe = tiny_recipe(tmp_path)
    source = _source(recipe, tmp_path)
    Path(str(recipe.dataset.validation)).unlink()
    found = _rows(source)
    assert found.origin.startswith(f"{len(PROMPTS)} shipped prompts, as the run's validation rows cannot be had: ")
    assert "validation.jsonl" in found.origin
    assert not found.held_out
    assert len(found.rows) == len(PROMPTS)


def test_without_a_run_or_validation_rows_prompts_are_used(tmp_path: Path) -> None:
    """An adapter from elsewhere, and a run without held-out rows."""
    recipe = tiny_recipe(tmp_path, validation_rows=0)
    source = _source(recipe, tmp_path)
    assert _rows(source, 5).origin == "5 shipped prompts, as the run has no validation rows"
    bare = AdapterSource(source.folder, source.base, source.quantization, "nobody")
    assert _rows(bare).origin == "24 shipped prompts, as the adapter is of no run with held-out rows"


@pytest.mark.parametrize("template", [CHATML, None, "{{ raise_exception('no') }}"], ids=["chat", "none", "refuses"])
def test_prompts_are_written_as_the_model_knows_them(template: str | None) -> None:
    """With the chat template if there is one that takes them, else as plain text with its end of sequence."""
    tokenizer = tiny_tokenizer(template)
    ids = encode_prompts(tokenizer, DAY)
    text = tokenizer.decode(ids[5])
    question, answer = PROMPTS[5]
    if template == CHATML:
        expected = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    else:
        expected = f"{question}\n{answer}<|im_end|>"
    assert text == expected
    assert len(ids) == len(PROMPTS) == 24


def test_prompts_count_but_for_their_first_token(tmp_path: Path) -> None:
    """Nothing comes before the first token to predict it; all of the others are looked at."""
    recipe = tiny_recipe(tmp_path, validation_rows=0)
    found = _rows(_source(recipe, tmp_path))
    assert all(row.learned.tolist() == [False] + [True] * (len(row.ids) - 1) for row in found.rows)
