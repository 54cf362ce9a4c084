"""`qlora selftest` as a person or a script meets it: what it prints, what it leaves, how it exits."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from qlora_cli.cli import app
from qlora_cli.selftest import adapter_files, events, four_bits, run
from qlora_cli.selftest.events import Begun, Checking, Event, Report
from qlora_cli.selftest.run import CHECKS
from qlora_cli.selftest_view import SelftestView, report_json
from tests.support.cli import ENVIRONMENT, offline_libraries, process


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with offline_libraries(monkeypatch):
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A home, a folder for temporary files and a current one, in which nothing is to be left."""
    return {name: tmp_path_factory.mktemp(name) for name in ("home", "temporary", "current")}


@pytest.fixture(scope="module")
def whole(places: dict[str, Path]) -> subprocess.CompletedProcess[str]:
    """The command as users start it, on a CPU, with a home of its own."""
    environment = {"HOME": str(places["home"]), "TMPDIR": str(places["temporary"]), "XDG_CACHE_HOME": ""}
    return process("selftest", "--device", "cpu", folder=places["current"], **environment)


def selftest(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["selftest", *arguments])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result


# ------------------------------------------------------------------------------------------- The real one


def test_every_promise_is_kept_here(whole: subprocess.CompletedProcess[str]) -> None:
    """Every check passes with figures within its bounds, and nothing else is on the screen; exit code 0."""
    assert (whole.returncode, whole.stderr) == (0, "")
    lines = whole.stdout.splitlines()
    assert re.fullmatch(r"device   cpu: .+; \d+ threads?, \w+ \w+", lines[0])
    assert re.fullmatch(r"versions qlora \S+, Python 3\S+, torch \S+, transformers \S+, bitsandbytes \S+, .*", lines[1])
    assert lines[2:4] == ["", "check                          result seconds  figures"]
    assert lines[-2] == ""
    assert re.fullmatch(r"done     all of 6 checks passed, in \d+ s; nothing is left on disk", lines[-1])
    table = "\n".join(lines[4:-2])
    number, small = r"\d\.\d+", r"[\d.]+(?:e-\d\d)?"
    small += r" \(at most "
    expected = [
        rf"same seed, same bits           pass +{number}  sha256 ([0-9a-f]{{12}}) = \1",
        r"killed and resumed, same bits  pass +\d+\.\d  sha256 ([0-9a-f]{12}) = \2",
        rf"accumulation: 1.4 = 4.1        pass +{number}  loss {small}1e-05\)",
        rf" {{47}}adapter {small}0\.001\)",
        rf"packed = unpacked              pass +{number}  loss {small}0\.0001\)",
        rf" {{47}}gradient {small}0\.0001\)",
        rf" {{47}}gradient in bfloat16 {small}0\.1\)",
        rf"adapter saved = loaded         pass +{number}  changed tensors 0 \(at most 0\)",
        r" {47}logits 0 \(at most 0\)",
        rf"NF4 and FP4 round trip         pass +{number}  NF4 0\.0728 \(0\.0728 ± 0\.001\)",
        r" {47}NF4 double 0\.0729 \(0\.0728 ± 0\.001\)",
        r" {47}FP4 0\.0965 \(0\.0965 ± 0\.001\)",
        r" {47}FP4 double 0\.0966 \(0\.0965 ± 0\.001\)",
    ]
    assert re.fullmatch("\n".join(expected), table), table


def test_nothing_is_left(whole: subprocess.CompletedProcess[str], places: dict[str, Path]) -> None:
    """In the home, where temporary files are, and where the command is run."""
    assert whole.returncode == 0
    assert {name: [*place.iterdir()] for name, place in places.items()} == {name: [] for name in places}


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="what runs is looked up in /proc")
def test_ctrl_c_ends_all_of_it(tmp_path: Path) -> None:
    """While a process of its own trains: exit code 130, that process is gone, and so is the folder."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "qlora_cli", "selftest", "--device", "cpu"],
        cwd=tmp_path, env=ENVIRONMENT | {"TMPDIR": str(temporary)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as running:  # fmt: skip
        deadline = time.monotonic() + 120
        children: list[str] = []
        while not children and time.monotonic() < deadline:
            assert running.poll() is None
            time.sleep(0.02)
            children = [found for folder in temporary.iterdir() for found in _processes_about(folder)]
        (folder,) = temporary.iterdir()
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=30)
    assert (running.returncode, stderr) == (130, "error: stopped; nothing is left on disk\n")
    assert "same seed, same bits           pass" in stdout
    assert list(temporary.iterdir()) == []
    assert len(children) == 1
    assert _processes_about(folder) == []


def _processes_about(folder: Path) -> list[str]:
    """Process ids whose command line names the folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(folder) in file.read_bytes():
                found.append(file.parent.name)
        except OSError:
            continue
    return found


