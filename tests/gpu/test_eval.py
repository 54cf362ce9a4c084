"""On a CUDA device: the tree's answers are those of rows, in every storage; memory that runs out costs no answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qlora_cli.benchmarking.dataset_loss import dataset_loss, read_dataset
from qlora_cli.benchmarking.dataset_section import dataset_section
from qlora_cli.benchmarking.target import find_target
from qlora_cli.evaluation.answering.generation import Generator
from qlora_cli.evaluation.answering.questions import Continuation, Prompt
from qlora_cli.evaluation.answering.row_scorer import RowScorer
from qlora_cli.evaluation.answering.scorer import choose_scorer
from qlora_cli.evaluation.answering.together import written_together
from qlora_cli.evaluation.answering.tree_scorer import TreeScorer
from qlora_cli.model.base import load_base
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import QuantizationSection
from tests.support.adapters import write_adapter
from tests.support.continuations import answered, assert_alike
from tests.support.models import save_tiny_model
from tests.support.runs import write_rows
from tests.support.tokenizers import tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STORAGES = {
    "float32": ({"bits": 16, "compute_dtype": "float32"}, 1e-4),
    # bfloat16 keeps 8 bits: log-likelihoods of a few nats, summed over a few tokens.
    "bfloat16": ({"bits": 16, "compute_dtype": "bfloat16"}, 0.1),
    "nf4": ({"bits": 4, "compute_dtype": "bfloat16"}, 0.1),
}


def _cuda() -> torch.device:
    return torch.device("cuda", 0)


def _model(folder: Path, storage: dict[str, Any]) -> PreTrainedModel:
    if not folder.exists():
        save_tiny_model(folder)
    return load_base(ModelSource(str(folder)), QuantizationSection.model_validate(storage), _cuda()).eval()


def _asked() -> list[Continuation]:
    """Questions behind a common beginning, four continuations each, of one token and of several."""
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 300, (count,), generator=generator).tolist())

    stem = draw(40)
    questions = [stem + draw(5 + number % 7) for number in range(12)]
    return [
        Continuation(question + (ending := draw(1 + choice)), len(ending))
        for question in questions
        for choice in range(4)
    ]


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("storage", STORAGES)
def test_a_tree_answers_as_rows_do(tmp_path: Path, storage: str) -> None:
    """Log-likelihoods agree within rounding, over cuts between stretches as well."""
    section, tolerance = STORAGES[storage]
    model = _model(tmp_path / "base", section)
    rows = answered(RowScorer(model, tokens=512, rows=512), _asked())
    for tokens in (16, 61, 4096):
        tree = answered(TreeScorer(model, tokens=tokens, rows=4096), _asked())
        found, wanted = ([each.log_probability for each in answers] for answers in (tree, rows))
        assert found == pytest.approx(wanted, abs=tolerance)


def test_the_tree_is_chosen(tmp_path: Path) -> None:
    """The trial on the model holds on this device: nothing is said, and the budget is planned from free memory."""
    remarks: list[str] = []
    scorer = choose_scorer(_model(tmp_path / "base", STORAGES["nf4"][0]), batch_size=None, remark=remarks.append)
    assert (scorer.name, remarks) == ("prefix tree", [])


def test_memory_runs_out(tmp_path: Path) -> None:
    """CUDA's own error halves what goes into a forward pass, and every answer is the same."""
    model = _model(tmp_path / "base", STORAGES["float32"][0])
    asked = _asked()
    wanted = answered(TreeScorer(model, tokens=32, rows=4096), asked)
    failed = 0

    def lacking(_module: torch.nn.Module, args: Any, _kwargs: Any) -> None:
        nonlocal failed
        if args[0].shape[1] > 64:  # in the last layer: the others have been computed, and kept
            failed += 1
            torch.empty(2**50, dtype=torch.uint8, device=_cuda())

    held = torch.cuda.memory_allocated()
    last = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[-1]
    hook = last.register_forward_pre_hook(lacking, with_kwargs=True)
    found = answered(TreeScorer(model, tokens=512, rows=4096), asked)
    hook.remove()
    assert failed >= 2
    assert_alike(found, wanted, 1e-4)
    assert torch.cuda.memory_allocated() <= held + 2**20  # nothing of the passes in vain is kept alive


@pytest.mark.parametrize("borrowed", [False, True])
def test_memory_runs_out_while_answers_are_written(tmp_path: Path, borrowed: bool) -> None:
    """By our loop and by transformers': fewer rows at once, and every text is the same."""
    model = _model(tmp_path / "base", STORAGES["float32"][0])
    prompts = [Prompt(each.tokens, (" the",), 12) for each in _asked()[::3]]
    tokenizer = tiny_tokenizer()
    wanted = dict(Generator(model, tokenizer, batch_size=2).generate(prompts, lambda _done, _of: None))
    if borrowed:
        model.generation_config.no_repeat_ngram_size = 60  # only transformers' own follows it; it changes nothing here
    generator = Generator(model, tokenizer)
    assert (generator.why is not None) is borrowed
    failed = 0

    def lacking(_module: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal failed
        if kwargs["input_ids"].shape[0] > 4:
            failed += 1
            torch.empty(2**50, dtype=torch.uint8, device=_cuda())

    hook = model.register_forward_pre_hook(lacking, with_kwargs=True)
    found = dict(generator.generate(prompts, lambda _done, _of: None))
    hook.remove()
    assert failed >= 1
    assert found == wanted


@pytest.mark.parametrize("storage", STORAGES)
def test_the_loop_of_our_own_is_chosen(tmp_path: Path, storage: str) -> None:
    """Its trial holds on this device in every storage, and so does that of padded prompts for `generate`."""
    model = _model(tmp_path / "base", STORAGES[storage][0])
    assert Generator(model, tiny_tokenizer()).why is None
    assert written_together(model) == "any"


def test_texts_are_those_of_the_cpu(tmp_path: Path) -> None:
    """Greedy texts of a float32 model, batched and with stops, on both devices."""
    on_gpu = _model(tmp_path / "base", STORAGES["float32"][0])
    on_cpu = load_base(
        ModelSource(str(tmp_path / "base")), QuantizationSection(bits=16, compute_dtype="float32"), torch.device("cpu")
    ).eval()
    prompts = [Prompt(each.tokens, (" the",), 12) for each in _asked()[::5]]
    tokenizer = tiny_tokenizer()
    texts = [dict(Generator(model, tokenizer).generate(prompts, lambda _done, _of: None)) for model in (on_gpu, on_cpu)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_an_adapter_and_its_base(tmp_path: Path, bits: int) -> None:
    """A target is loaded in each storage on the device, answers otherwise without its adapter, and has a loss."""
    base = save_tiny_model(tmp_path / "base")
    adapter = write_adapter(tmp_path / "lora", str(base), lora_alpha=64, target_modules=["layers.0.self_attn.q_proj"])
    target = find_target(str(adapter), bits=bits)  # type: ignore[arg-type]
    model, tokenizer = target.load(_cuda()), target.tokenizer()
    file = write_rows(tmp_path / "rows.jsonl", 6)
    rows = read_dataset(target, dataset_section(str(file), target), tokenizer)
    ours = dataset_loss(model, rows)
    with target.without_adapter(model):
        base_score = dataset_loss(model, rows)
    assert ours.against(base_score).difference != 0.0
    assert target.fingerprint(_cuda()) != target.fingerprint(torch.device("cpu"))
