"""What tests of scored runs need."""

from __future__ import annotations

import pytest

from tests.support.benchmarks import keep_index


@pytest.fixture
def indexed(own_cache: None) -> None:
    """The test's own cache begins with the index of lm-eval's tasks, which takes seconds to make."""
    keep_index()
