"""How far encoding has come, as a person sees it: nothing while it is quick, then a bar, or a line now and then."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import StringIO

import pytest
from rich.console import Console

from qlora_cli import encoding_view
from qlora_cli.encoding_view import EncodingView
from qlora_cli.training.events import EncodingProgress


class _Clock:
    """Stands for the module `time`, a second later whenever a test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Clock]:
    clock = _Clock()
    monkeypatch.setattr(encoding_view, "time", clock)
    return clock


def _console(*, terminal: bool) -> tuple[Console, StringIO]:
    file = StringIO()
    return Console(file=file, force_terminal=terminal, width=100, highlight=False, soft_wrap=True), file


def test_lines_where_there_is_no_terminal(clock: _Clock) -> None:
    """The first after two seconds of a source, the next after half a minute; each source has a patience of its own."""
    console, file = _console(terminal=False)
    with EncodingView(console) as view:
        for now, source, rows, share in (
            (0, "a[1].jsonl", 0, 0.0),
            (1.9, "a[1].jsonl", 5, 0.1),
            (2.1, "a[1].jsonl", 1000, 0.25),
            (32.0, "a[1].jsonl", 2000, 0.5),
            (32.2, "a[1].jsonl", 3000, 0.75),
            (33.0, "org/b", 1, None),
            (34.9, "org/b", 2, None),
            (35.1, "org/b", 3000, None),
        ):
            clock.now = now
            view(EncodingProgress(source, rows, share))
    assert file.getvalue().splitlines() == [
        "         encoding a[1].jsonl: 1,000 rows (25%)",
        "         encoding a[1].jsonl: 3,000 rows (75%)",
        "         encoding org/b: 3,000 rows",
    ]


@pytest.mark.parametrize(("share", "told"), [(0.25, "25% 1,000 rows"), (None, " 1,000 rows")])
def test_a_bar_on_a_terminal(share: float | None, told: str, clock: _Clock) -> None:
    """After two seconds, with what is known in it from the first: no share of a size that is not known. It goes away
    when encoding ends."""
    console, file = _console(terminal=True)
    with EncodingView(console) as view:
        view(EncodingProgress("a.jsonl", 1, 0.0))
        assert not file.getvalue()
        clock.now = 3.0
        view(EncodingProgress("a.jsonl", 1000, share))
        shown = _plain(file.getvalue())
        assert shown.startswith("encode ")
        assert told in shown
        assert ("%" in shown) == (share is not None)
    assert file.getvalue().endswith("\x1b[1A\x1b[2K")  # the line of the bar is taken back


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
