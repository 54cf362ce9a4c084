"""A folder for the checks that cannot be had: where that was, and the way out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner

from qlora_cli.cli import app
from qlora_cli.errors import RunError
from qlora_cli.selftest import workbench
from tests.support.cli import offline_libraries

WAY_OUT = "The self-test needs 5 MB in the folder for temporary files: set TMPDIR to one on a disk that has them"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),
        (OSError(30, "Read-only file system"), "Read-only file system"),
    ],
)
def test_a_workbench_that_cannot_be_written_says_where(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the libraries raise: the folder that TMPDIR is, and that TMPDIR is the way out."""

    def full(folder: Path) -> None:
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(workbench, "save_model", full)
    with pytest.raises(RunError) as caught, workbench.workbench(torch.device("cpu")):
        pass
    assert str(caught.value) == f"{tmp_path}: could not be written: {told}. {WAY_OUT}"
    assert list(tmp_path.iterdir()) == []


def test_no_folder_for_a_workbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None can be made there; then, none of those that Python tries can be written."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(RunError) as caught, workbench.workbench(torch.device("cpu")):
        pass
    assert str(caught.value) == f"{tmp_path / 'gone'}: could not be written: No such file or directory. {WAY_OUT}"

    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
    with pytest.raises(RunError) as caught, workbench.workbench(torch.device("cpu")):
        pass
    assert str(caught.value) == f"No usable temporary directory found in ['{tmp_path / 'gone'}']. {WAY_OUT}"


def test_what_goes_wrong_at_a_workbench_is_not_told_of_its_folder() -> None:
    """A bug is none of the disk's, nor is what a check raises."""
    with pytest.raises(OSError, match="ours") as caught, workbench.workbench(torch.device("cpu")):
        raise OSError("ours")
    assert str(caught.value) == "ours"


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_folder_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file there may be above 20 kB, as on a full disk: where that was, the way out, and exit code 1."""
    import resource

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with offline_libraries(monkeypatch):
            result = CliRunner().invoke(app, ["selftest", "--device", "cpu", "--json"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (f"error: {tmp_path}: could not be written: File too large. {WAY_OUT}\n")
    assert list(tmp_path.iterdir()) == []
