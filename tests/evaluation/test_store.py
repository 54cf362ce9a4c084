"""Answers outlive whatever ends an evaluation, and nothing that goes wrong with them ends one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_cli.data.cache import cache_folder
from qlora_cli.evaluation.answering.questions import Continuation, Likelihood, Prompt
from qlora_cli.evaluation.store import AnswerStore, answers_folder, likelihood_key, text_key

ANSWERS = {f"{number:064x}": Likelihood(-number / 7, number % 2 == 0) for number in range(20)} | {
    f"{number:064x}": f"a text\nof «{number}» \ud800 lines" for number in range(20, 30)
}


def filled(folder: Path, model: str = "m") -> Path:
    """The file of a store with all of ANSWERS."""
    with AnswerStore(folder, model) as store:
        for key, answer in ANSWERS.items():
            store.put(key, answer)
    (file,) = folder.glob("*.jsonl")
    return file


def read(folder: Path, model: str = "m") -> dict[str, object]:
    store = AnswerStore(folder, model)
    return {key: found for key in ANSWERS if (found := store.get(key)) is not None}


def test_answers_come_back_as_they_were_given(tmp_path: Path) -> None:
    """Floats to the last bit, texts with line ends and halves of surrogate pairs."""
    filled(tmp_path)
    assert read(tmp_path) == ANSWERS
    assert all(isinstance(read(tmp_path)[key], type(answer)) for key, answer in ANSWERS.items())


def test_another_model_has_answers_of_its_own(tmp_path: Path) -> None:
    """The fingerprint decides whose answers they are."""
    filled(tmp_path)
    assert read(tmp_path, "another") == {}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_kill_at_any_byte_costs_the_line_it_hit(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What is left is a beginning of the file; what is added to it afterwards is all there."""
    folder = tmp_path_factory.mktemp("answers")
    file = filled(folder)
    whole = file.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    file.write_bytes(whole[:cut])
    there = whole[:cut].count(b"\n") + (cut > 0 and whole[cut : cut + 1] == b"\n")
    assert list(read(folder)) == list(ANSWERS)[:there]
    with AnswerStore(folder, "m") as store:
        for key, answer in ANSWERS.items():
            if store.get(key) is None:
                store.put(key, answer)
    assert read(folder) == ANSWERS


def test_lines_that_are_no_answers_are_passed_over(tmp_path: Path) -> None:
    """Whatever has got into the file, a wrong answer does not come out of it."""
    file = filled(tmp_path)
    key = "f" * 64
    strange = [b"{}", b"[]", b"nul", b"\xff\xfe", b'{"asked": 3, "answer": "x"}']
    strange += [json.dumps({"asked": key, "answer": a}).encode() for a in (None, 1, [1], [1, 2], ["-1", True], {})]
    file.write_bytes(b"\n".join([*strange, file.read_bytes()]))
    assert read(tmp_path) == ANSWERS
    assert AnswerStore(tmp_path, "m").get(key) is None


KILLED = """
import os, signal, sys
from pathlib import Path
from qlora_cli.evaluation.answering.questions import Likelihood
from qlora_cli.evaluation.store import AnswerStore
store = AnswerStore(Path(sys.argv[1]), "m")
for number in range(200):
    store.put(f"{sys.argv[2]}-{number}", Likelihood(-1.0, True))
    if number % 10 == 0:
        store.flush()
print("here", flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
store.flush()
"""


def test_two_processes_and_a_kill(tmp_path: Path) -> None:
    """Two that answer for the same model at once: every answer that was written is read, whoever was killed."""
    run = [sys.executable, "-c", KILLED, str(tmp_path)]
    both = [subprocess.Popen([*run, name], stdout=subprocess.PIPE) for name in ("killed", "whole")]
    for process in both:
        process.communicate(timeout=60)
    store = AnswerStore(tmp_path, "m")
    assert all(store.get(f"whole-{number}") for number in range(200))
    assert all(store.get(f"killed-{number}") for number in range(191))


def test_what_waits_is_written_half_a_second_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that come at once are on disk as soon as the store is asked to keep up, not with the next answer."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    store = AnswerStore(tmp_path, "m")
    for key in "abc":
        store.put(key, "text")
    store.keep_up()
    assert not list(tmp_path.glob("*.jsonl"))
    now += 0.6
    store.keep_up()
    (file,) = tmp_path.glob("*.jsonl")
    assert len(file.read_text().splitlines()) == 3


