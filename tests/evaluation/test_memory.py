"""What counts as running out of memory, and what becomes of the budget then."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.answering.memory import Budget, free_bytes, planned_rows, planned_tokens, within_memory
from tests.support.models import tiny_model

_LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
    ),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


def _raise(error: Exception) -> int:
    raise error


@pytest.mark.parametrize("error", _LACKS)
def test_a_lack_of_memory_is_no_error(error: Exception) -> None:
    """Whatever words the allocator has for it, nothing comes of the computation, and nothing is raised."""
    assert within_memory(_raise, error) is None


@pytest.mark.parametrize("error", [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory")])
def test_other_errors_pass(error: Exception) -> None:
    """What is no lack of memory goes on as it came."""
    with pytest.raises(type(error)) as caught:
        within_memory(_raise, error)
    assert caught.value is error


def test_what_fits_is_given_back() -> None:
    """A computation that fits gives its result."""
    assert within_memory(divmod, 7, 2) == (3, 1)


def test_the_budget_halves_what_was_too_much_and_gives_up_below_sixteen() -> None:
    """Half of a stretch that was smaller than the budget is what goes on, down to 16 tokens."""
    budget = Budget(1_000)
    halves = []
    for too_many in (1_000, 120, 60):
        budget.halve(too_many)
        halves.append(budget.tokens)
    assert halves == [500, 60, 30]
    with pytest.raises(EvaluationError, match=r"of 30 tokens, which cannot be cut further"):
        budget.halve(30)


def test_plans_for_a_cpu() -> None:
    """On a CPU the plan is that of the measurements; logits take a quarter of a gibibyte at most."""
    model = tiny_model("llama", vocab_size=512)
    assert planned_tokens(model) == 256
    assert planned_rows(model) * 512 * 4 == 1 << 28


def test_what_torch_holds_in_reserve_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is scored after the target: what that left in reserve does not make its passes small."""
    for name, found in (("mem_get_info", (3, 100)), ("memory_reserved", 90), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda _device, found=found: found)
    assert free_bytes(torch.device("cuda", 0)) == 73
    made = tiny_model("llama")
    weight = SimpleNamespace(weight=SimpleNamespace(device=torch.device("cuda", 0)))
    monkeypatch.setattr(made, "get_input_embeddings", lambda: weight)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 1 << 40)
    assert planned_tokens(made) == 4096
