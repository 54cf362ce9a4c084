"""Files of results come to be there whole, and never in place of another."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from threading import Barrier, Thread

import pytest

from qlora_cli.errors import RunError
from qlora_cli.evaluation.new_files import base_of, samples_file, write_new


def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system such as FAT, where a file has one name."""

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("os.link", refuse)


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_is_taken_is_left_as_it_is(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next free one is taken: by a file, a folder or a link that leads nowhere."""
    if not links:
        without_links(monkeypatch)
    file = tmp_path / "new" / "results_a.b.json"
    found = [write_new(file, [text]) for text in ("one", "two")]
    (tmp_path / "new" / "results_a.b-3.json").mkdir()
    (tmp_path / "new" / "results_a.b-4.json").symlink_to("nothing")
    found.append(write_new(file, ["th", "ree"]))
    assert [path.name for path in found] == ["results_a.b.json", "results_a.b-2.json", "results_a.b-5.json"]
    assert [path.read_text() for path in found] == ["one", "two", "three"]
    assert len(list(file.parent.iterdir())) == 5


@pytest.mark.parametrize("links", [True, False])
def test_none_of_many_at_once_is_lost(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else writes to that name at that moment."""
    if not links:
        without_links(monkeypatch)
    barrier = Barrier(8)

    def write(number: int) -> None:
        def pieces() -> object:
            yield str(number)
            barrier.wait()
            yield "!"

        write_new(tmp_path / "r.json", pieces())  # type: ignore[arg-type]

    threads = [Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == [f"{number}!" for number in range(8)]
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", *(f"r-{number}.json" for number in range(2, 9))}


def test_the_longest_name_is_no_hindrance(tmp_path: Path) -> None:
    """What is written to before it has its name has a short one."""
    assert write_new(tmp_path / f"{'x' * 250}.json", ["a"]).read_text() == "a"


def test_a_name_that_cannot_be(tmp_path: Path) -> None:
    """Told, and nothing is left beside it."""
    with pytest.raises(RunError, match=r"x\.json: could not be written: File name too long$"):
        write_new(tmp_path / f"{'x' * 251}.json", ["a"])
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_take_its_name_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the name has to be taken first, an empty file is not left there."""
    without_links(monkeypatch)

    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(RunError, match=r"could not be written: Input/output error$"):
        write_new(tmp_path / "a.json", ["a"])
    assert list(tmp_path.iterdir()) == []


def test_samples_are_called_after_results() -> None:
    """Those of the base after results that there are none of."""
    results = Path("out/results_a_b.json")
    assert samples_file(results, "my task") == Path("out/samples_my__task_a-b.jsonl")
    assert samples_file(base_of(results), "t") == Path("out/samples_t_a-b-base.jsonl")
