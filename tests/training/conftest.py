"""What tests of scored runs need."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from qlora_cli.evaluation.tasks.index import load_index


@pytest.fixture(scope="session")
def kept_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the index of lm-eval's tasks, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        load_index()
    return folder


@pytest.fixture
def indexed(kept_index: Path, own_cache: None) -> None:
    """The test's own cache begins with that index."""
    shutil.copytree(kept_index, os.environ["XDG_CACHE_HOME"], dirs_exist_ok=True)
