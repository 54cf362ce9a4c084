"""`qlora selftest`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_cli.commands.importing import telling_broken_libraries
from qlora_cli.commands.stopping import exit_code
from qlora_cli.errors import SelftestError

if TYPE_CHECKING:
    from qlora_cli.selftest.events import Report


def selftest(*, device: str, as_json: bool) -> int:
    """Check this tool's promises on a device, showing each as it is checked; returns the exit code."""

    def work() -> None:
        with telling_broken_libraries():
            from qlora_cli.commands.libraries import set_up_libraries

            # Nothing is fetched, and of a model that is made in a moment nobody has to see it load.
            set_up_libraries([], progress=False)
            from qlora_cli.console import make_console
            from qlora_cli.selftest.run import run_selftest
            from qlora_cli.selftest_view import SelftestView, report_json

        console = make_console()
        with SelftestView(console) as view:
            report = run_selftest(device, listeners=[] if as_json else [view])
            if as_json:
                console.out(report_json(report), highlight=False)
            else:
                view.finish(report)
        if not report.passed:
            raise SelftestError(_not_passed(report))

    return exit_code(work, lambda: "stopped; nothing is left on disk")


def _not_passed(report: Report) -> str:
    """What is not kept, and apart from it what is not known to be: that may be kept all the same."""
    failed, unknown = ("; ".join(report.titles(status)) for status in ("failed", "error"))
    if not failed:
        return f"could not be checked on this device: {unknown}"
    said = f"not kept on this device with these versions: {failed}"
    return f"{said}. Could not be checked: {unknown}" if unknown else said
