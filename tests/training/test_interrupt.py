"""Signals as wishes to stop: what is heeded, what is a repeat, what stays ignored, and that all are given back."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from qlora_cli.training import interrupt
from qlora_cli.training.interrupt import StopAtOnce, StopRequest, handling

INT, TERM, HUP, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1


class Clock:
    def __init__(self) -> None:
        self.now = 100.0


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    """Whatever a test does, the signals mean afterwards what they did; and before, what they do by themselves."""
    before = {number: signal.getsignal(number) for number in (INT, TERM, HUP, USR1)}
    signal.signal(TERM, signal.SIG_DFL)  # scripts that were tested before have handlers of their own
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(interrupt, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize("number", [INT, TERM, HUP, USR1], ids=lambda number: number.name)
def test_the_first_is_a_request(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    """It is named and said, nothing is broken off, and afterwards the signal means what it did."""
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal_name is None
        signal.raise_signal(number)
        assert stop.signal_name == number.name
    assert capfd.readouterr().err == f"\n{number.name}: finishing this step, then saving; again to stop at once\n"
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("again", [INT, TERM, HUP, USR1], ids=lambda number: f"then-{number.name}")
@pytest.mark.parametrize("first", [INT, TERM, HUP, USR1], ids=lambda number: number.name)
def test_what_stops_at_once(first: signal.Signals, again: signal.Signals, clock: Clock) -> None:
    """The same signal again, Ctrl-C after any of them, or SIGTERM after Ctrl-C, once a second is over; never another
    one, which is how a scheduler goes on from a warning to the end; and within that second none."""
    with StopRequest() as stop:
        signal.raise_signal(first)
        clock.now += 0.99
        signal.raise_signal(again)
        clock.now += 0.01
        if again in (first, INT) or (first, again) == (INT, TERM):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(again)
            signal.raise_signal(again)  # a repeat of the second does not break off what that one cleans up
        else:
            signal.raise_signal(again)
        assert stop.signal_name == first.name


def test_a_program_around_it_hears_the_second(clock: Clock) -> None:
    """What it does with a signal it does with the second."""
    heard: list[int] = []
    signal.signal(TERM, lambda number, frame: heard.append(number))
    with StopRequest():
        signal.raise_signal(TERM)
        assert heard == []
        clock.now += 1
        signal.raise_signal(TERM)
    assert heard == [TERM]


@pytest.mark.parametrize("number", [INT, TERM, HUP, USR1], ids=lambda number: number.name)
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    """As nohup and a shell's background jobs ask for."""
    signal.signal(number, signal.SIG_IGN)
    with StopRequest() as stop, handling(StopAtOnce()):
        signal.raise_signal(number)
    assert stop.signal_name is None
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_repeat_of_a_request_does_not_end_what_follows(clock: Clock) -> None:
    """The loop has saved and given the signals back to the command, which is telling how it ended: the repeat passes,
    and a wish of its own a second later ends it at once."""
    end = StopAtOnce()
    with handling(end):
        with StopRequest() as stop:
            signal.raise_signal(USR1)
        clock.now += 0.99
        signal.raise_signal(USR1)
        clock.now += 0.01
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(TERM)
        signal.raise_signal(TERM)
        clock.now += 1
        end.pass_over_all()
        signal.raise_signal(TERM)
    assert (stop.signal_name, end.signals) == ("SIGUSR1", [TERM])
