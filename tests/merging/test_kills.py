"""A merge that is killed leaves the whole model or none, and the next one cleans up after it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.cli import ENVIRONMENT
from tests.support.merge_runs import merge_run

KILLS = 50


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is forked there")
def test_fifty_kills(tmp_path: Path) -> None:
    """At random moments while it writes: the output is absent, or what an undisturbed merge gives, byte for byte.

    Merging again gives that, and leaves nothing else beside it.
    """
    recipe = merge_run(tmp_path / "run")
    folder = tmp_path / "merged"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.kills", recipe.output_dir, str(folder), str(KILLS)],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == KILLS
    became = Counter(kill["output"] for kill in kills)
    assert became["broken"] == 0
    assert all(kill["again"] and kill["remains"] == ["out"] for kill in kills), done.stderr
    assert {name for kill in kills for name in kill["left"]} == {".out.writing"}
    # Most came while something was half written: else they would show nothing.
    assert sum(bool(kill["left"]) for kill in kills) > KILLS / 2
