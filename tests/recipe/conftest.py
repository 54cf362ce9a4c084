"""Every test of this folder runs in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes are in recipes/, so that their folder and the current one are never taken for each other."""
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