def test_a_full_disk_ends_the_keeping_and_nothing_else(tmp_path: Path) -> None:
    """The answers are still known to the one that was given them; why they are not kept is said."""
    file = filled(tmp_path)
    file.unlink()
    store = AnswerStore(tmp_path, "m")
    file.symlink_to("/dev/full")
    store.put("a", "b")
    store.flush()
    store.put("c", "d")
    store.flush()
    assert (store.get("a"), store.get("c")) == ("b", "d")
    assert store.trouble == (
        f"answers are not kept any more: {tmp_path}: No space left on device. The evaluation goes on; started again, "
        "it asks anew for those that are not there"
    )


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A file where the folder would be, as in a container without a home."""
    (tmp_path / "file").write_text("")
    store = AnswerStore(tmp_path / "file" / "answers", "m")
    store.put("a", "b")
    assert store.get("a") == "b"
    assert store.trouble is not None
    assert store.trouble.startswith(f"answers are not kept any more: {tmp_path / 'file' / 'answers'}: ")


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of this start are known, and no file is made."""
    monkeypatch.chdir(tmp_path)
    with AnswerStore(None, "m") as store:
        store.put("a", "b")
    assert (store.get("a"), store.trouble) == ("b", None)
    assert not list(tmp_path.rglob("*"))
    assert not list(cache_folder().rglob("*"))


def test_stores_not_used_for_longest_make_room(tmp_path: Path) -> None:
    """All of them together stay below the limit, but for the one that is in use."""
    for number, model in enumerate(("old", "older", "oldest")):
        with AnswerStore(tmp_path, model) as store:
            store.put("a", "b" * 1000)
        (new,) = (file for file in tmp_path.glob("*.jsonl") if file.stat().st_mtime > 10_000)
        os.utime(new, (5000 - number, 5000 - number))
    AnswerStore(tmp_path, "new", limit_bytes=2500)
    assert [AnswerStore(tmp_path, model).get("a") is not None for model in ("old", "older", "oldest")] == [
        True,
        True,
        False,
    ]
    with AnswerStore(tmp_path, "old", limit_bytes=1):
        assert len(list(tmp_path.glob("*.jsonl"))) == 1


def test_a_store_that_is_used_stays(tmp_path: Path) -> None:
    """Reading counts as use."""
    for model in ("read", "left"):
        with AnswerStore(tmp_path, model) as store:
            store.put("a", "b" * 1000)
        for file in tmp_path.glob("*.jsonl"):
            os.utime(file, (5000, 5000))
    AnswerStore(tmp_path, "read")
    AnswerStore(tmp_path, "new", limit_bytes=1500)
    assert AnswerStore(tmp_path, "read").get("a") is not None
    assert AnswerStore(tmp_path, "left").get("a") is None


def test_answers_are_private_and_in_the_users_cache(tmp_path: Path) -> None:
    """Nobody else on the machine reads what a model wrote about private rows."""
    file = filled(answers_folder())
    assert file.is_relative_to(Path(os.environ["XDG_CACHE_HOME"]) / "qlora" / "answers")
    assert file.parent.stat().st_mode & 0o077 == 0


def test_keys_tell_questions_apart() -> None:
    """All that decides an answer is part of the key, and nothing else is."""
    likelihoods = [
        Continuation((1, 2, 3), 1),
        Continuation((1, 2, 3), 2),
        Continuation((1, 2, 4), 1),
        Continuation((1, 2, 3, 3), 1),
    ]
    prompts = [
        (Prompt((1, 2), ("a",), 3), "stops"),
        (Prompt((1, 3), ("a",), 3), "stops"),
        (Prompt((1, 2), ("a", "b"), 3), "stops"),
        (Prompt((1, 2), ("a",), 4), "stops"),
        (Prompt((1, 2), ("a",), 3, {"num_beams": 2}), "stops"),
        (Prompt((1, 2), ("a",), 3), "other stops"),
    ]
    keys = [likelihood_key(asked) for asked in likelihoods] + [text_key(asked, habits) for asked, habits in prompts]
    assert len(set(keys)) == len(keys)
    assert likelihood_key(Continuation((1, 2, 3), 1)) == keys[0]
    assert text_key(Prompt((1, 2), ("a",), 3, {}), "stops") == keys[len(likelihoods)]
