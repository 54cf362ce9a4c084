"""Which checkpoint has the best score, in a run that is stopped anywhere; and what scores are called."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_cli.training.best_checkpoint import BestCheckpoint, Measured
from qlora_cli.training.checkpoint import checkpoint_path, rotate
from qlora_cli.training.events import Emitter, Event
from qlora_cli.training.score_names import flatten
from tests.support.checkpoints import write_some


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.sampled_from([None, 0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=7),
    stop=st.integers(0, 7),
    higher=st.booleans(),
    limit=st.sampled_from([1, 2, None]),
)
def test_the_best_of_any_run(
    values: list[float | None], stop: int, higher: bool, limit: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is scored, up or down, with rotation, stopped and gone on with at any step: the checkpoint of the first
    best is there at every moment, beside the newest."""
    folder = tmp_path_factory.mktemp("run")
    best, emit = BestCheckpoint("t/acc", higher_is_better=higher), Emitter()
    records = [Measured(step, value) for step, value in enumerate(values)]
    for record in records:
        write_some(folder, record.step)
        if best.is_better(record):
            best.keep(record, checkpoint_path(folder, record.step), emit)
        rotate(folder, limit, keep={best.step})
        seen = [r for r in records[1 : record.step + 1] if r.value is not None]
        first = max(seen, key=lambda r: (r.value or 0) * (1 if higher else -1), default=None)
        assert best.step == (None if first is None else first.step)
        newest = range(max(0, record.step + 1 - (limit or 100)), record.step + 1)
        kept = {checkpoint_path(folder, step) for step in newest}
        assert set(folder.iterdir()) == kept | ({best.kept.path} if best.kept else set())
        if record.step == stop:
            told: list[Event] = []
            best = BestCheckpoint("t/acc", higher_is_better=higher)
            best.go_on(records[: stop + 1], folder, Emitter([told.append]))
            assert best.step == (None if first is None else first.step)
            assert told == ([] if best.kept is None else [best.kept])


def test_scores_by_their_names() -> None:
    """lm-eval's keys without its word for no filter; no error that is none; nothing that is no score; None for NaN."""
    results = {
        "t": {
            "alias": "t",
            "name": "t",
            "sample_len": 8,
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "exact_match,strict-match": 1,
            "exact_match_stderr,strict-match": "N/A",
            "f1,none": float("nan"),
            "f1_stderr,none": float("nan"),
        }
    }
    assert flatten(results, "t") == {
        "t/acc": 0.5,
        "t/acc_stderr": 0.1,
        "t/exact_match,strict-match": 1.0,
        "t/f1": None,
    }
    assert flatten(results, "elsewhere") == {}
