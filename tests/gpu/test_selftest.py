"""The self-test on a GPU."""

from __future__ import annotations

import pytest
import torch

from qlora_cli.selftest.run import run_selftest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_every_promise_is_kept_on_a_gpu() -> None:
    """All six checks, with their figures within the bounds that hold everywhere."""
    report = run_selftest("cuda")
    assert report.begun.device == "cuda"
    assert [(result.name, result.detail) for result in report.results if not result.passed] == []
    assert report.seconds < 120
