"""What is written is whole, and what cannot be is told."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qlora_cli.disk import append_text, make_folder, replacing_folder, sync, telling_disk_errors, tidy
from qlora_cli.errors import RunError
from tests.support.tokenizers import tiny_tokenizer


def test_what_rust_cannot_write_is_told_as_what_python_cannot(tmp_path: Path) -> None:
    """tokenizers raises a bare Exception where a file cannot be written; other errors are left as they are."""
    tokenizer = tiny_tokenizer().backend_tokenizer
    with pytest.raises(RunError) as caught, telling_disk_errors(tmp_path):
        tokenizer.save(str(tmp_path / "missing" / "tokenizer.json"))
    assert str(caught.value) == f"{tmp_path}: could not be written: No such file or directory"
    with pytest.raises(ValueError, match=r"^other$"), telling_disk_errors(tmp_path):
        raise ValueError("other")


def test_an_append_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with room for half a line: that half is not left."""
    path, write = tmp_path / "lines", os.write
    append_text(path, "one\n")

    def half(descriptor: int, data: memoryview) -> int:
        if len(data) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(RunError) as caught:
        append_text(path, "two\n")
    monkeypatch.undo()
    assert str(caught.value) == f"{path}: could not be written: No space left on device"
    assert path.read_text() == "one\n"


def test_tidying_takes_leftovers_and_puts_back_what_was_half_replaced(tmp_path: Path) -> None:
    """Staging of files and folders and what was being removed go; an old folder gets its name if nothing has it, and
    it is one that we replace."""
    with replacing_folder(tmp_path / "whole") as staging:
        (staging / "file").write_text("new")
    for name in (".whole.old", ".half.old", ".other.writing", ".step.removing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old")
    (tmp_path / ".run.json.writing").write_text("{")
    (tmp_path / ".mine").write_text("")
    (tmp_path / ".mine.old").write_text("")
    for pattern in ("whole", "h*"):
        tidy(tmp_path, pattern)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", ".mine.old", "half", "whole"]
    assert [(tmp_path / name / "file").read_text() for name in ("half", "whole")] == ["old", "new"]
    tidy(tmp_path / "missing", "*")


def test_the_names_of_new_folders_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder that holds a new one is fsynced, and again that of the one above, which may have been made before a
    kill; a folder that may be written and not read is no reason to fail."""
    synced: list[Path] = []

    def spy(path: Path) -> None:
        synced.append(path)
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("qlora_cli.disk.sync", spy)
    make_folder(tmp_path / "a" / "b" / "c")
    assert set(synced) == {tmp_path / "a" / "b", tmp_path / "a", tmp_path}
    synced.clear()
    make_folder(tmp_path / "a" / "b" / "c")
    assert set(synced) == {tmp_path / "a" / "b", tmp_path / "a"}


def test_folders_that_cannot_be_synced_are_let_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems answer EINVAL for a folder; for a file, and any other answer, it is an error."""
    (tmp_path / "file").write_text("")
    answer = errno.EINVAL

    def refuse(descriptor: int) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(os, "fsync", refuse)
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")
    answer = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)