# ------------------------------------------------------------------------------------------- Failures


def _quick(monkeypatch: pytest.MonkeyPatch, *failing: str) -> None:
    """Of all checks the last two are made, which are quick; these of them go wrong."""
    monkeypatch.setattr(run, "CHECKS", CHECKS[-2:])
    trip = four_bits._round_trip
    if "four_bits" in failing:
        monkeypatch.setattr(four_bits, "_round_trip", lambda values, kind, *others: trip(values, "fp4", *others))
    if "adapter_files" in failing:

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(adapter_files, "save_adapter", full)


def test_a_failure_says_what_it_means(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures, what was found, what that means; the other check is made; exit code 1 and one line on stderr."""
    _quick(monkeypatch, "four_bits")
    result = selftest("--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr == "error: not kept on this device with these versions: NF4 and FP4 round trip\n"
    assert "adapter saved = loaded         pass " in result.stdout
    lines = result.stdout.splitlines()
    (row,) = [number for number, line in enumerate(lines) if line.startswith("NF4 and FP4 round trip")]
    assert re.fullmatch(r"NF4 and FP4 round trip         FAIL +\d+\.\d  NF4 0\.0965 \(0\.0728 ± 0\.001\)", lines[row])
    assert lines[row + 4].startswith("         NF4 is off by 0.0965 on average where 0.0728 is known; NF4 is off by ")
    assert lines[row + 5] == (
        "         bitsandbytes does not store weights in 4 bits as it should here: the base that is trained over is a "
        "wrong one. Try other versions of bitsandbytes and torch, or set quantization.bits to 16."
    )
    assert re.fullmatch(r"done     1 of 2 checks failed, in \d+ s; nothing is left on disk", lines[-1])


def test_a_check_that_raises_says_nothing_of_its_promise(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in one check: its message, no traceback, not what a failure would mean, and the next one is made."""
    _quick(monkeypatch, "adapter_files")
    result = selftest("--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr == "error: could not be checked on this device: adapter saved = loaded\n"
    lines = result.stdout.splitlines()
    (row,) = [number for number, line in enumerate(lines) if line.startswith("adapter saved = loaded")]
    assert re.fullmatch(r"adapter saved = loaded         ERROR +\d+\.\d", lines[row])
    assert lines[row + 1 : row + 3] == [
        "         OSError: [Errno 28] No space left on device",
        "         It could not be carried out, so whether this holds for your runs is not known: mend that and run the "
        "self-test again.",
    ]
    assert lines[row + 3].startswith("NF4 and FP4 round trip         pass ")
    told = r"done     1 of 2 checks could not be carried out, in \d+ s; nothing is left on disk"
    assert re.fullmatch(told, lines[-1])


def test_the_two_kinds_are_named_apart(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not kept, and what is not known to be."""
    _quick(monkeypatch, "adapter_files", "four_bits")
    result = selftest("--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: not kept on this device with these versions: NF4 and FP4 round trip. "
        "Could not be checked: adapter saved = loaded\n"
    )
    assert "\ndone     1 of 2 checks failed, 1 could not be carried out, in " in result.stdout


@pytest.mark.parametrize("failing", [None, "four_bits", "adapter_files"])
def test_json(failing: str | None, quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One object and nothing else on stdout, the exit code as without."""
    _quick(monkeypatch, *[failing] * bool(failing))
    result = selftest("--device", "cpu", "--json")
    assert result.exit_code == (1 if failing else 0)
    facts = json.loads(result.stdout)
    assert facts.keys() == {"passed", "device", "hardware", "versions", "seconds", "checks"}
    assert (facts["passed"], facts["device"]) == (failing is None, "cpu")
    assert {"torch", "transformers", "bitsandbytes", "qlora-cli", "python"} <= facts["versions"].keys()
    keys = {"name", "title", "passed", "status", "figure", "bound", "seconds", "detail", "meaning"}
    assert all(check.keys() == keys for check in facts["checks"])
    files, bits = facts["checks"]
    assert [check["name"] for check in (files, bits)] == ["adapter_files", "four_bits"]
    if failing == "adapter_files":
        assert (files["passed"], files["status"], files["figure"]) == (False, "error", {})
        assert files["meaning"].startswith("It could not be carried out, ")
    else:
        assert (files["passed"], files["status"], files["meaning"]) == (True, "passed", None)
        assert files["figure"] == {"changed tensors": 0, "logits": 0.0} == files["bound"]
    if failing == "four_bits":
        assert (bits["passed"], bits["status"]) == (False, "failed")
        assert bits["meaning"].startswith("bitsandbytes does not ")
    else:
        assert (bits["passed"], bits["status"], bits["meaning"]) == (True, "passed", None)


def test_a_device_that_is_not_there_is_refused(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2 before anything is checked, and nothing on stdout."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = selftest("--device", "cuda")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --device: cuda was asked for, but torch ")


def test_several_processes_are_refused(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would kill and compare by itself."""

    class _Two:
        num_processes = 2

    monkeypatch.setattr(run, "make_accelerator", lambda *_, **__: _Two())
    result = selftest()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == ("error: qlora selftest: expected one process, got 2. Start it without accelerate launch\n")


# ------------------------------------------------------------------------------------------- The view

BEGUN = Begun(
    "cuda",
    {"gpu": "NVIDIA H200", "cuda": "12.8", "cpu": "x", "torch_threads": 8, "platform": "Linux x86_64"},
    {"qlora-cli": "0.1.0", "python": "3.12.1", "torch": "2.11.0", "transformers": "5.20.0"},
)
FAILED = events.Result(
    "c", "same seed, same bits", "failed",
    {"sha256": "b" * 64, "loss": float("nan")}, {"sha256": "a" * 64, "loss": 1e-5},
    1.25, "\x1b[31mred", "It means that.",
)  # fmt: skip


def shown(*told: Event, terminal: bool = False) -> str:
    file = StringIO()
    console = Console(file=file, force_terminal=terminal, width=80, highlight=False, soft_wrap=True, emoji=False)
    with SelftestView(console) as view:
        for event in told:
            view(event)
    return file.getvalue()


def test_a_gpu_and_a_failure_are_shown() -> None:
    """Its name and CUDA's version; two digests that differ, a number that is none, and nothing that steers."""
    assert shown(BEGUN, Checking("same seed, same bits"), FAILED).splitlines() == [
        "device   cuda: NVIDIA H200, CUDA 12.8; 8 threads, Linux x86_64",
        "versions qlora 0.1.0, Python 3.12.1, torch 2.11.0, transformers 5.20.0",
        "",
        "check                          result seconds  figures",
        "same seed, same bits           FAIL       1.2  sha256 bbbbbbbbbbbb ≠ aaaaaaaaaaaa",
        "                                               loss nan (at most 1e-05)",
        "         \\x1b[31mred",
        "         It means that.",
    ]


def test_a_terminal_says_what_is_being_checked() -> None:
    """And no longer once it has been."""
    during = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(BEGUN, Checking("packed = unpacked"), terminal=True))
    assert "packed = unpacked …" in during
    assert "…" not in shown(BEGUN, Checking("packed = unpacked"))


def test_json_has_no_nan() -> None:
    """It is no JSON: written as text."""
    report = json.loads(report_json(Report(BEGUN, (FAILED,), 1.0)))
    assert report["checks"][0]["figure"]["loss"] == "nan"
    assert (report["passed"], report["checks"][0]["meaning"]) == (False, "It means that.")
