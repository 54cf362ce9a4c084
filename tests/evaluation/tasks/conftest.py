"""What the tests of tasks start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.evaluation.tasks.index import Listed, load_index
from tests.support.benchmarks import keep_index, write_data_root


@pytest.fixture
def index(own_cache: None) -> dict[str, Listed]:
    """All names of lm-eval."""
    keep_index()
    return load_index()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The small benchmarks."""
    return write_data_root(tmp_path / "data")
