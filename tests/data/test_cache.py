"""Encoded rows on disk: whole or not there, found again, never in the way."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from qlora_cli.data.cache import cache_folder, cached
from qlora_cli.data.encoded import LEARNED, ROW, summarise
from qlora_cli.data.store import StoredFacts, StoreWriter, read_store
from qlora_cli.errors import DataError, OutputError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder: Path, text: str = "made") -> None:
    (folder / "text").write_text(text)


def read(folder: Path) -> str | None:
    path = folder / "text"
    return path.read_text() if path.exists() else None


def left_over(kept: str | None = None) -> list[str]:
    return sorted(p.name for p in cache_folder().iterdir() if p.name not in (kept, f"{kept}.lock"))


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the XDG base directory specification has caches; a relative path there means nothing."""
    assert cache_folder() == tmp_path / "cache" / "qlora"
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == Path.home() / ".cache" / "qlora"


def test_an_entry_is_made_once() -> None:
    """The second time it is read, not made; another key is another entry."""
    assert cached("a", write, read) == "made"

    def not_again(folder: Path) -> None:
        raise AssertionError("made twice")

    assert cached("a", not_again, read) == "made"
    assert cached("b", lambda folder: write(folder, "other"), read) == "other"
    assert (cache_folder().stat().st_mode & 0o077) == 0  # rows may be private


def test_a_broken_entry_is_made_anew() -> None:
    """As after a power cut, or somebody's hands."""
    cached("a", write, read)
    (cache_folder() / "a" / "text").unlink()
    assert cached("a", lambda folder: write(folder, "again"), read) == "again"


@pytest.mark.parametrize("kind", ["file", "link", "dead link"])
def test_what_is_no_entry_is_replaced(tmp_path: Path, kind: str) -> None:
    """Whatever stands in its place; where a link leads, nothing is touched."""
    cached("b", write, read)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    entry = cache_folder() / "a"
    match kind:
        case "file":
            entry.write_text("")
        case "link":
            entry.symlink_to(tmp_path / "other")
        case _:
            entry.symlink_to(tmp_path / "nowhere")
    assert cached("a", write, read) == "made"
    assert entry.is_dir()
    assert not entry.is_symlink()
    assert (tmp_path / "other" / "mine").exists()


def test_an_entry_in_use_stays_with_its_lock() -> None:
    """Without its lock, two processes would make the same entry at once."""
    cached("a", write, read)
    for name in ("a", "a.lock"):
        os.utime(cache_folder() / name, (0, 0))
    cached("a", write, read)
    cached("b", write, read)
    assert left_over("b") == ["a", "a.lock"]


def test_what_a_killed_process_left_is_gone_the_next_time() -> None:
    """Half of the same entry, which may be as large as a disk; what another process is at stays."""
    cached("b", write, read)
    for name in (".encoding-a-killed", ".encoding-c-at-work"):
        (cache_folder() / name).mkdir()
    cached("a", write, read)
    assert left_over("a") == [".encoding-c-at-work", "b", "b.lock"]


def test_what_fails_leaves_nothing() -> None:
    """Neither an entry nor half of one."""

    def fail(folder: Path) -> None:
        write(folder)
        raise DataError("row 7: wrong")

    with pytest.raises(DataError, match="row 7"):
        cached("a", fail, read)
    assert left_over() == ["a.lock"]
    assert cached("a", write, read) == "made"


def test_a_full_disk_is_told() -> None:
    """With the folder, and what to do."""

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError) as caught:
        cached("a", full, read)
    assert str(caught.value) == (
        f"{cache_folder()}: the encoded rows cannot be kept there: No space left on device. Make room, or set "
        "XDG_CACHE_HOME to a folder elsewhere."
    )


def test_without_a_place_or_a_key_it_works_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose home is a file, or with rows that may be others next time: made every time, and gone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert cached(None, write, read) == "made"
    assert not cache_folder().exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached("a", write, read) == "made"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert cached("a", write, read) == "made"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def homeless(path: Path) -> Path:
    """As where the user has a number only, in some containers."""
    raise RuntimeError("Could not determine home directory.")


def test_several_processes_make_it_once(tmp_path: Path) -> None:
    """The others wait, and read what the first has made."""
    marks = tmp_path / "marks"
    marks.mkdir()

    def slowly(folder: Path) -> None:
        (marks / str(os.getpid())).touch()
        time.sleep(0.3)
        write(folder)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=cached, args=("a", slowly, read)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(marks.iterdir())) == 1


