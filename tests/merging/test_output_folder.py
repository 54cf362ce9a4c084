"""Where a merged model goes: what is refused beforehand, and that it is there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_cli.disk import staging_folder
from qlora_cli.errors import OutputError, RunError
from qlora_cli.merging.output_folder import check_output, check_space, writing


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(given: str | Path) -> str:
    with pytest.raises(OutputError) as told:
        check_output(Path(given))
    return str(told.value)


# ------------------------------------------------------------------------------------------- Beforehand


def test_what_may_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing there, however deep; an empty folder; what a link leads to; the home folder's; always as a full path."""
    here = Path.cwd()
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    Path("dangling").symlink_to("later")
    monkeypatch.setenv("HOME", str(here))
    for given, output in (
        ("new", "new"),
        ("a/b/c", "a/b/c"),
        ("empty", "empty"),
        ("empty/../empty/", "empty"),
        ("link", "empty"),
        ("link/new", "empty/new"),
        ("dangling", "later"),
        ("~/new", "new"),
    ):
        assert check_output(Path(given)) == here / output
    assert names(here) == ["dangling", "empty", "link"]


def test_what_is_in_the_way() -> None:
    """Each with what is there, and what to do."""
    here = Path.cwd()
    Path("full").mkdir()
    Path("full/file").touch()
    way_out = "is not empty. Name another folder, or delete it: nothing is ever written over"
    assert refused("full") == f"--output: {here}/full {way_out}"
    assert refused(".") == f"--output: {here} {way_out}"
    assert refused("") == refused(".")
    file = f"{here}/full/file"
    assert refused("full/file") == f"--output: {file} is a file; expected an empty folder, or nothing, there"
    assert refused("full/file/a/b") == f"--output: {file} is no folder, so {file}/a/b cannot be made"
    assert refused("x" * 300) == f"--output: {'x' * 300} cannot be a folder: File name too long"
    # The name that it has while it is written is longer.
    assert refused("x" * 250) == f"--output: {'x' * 250} cannot be a folder: File name too long"
    Path("loop").symlink_to("loop")
    assert refused("loop/x").startswith("--output: loop/x cannot be a folder: ")
    assert refused("/") == "--output: / cannot be a folder: it has no name of its own"


def test_the_current_folder() -> None:
    """An empty one would be replaced under the feet of whoever stands in it."""
    assert refused(".") == (
        f"--output: {Path.cwd()} is the current folder, which would be replaced. Name one that is to be made in it"
    )


@pytest.mark.parametrize("given", ["new", "a/b", "empty"])
def test_a_folder_that_may_not_be_written(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the folder around it that has to be."""
    Path("empty").mkdir()
    here = Path.cwd()
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    assert refused(given) == f"--output: {here} cannot be written, so {here / given} cannot be made there"
    assert asked == [(here, os.W_OK | os.X_OK)]


def test_room_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is needed and what is free are told; what a killed merge left counts as free, for it is taken away."""
    asked = []
    free = 5 * 10**9

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    output = Path.cwd() / "a/b"
    spare = 64 * 2**20
    check_space(output, free - spare)
    with pytest.raises(OutputError) as told:
        check_space(output, free - spare + 1, saving="; wait")
    assert str(told.value) == (
        f"--output: 5.00 GB are needed to write {output}, and 5.00 GB are free there. Free some, or name a folder on "
        "another disk; wait"
    )
    assert asked == [Path.cwd()] * 2
    left = staging_folder(output) / ".original"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"x" * 1000)
    check_space(output, free - spare + 1000)
    with pytest.raises(OutputError):
        check_space(output, free - spare + 1001)


# ------------------------------------------------------------------------------------------- Writing


def test_it_is_there_when_it_is_whole() -> None:
    """Until then it has another name; the folders around it are made, and what a killed merge left is gone."""
    output = Path.cwd() / "a/b/out"
    stale = staging_folder(output) / "sub/stale"
    stale.parent.mkdir(parents=True)
    stale.touch()
    with writing(output) as folder:
        assert names(folder) == []
        (folder / "sub").mkdir()
        (folder / "sub/file").write_text("whole")
        assert not output.exists()
        assert folder.parent == output.parent
    assert (output / "sub/file").read_text() == "whole"
    assert names(output.parent) == ["out"]


def _fail(folder: Path, error: type[BaseException]) -> None:
    (folder / "half").touch()
    raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("there", ["", "a", "a/b/out"])
def test_after_a_failure_nothing_is_there(error: type[BaseException], there: str) -> None:
    """Neither it, nor what was half written, nor folders made for it; those that were there before are."""
    output = Path.cwd() / "a/b/out"
    Path(there).mkdir(parents=True, exist_ok=True)
    with pytest.raises(error), writing(output) as folder:
        _fail(folder, error)
    assert not output.exists()
    assert names(Path.cwd()) == (["a"] if there else [])
    assert there != "a" or names(Path("a")) == []


def test_what_came_to_be_there_meanwhile_stays() -> None:
    """A file, or a folder with something in it; an empty folder gives way."""
    output = Path.cwd() / "out"
    told = f"--output: something else came to be at {output} meanwhile, and nothing is ever written over"

    def write(before: Callable[[], object]) -> None:
        with writing(output) as folder:
            (folder / "new").touch()
            before()

    def refused(before: Callable[[], object]) -> None:
        with pytest.raises(OutputError) as error:
            write(before)
        assert str(error.value) == told
        assert names(Path.cwd()) == ["out"]

    refused(lambda: output.write_text("mine"))
    assert output.read_text() == "mine"
    output.unlink()
    refused(lambda: (output.mkdir(), (output / "mine").touch()))
    assert names(output) == ["mine"]
    with pytest.raises(OutputError) as error, writing(output):
        pytest.fail("began to write")
    assert str(error.value) == told
    assert names(Path.cwd()) == ["out"]
    shutil.rmtree(output)
    write(output.mkdir)
    assert names(output) == ["new"]


def test_a_mount_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is empty, and cannot be replaced: that is told before anything is written."""
    output = Path.cwd() / "out"
    output.mkdir()

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", busy)
        with pytest.raises(OutputError) as told, writing(output):
            pytest.fail("began to write")
    assert str(told.value) == (
        f"--output: {output} is a mount point, which cannot be replaced. Name a folder that is to be made in it, such "
        f"as {output}/merged"
    )
    assert names(Path.cwd()) == ["out"]


def test_one_merge_at_a_time() -> None:
    """A second one is refused, also if it began to look before the first had begun, and disturbs nothing."""
    output = Path.cwd() / "out"
    with writing(output) as folder:
        (folder / "first").touch()
        told = f"--output: another merge is writing {output} at this moment"
        assert refused(output) == told
        with pytest.raises(OutputError) as error, writing(output):
            pytest.fail("began to write")
        assert str(error.value) == told
        with writing(output.with_name("other")):
            pass
    assert names(output) == ["first"]
    assert names(Path.cwd()) == ["other", "out"]


def test_a_disk_that_refuses() -> None:
    """The output is named, and why."""
    output = Path.cwd() / "out"
    with pytest.raises(RunError) as told, writing(output):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(told.value) == f"{output}: could not be written: No space left on device"
    assert names(Path.cwd()) == []
    staging_folder(output).write_text("in the way")
    with pytest.raises(RunError, match="out: could not be written: File exists"), writing(output):
        pytest.fail("began to write")
