"""What a person sees of a self-test: a line for each promise as it is checked, and what a failure means."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from qlora_cli.console import plural, show_line, show_paragraph, visible
from qlora_cli.selftest.events import Begun, Checking, Event, Number, Outcome, Report, Result

_TITLE, _VERDICT, _SECONDS = 31, 7, 9  # letters of a column, the blanks behind it among them
_VERDICTS: dict[Outcome, tuple[str, str]] = {
    "passed": ("pass", "green"),
    "failed": ("FAIL", "bold red"),
    "error": ("ERROR", "bold yellow"),
}
_NOT_PASSED: tuple[tuple[Outcome, str], ...] = (("failed", "failed"), ("error", "could not be carried out"))
_DIGITS = 12  # letters of a digest that are shown: two digests that begin alike are one
_DECIDING = ("torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "tokenizers")


class SelftestView:
    """Listens to a self-test and shows it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None

    def __enter__(self) -> SelftestView:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, event: Event) -> None:
        match event:
            case Begun():
                self._head(event)
            case Checking(title):
                if self._console.is_terminal:
                    self._status = self._console.status(f"{title} …")
                    self._status.start()
            case Result():
                self._stop()
                self._result(event)

    def finish(self, report: Report) -> None:
        """Say how it went in all."""
        count = plural(len(report.results), "check")
        said: list[str] = []
        for status, what in _NOT_PASSED:
            if number := len(report.titles(status)):
                said.append(f"{number} {what}" if said else f"{number} of {count} {what}")
        told = ", ".join(said) or f"all of {count} passed"
        self._console.print()
        show_line(self._console, "done", f"{told}, in {report.seconds:.0f} s; nothing is left on disk")

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _head(self, event: Begun) -> None:
        facts = event.hardware
        where = f"{facts['gpu']}, CUDA {facts['cuda']}" if "gpu" in facts else f"{facts['cpu']}"
        threads = plural(facts["torch_threads"], "thread")
        show_line(self._console, "device", f"{event.device}: {where}; {threads}, {facts['platform']}")
        shown = ", ".join(f"{name} {event.versions[name]}" for name in _DECIDING if name in event.versions)
        show_paragraph(
            self._console,
            "versions",
            f"qlora {event.versions['qlora-cli']}, Python {event.versions['python']}, {shown}",
        )
        self._console.print()
        self._console.print(Text(f"{'check':<{_TITLE}}{'result':<{_VERDICT}}{'seconds':>7}  figures", style="dim"))

    def _result(self, result: Result) -> None:
        verdict, style = _VERDICTS[result.status]
        self._console.print(
            Text.assemble(
                f"{result.title:<{_TITLE}}",
                (f"{verdict:<{_VERDICT}}", style),
                f"{result.seconds:>7.1f}  {_figures(result)[0]}".rstrip(),
            )
        )
        for more in _figures(result)[1:]:
            self._console.print(Text(" " * (_TITLE + _VERDICT + _SECONDS) + more))
        if not result.passed:
            show_paragraph(self._console, "", visible(result.detail))
            show_paragraph(self._console, "", result.meaning or "", style.removeprefix("bold "))


def report_json(report: Report) -> str:
    """All of a report as one JSON object; numbers that JSON has no way to write are text."""
    checks = [
        {
            "name": result.name,
            "title": result.title,
            "passed": result.passed,
            "status": result.status,
            "figure": _plain(result.figure),
            "bound": _plain(result.bound),
            "seconds": round(result.seconds, 3),
            "detail": result.detail,
            "meaning": result.meaning,
        }
        for result in report.results
    ]
    facts: dict[str, Any] = {
        "passed": report.passed,
        "device": report.begun.device,
        "hardware": dict(report.begun.hardware),
        "versions": dict(report.begun.versions),
        "seconds": round(report.seconds, 3),
        "checks": checks,
    }
    return json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)


def _figures(result: Result) -> list[str]:
    """A line for each: its name, what it is, and what it may be."""
    lines = [_figure(name, value, result.bound.get(name)) for name, value in result.figure.items()]
    return lines or [""]


def _figure(name: str, value: Number, bound: Number | None) -> str:
    if isinstance(value, str):
        known = "" if bound is None else " = " if value == bound else " ≠ "
        return f"{name} {value[:_DIGITS]}{known}{str(bound)[:_DIGITS] if known else ''}"
    if isinstance(bound, str):
        return f"{name} {value:.4f} ({bound})"
    return f"{name} {value:.2g}" + ("" if bound is None else f" (at most {bound:g})")


def _plain(numbers: Mapping[str, Number]) -> dict[str, Number]:
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in numbers.items()
    }