def test_what_nobody_uses_makes_room() -> None:
    """After a month, and at once what a killed process left; what was used lately stays."""
    for key in ("old", "new"):
        cached(key, write, read)
    (cache_folder() / ".encoding-killed").mkdir()
    (cache_folder() / ".encoding-at-work").mkdir()
    for name, days in (("old", 31), ("old.lock", 31), (".encoding-killed", 2), ("new", 29)):
        when = time.time() - days * 86_400
        os.utime(cache_folder() / name, (when, when))
    cached("newest", write, read)
    assert left_over("newest") == [".encoding-at-work", "new", "new.lock"]


def store(folder: Path) -> StoredFacts:
    """Three rows in two parts: [1, 2*, 3*], [] and [7*, 8], where * is learned."""
    enders = np.array([3], dtype=np.int32)
    with StoreWriter(folder) as writer:
        for words, lengths in (([1, 2 | LEARNED, 3 | LEARNED], [3, 0]), ([7 | LEARNED, 8], [2])):
            array = np.array(words, dtype=np.uint32)
            writer.append(array, summarise(array, np.array(lengths, dtype=np.int64), enders))
        facts = StoredFacts("text", [3], skipped=1, problems=["row 4: wrong"])
        writer.finish(facts)
    return facts


def test_a_store_gives_back_what_was_written(tmp_path: Path) -> None:
    """Tokens, records and facts; also once the folder is gone, for a run must not end because of that."""
    written = store(tmp_path)
    found = read_store(tmp_path)
    assert found is not None
    facts, tokens, rows = found
    assert facts == written
    assert rows["start"].tolist() == [0, 3, 3]
    assert rows["length"].tolist() == [3, 0, 2]
    assert rows["learned"].tolist() == [2, 0, 1]
    assert rows["last"].tolist() == [3, 0, 7]
    assert rows["turns"].tolist() == [1, 0, 0]
    assert rows["stretches"].tolist() == [1, 0, 1]
    assert rows["highest"].tolist() == [3, 0, 8]
    for path in tmp_path.iterdir():
        path.unlink()
    assert tokens.read(1, 3).tolist() == [2 | LEARNED, 3 | LEARNED, 7 | LEARNED]
    assert tokens.read(0, 0).tolist() == []
    with pytest.raises(OSError, match="expected 8 bytes, got 4"):
        tokens.read(4, 2)


def test_the_fingerprint_is_of_what_is_learned(tmp_path: Path) -> None:
    """Of ids, mask and the ends of rows, however they came in chunks."""

    def fingerprint(name: str, *chunks: tuple[list[int], list[int]]) -> str:
        folder = tmp_path / name
        folder.mkdir()
        facts = StoredFacts("text", [])
        with StoreWriter(folder) as writer:
            for words, lengths in chunks:
                array = np.array(words, dtype=np.uint32)
                writer.append(array, summarise(array, np.array(lengths), np.array([], dtype=np.int32)))
            writer.finish(facts)
        return facts.fingerprint

    learned = 5 | int(LEARNED)
    first = fingerprint("a", ([1, learned, 3], [2, 1]))
    assert fingerprint("b", ([1, learned], [2]), ([3], [1])) == first
    assert fingerprint("c", ([1, 5, 3], [2, 1])) != first
    assert fingerprint("d", ([1, learned, 3], [1, 2])) != first
    assert fingerprint("e", ([1, learned, 4], [2, 1])) != first


@pytest.mark.parametrize(
    ("name", "lost"),
    [("tokens.bin", 1), ("tokens.bin", 4), ("rows.bin", 1), ("rows.bin", ROW.itemsize), ("facts.json", 1)],
)
def test_half_a_store_is_none(tmp_path: Path, name: str, lost: int) -> None:
    """A file that is cut short or missing is seen before a token is read, also where a whole row is gone."""
    store(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-lost])
    assert read_store(tmp_path) is None
    (tmp_path / name).unlink()
    assert read_store(tmp_path) is None


def test_an_unfinished_store_is_none(tmp_path: Path) -> None:
    """What a killed process left is not taken for rows."""
    with StoreWriter(tmp_path) as writer:
        writer.append(
            np.array([1], dtype=np.uint32), summarise(np.array([1], dtype=np.uint32), np.array([1]), np.array([]))
        )
    assert read_store(tmp_path) is None
    (tmp_path / "facts.json").write_text(json.dumps([]))
    assert read_store(tmp_path) is None
