"""What lm-eval warns of, told once."""

from __future__ import annotations

import logging

from qlora_cli.evaluation.hush import Hush


def test_how_often_a_line_warns_is_told() -> None:
    """Of the same as of another document: each time counts, and only the first text is kept."""
    told: list[str] = []
    logger = logging.getLogger("lm_eval.tasks.mine")
    with Hush(told.append).fallen():
        for number in (1, 1, 2, 2, 1):
            logger.warning(f"no label in {number}")
    assert told == ["lm-eval: no label in 1", "lm-eval: 4 more like this one: no label in 1"]
