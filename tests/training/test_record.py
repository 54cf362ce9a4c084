"""What `run.json` carries from one part of a run to the next."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

from qlora_cli.training.record import RunRecord


def test_a_run_that_starts_over_keeps_its_day(tmp_path: Path) -> None:
    """Templates write the date into the rows: were the day another after the rows were rendered, the next part would
    be refused for having other rows. What the first part found is forgotten."""
    path = tmp_path / "run.json"
    found = {"last_train": {"step": 3}, "first_eval": {"step": 0}, "last_eval": {"step": 2}, "last_checkpoint": "x"}
    path.write_text(json.dumps({"started_at": "2020-02-29T23:59:00+00:00", **found}), encoding="utf-8")
    record = RunRecord(path, {})
    assert record.started_on == date(2020, 2, 29)
    record.start_over()
    record.write()
    assert RunRecord(path, {}).started_on == date(2020, 2, 29)
    written = json.loads(path.read_text(encoding="utf-8"))
    assert [written[name] for name in found] == [None] * 4
