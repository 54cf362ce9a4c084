"""Loss on rows of a dataset: training's own number, however rows fall into batches and whatever memory there is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from qlora_cli.benchmarking.dataset_loss import DatasetRows, DatasetScore, dataset_loss, read_dataset
from qlora_cli.benchmarking.dataset_section import dataset_section
from qlora_cli.benchmarking.target import Target, find_target
from qlora_cli.errors import DataError, EvaluationError
from qlora_cli.training.run import train
from tests.support.models import save_tiny_model
from tests.support.runs import tiny_recipe, write_rows

CPU = torch.device("cpu")


@pytest.fixture
def target(here: Path) -> Target:
    save_tiny_model(here / "llama")
    return find_target("llama")


def write(*rows: dict[str, Any], name: str = "rows.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def pairs(*lengths: int) -> str:
    """Rows whose answers have so many words."""
    return write(*({"prompt": "red", "completion": " ".join(["apple"] * length)} for length in lengths))


def rows_of(target: Target, file: str, *overrides: str, limit: int | float | None = None) -> DatasetRows:
    return read_dataset(target, dataset_section(file, target, overrides), target.tokenizer(), limit=limit)


def score(target: Target, file: str, *overrides: str, **options: Any) -> DatasetScore:
    return dataset_loss(target.load(CPU), rows_of(target, file, *overrides), **options)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("bits", [4, 16])
def test_it_is_the_loss_that_training_found(here: Path, bits: int, packing: bool) -> None:
    """On the run's validation rows, after training and, without the adapter, before it; perplexity and tokens too.
    Rows that training packed are scored one by one, and say the same."""
    recipe = tiny_recipe(here, quantization={"bits": bits}, dataset={"packing": packing})
    train(recipe)
    record = json.loads((here / "run/run.json").read_text())
    target = find_target("run")
    model, rows = target.load(CPU), rows_of(target, "validation.jsonl")
    assert rows.kept.fingerprint == record["data"]["validation"]["fingerprint"]
    after = dataset_loss(model, rows)
    assert after.loss == pytest.approx(record["last_eval"]["eval_loss"], abs=1e-6)
    assert after.perplexity == pytest.approx(record["last_eval"]["perplexity"], rel=1e-6)
    assert after.tokens == record["last_eval"]["supervised_tokens"]
    with target.without_adapter(model):
        before = dataset_loss(model, rows)
    assert before.loss == pytest.approx(record["first_eval"]["eval_loss"], abs=1e-6)
    found = after.against(before)
    assert found.difference == pytest.approx(after.loss - before.loss)
    assert found.high is not None
    assert found.high < 0
    assert (found.wins, found.n) == (8, 8)


def test_it_is_the_cross_entropy_of_each_row(target: Target) -> None:
    """Row by row through plain transformers: sums, tokens, loss, and bits per byte of what is said."""
    rows = rows_of(target, pairs(1, 5, 3, 2))
    model = target.load(CPU)
    found = dataset_loss(model, rows)
    sums, bytes_said = [], 0
    for row in range(4):
        ids, learned = (torch.from_numpy(part) for part in rows.kept.read(row))
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
        sums.append(float(F.cross_entropy(logits[learned[1:]], ids[1:][learned[1:]], reduction="sum")))
        bytes_said += len(" ".join(["apple"] * (1, 5, 3, 2)[row]))
    np.testing.assert_allclose(found.row_losses, sums, rtol=1e-5)
    assert found.row_tokens.tolist() == rows.kept.learned.tolist()
    assert found.rows == 4
    assert found.loss == pytest.approx(sum(sums) / found.tokens, rel=1e-5)
    assert rows.text_bytes == bytes_said
    assert found.bits_per_byte == pytest.approx(sum(sums) / math.log(2) / bytes_said, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_how_rows_fall_into_batches_is_no_matter(target: Target) -> None:
    file = pairs(*range(1, 20))
    alone = score(target, file, batch_size=1)
    for size in (2, 7, None):
        together = score(target, file, batch_size=size)
        np.testing.assert_allclose(together.row_losses, alone.row_losses, rtol=1e-5)
        assert together.loss == pytest.approx(alone.loss, abs=1e-6)


def _failing_over(model: PreTrainedModel, tokens: int, error: Exception) -> list[int]:
    """Fail as memory does wherever more than so many tokens come at once; tells the rows of each forward pass."""
    seen: list[int] = []

    def look(_: Any, arguments: Any, named: dict[str, Any]) -> None:
        ids = named["input_ids"]
        if ids.numel() > tokens:
            raise error
        seen.append(len(ids))

    model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_what_is_done_at_once(target: Target, error: Exception) -> None:
    """Every row is scored all the same, each once."""
    rows = rows_of(target, pairs(*range(1, 30)))
    expected = dataset_loss(target.load(CPU), rows)
    model = target.load(CPU)
    seen = _failing_over(model, 150, error)
    found = dataset_loss(model, rows)
    np.testing.assert_allclose(found.row_losses, expected.row_losses, rtol=1e-5)
    assert sum(seen) == 29
    assert len(seen) > 2


def test_a_row_that_does_not_fit_is_named(target: Target) -> None:
    rows = rows_of(target, pairs(1, 30))
    model = target.load(CPU)
    _failing_over(model, 20, torch.OutOfMemoryError("no"))
    longest = int(rows.kept.lengths.max())
    with pytest.raises(EvaluationError) as caught:
        dataset_loss(model, rows)
    assert str(caught.value) == (
        f"out of memory on cpu with a single row of {longest} tokens (rows.jsonl, line 2). Lower dataset.max_length "
        "(--set dataset.max_length=N), or hold the model in fewer bits (--bits 4)"
    )


def test_another_failure_is_no_lack_of_memory(target: Target) -> None:
    model = target.load(CPU)
    _failing_over(model, 0, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        dataset_loss(model, rows_of(target, pairs(1, 2)))


def test_what_is_widened_at_once_is_bounded(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of no more positions than are allowed reach the loss in float32, also of a row that has more."""
    import qlora_cli.benchmarking.dataset_loss as module

    rows, model = rows_of(target, pairs(*range(1, 30))), target.load(CPU)
    expected = dataset_loss(model, rows)
    positions: list[int] = []
    cross_entropy: Callable[..., torch.Tensor] = F.cross_entropy

    def spy(logits: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        positions.append(len(logits))
        return cross_entropy(logits, *arguments, **named)

    monkeypatch.setattr(module.F, "cross_entropy", spy)
    monkeypatch.setitem(module._LOGITS, "cpu", 4 * model.config.vocab_size * 10)
    found = dataset_loss(model, rows)
    assert max(positions) == 10
    np.testing.assert_allclose(found.row_losses, expected.row_losses, rtol=1e-5)


def test_a_loss_that_is_no_number_names_its_rows(target: Target) -> None:
    rows, model = rows_of(target, write(*_texts("red", "blue", "red"))), target.load(CPU)
    ids = rows.kept.read(1)[0]
    only_here = next(token for token in ids.tolist() if token not in rows.kept.read(0)[0].tolist())
    with torch.no_grad():
        model.get_input_embeddings().weight[only_here] = math.nan
    with pytest.raises(EvaluationError, match=r"^rows.jsonl: the loss of 1 row \(line 2\) is no finite number$"):
        dataset_loss(model, rows, batch_size=1)


def _texts(*words: str) -> Sequence[dict[str, str]]:
    return [{"prompt": word, "completion": "apple"} for word in words]


def test_rows_that_are_too_long_are_counted(target: Target) -> None:
    """Cut unless they shall be left out; refused if that is asked for."""
    file = pairs(1, 20, 30)
    rows = rows_of(target, file, "dataset.max_length=24")
    assert rows.remarks == ("2 of 3 rows are longer than dataset.max_length (24 tokens) and are cut there",)
    assert rows.kept.lengths.max() == 24
    rows = rows_of(target, file, "dataset.max_length=24", "dataset.overlong=drop")
    assert rows.remarks == ("2 of 3 rows are longer than dataset.max_length (24 tokens) and are left out",)
    assert dataset_loss(target.load(CPU), rows).rows == 1
    with pytest.raises(DataError, match="2 of 3 rows are longer"):
        rows_of(target, file, "dataset.max_length=24", "dataset.overlong=error")
    with pytest.raises(DataError, match="all 3 rows are longer"):
        rows_of(target, file, "dataset.max_length=4", "dataset.overlong=drop")


def test_a_row_that_cannot_be_read_is_named_or_counted(target: Target) -> None:
    write({"prompt": "red", "completion": "apple"}, {"prompt": "red"})
    with pytest.raises(DataError, match=r"rows.jsonl, line 2"):
        rows_of(target, "rows.jsonl")
    rows = rows_of(target, "rows.jsonl", "dataset.on_bad_row=skip")
    assert len(rows.remarks) == 1
    assert rows.remarks[0].startswith("1 row could not be read: left out. The first: ")
    assert "line 2" in rows.remarks[0]


@pytest.mark.parametrize(("limit", "expected"), [(3, 3), (0.5, 5), (0.01, 1), (100, 10), (None, 10)])
def test_the_first_rows_alone(target: Target, limit: int | float | None, expected: int) -> None:
    """A number of them, or a share, rounded up as lm-eval does."""
    rows = rows_of(target, pairs(*range(1, 11)), limit=limit)
    assert len(rows.kept) == expected
    assert rows.kept.row_numbers.tolist() == [*range(1, expected + 1)]


def test_no_rows(target: Target) -> None:
    with pytest.raises(DataError):
        rows_of(target, write())
    with pytest.raises(DataError, match="has no rows to score"):
        rows_of(target, pairs(1), limit=0)


def test_a_row_of_several_sequences_is_one_draw(target: Target) -> None:
    """Under a template that renders earlier answers otherwise, a conversation becomes a sequence for each answer: they
    are one row for the standard error and for pairs."""
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' }}"
        "{{ message['content'] if loop.last or message['role'] == 'user' else '…' }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    Path("t.jinja").write_text(template)
    turns = [{"role": role, "content": word} for word in ("red", "blue") for role in ("user", "assistant")]
    file = write(*[{"messages": turns}] * 3)
    rows = rows_of(target, file, "dataset.chat_template=t.jinja")
    assert (len(rows.kept), rows.kept.rows) == (6, 3)
    found = dataset_loss(target.load(CPU), rows)
    assert found.rows == 3
    assert found.tokens == rows.kept.supervised_tokens
    # The same row three times: no row differs from another.
    assert found.standard_error == pytest.approx(0.0, abs=1e-9)


def test_one_row_has_no_standard_error(target: Target) -> None:
    assert score(target, pairs(3)).standard_error is None


def test_progress_is_told_in_tokens(target: Target) -> None:
    """Up to all of them, never backwards."""
    told: list[tuple[int, int]] = []
    rows = rows_of(target, pairs(*range(1, 9)))
    dataset_loss(target.load(CPU), rows, batch_size=3, progress=lambda done, of: told.append((done, of)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (rows.kept.tokens, rows.kept.tokens)
    assert len(told) == 3


def test_other_rows_are_no_comparison(target: Target) -> None:
    one, other = score(target, pairs(3, 4)), score(target, pairs(5, 6))
    with pytest.raises(EvaluationError, match="on the same rows alone"):
        one.against(other)


def test_the_tokenizer_stays_as_it_is(target: Target) -> None:
    """Templates for these rows are not for the tasks that are asked after them."""
    tokenizer = target.tokenizer()
    before = tokenizer.chat_template
    file = write({"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]})
    read_dataset(target, dataset_section(file, target, ["dataset.chat_template=plain"]), tokenizer)
    assert tokenizer.chat_template == before


def test_a_finished_run_reads_a_file_of_its_own_form(here: Path) -> None:
    """Named alone, a file is read with the run's columns."""
    recipe = tiny_recipe(here, training={"max_steps": 1})
    train(recipe)
    write_rows(here / "more.jsonl", 6, start=50)
    assert score(find_target("run"), "more.jsonl").rows == 6


def test_rows_that_were_learned_are_told_of(here: Path) -> None:
    """The run's training file says little about other rows; its validation file does."""
    train(tiny_recipe(here, training={"max_steps": 1}))
    target = find_target("run")
    assert rows_of(target, "validation.jsonl").remarks == ()
    assert rows_of(target, "train-32.jsonl").remarks == (
        "the run was trained on rows of train-32.jsonl: a loss on them says little about others",
    )
