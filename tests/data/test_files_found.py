"""Which files a folder or a glob stands for, packed ones among them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_cli.errors import DataError
from qlora_cli.recipe.data_files import data_kind, data_stem, data_suffix, find_data_files
from qlora_cli.recipe.paths import looks_local
from qlora_cli.recipe.peek import guess_run_folder, guess_train, guess_validation, possible_rows


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}\n")


def refusal(name: str) -> str:
    with pytest.raises(DataError) as caught:
        find_data_files(name)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind", "suffix", "stem"),
    [
        ("a.jsonl", ".jsonl", ".jsonl", "a"),
        ("a.b.JSONL.GZ", ".jsonl", ".JSONL.GZ", "a.b"),
        ("a.tsv.zst", ".tsv", ".tsv.zst", "a"),
        ("a.parquet", ".parquet", ".parquet", "a"),
        ("a.parquet.gz", None, ".gz", "a.parquet"),
        ("a.gz", None, ".gz", "a"),
        ("a", None, "", "a"),
        (".jsonl", None, "", ".jsonl"),
    ],
)
def test_the_kind_of_a_name(name: str, kind: str | None, suffix: str, stem: str) -> None:
    """Is the same, packed or not; Parquet is packed within."""
    path = Path(name)
    assert (data_kind(path), data_suffix(path), data_stem(path)) == (kind, suffix, stem)


def test_packed_and_not_in_one_folder() -> None:
    """Of one kind they are read together; hidden files are not."""
    make("d/b.jsonl", "d/a.jsonl.gz", "d/c.JSONL.zst", "d/.b.jsonl", "d/._b.jsonl", "d/notes.gz")
    assert [path.name for path in find_data_files("d")] == ["a.jsonl.gz", "b.jsonl", "c.JSONL.zst"]
    assert [path.name for path in find_data_files("d/*.jsonl*")] == ["a.jsonl.gz", "b.jsonl"]
    assert [path.name for path in find_data_files("d/.b.jsonl")] == [".b.jsonl"]


def test_what_cannot_be_read_together() -> None:
    """Other kinds, packed or not; and a file beside itself packed, which would be learned twice."""
    make("d/a.csv.gz", "d/b.jsonl")
    assert refusal("d") == (
        "d: expected files of one kind, got a.csv.gz, b.jsonl. Name the ones to use with a glob such as *.csv.gz."
    )
    make("e/a.jsonl", "e/a.jsonl.gz")
    assert refusal("e") == (
        "e: a.jsonl and a.jsonl.gz look like the same rows twice, packed and not. Name the ones to use with a glob "
        "such as *.jsonl, or give one of them another name."
    )
    assert [path.name for path in find_data_files("e/*.jsonl")] == ["a.jsonl"]
    make("f/x.jsonl", "f/g/x.jsonl.gz")
    assert len(find_data_files("f/**/*.jsonl*")) == 2
    make("a.txt.gz")
    assert refusal("a.txt.gz") == "a.txt.gz: expected a .jsonl, .json, .csv, .tsv or .parquet file, got a.txt.gz."


def test_a_misspelt_packed_file() -> None:
    """Is told the name that was meant."""
    make("train.jsonl.gz")
    assert refusal("trian.jsonl.gz").endswith("; did you mean train.jsonl.gz?")
    assert refusal("train.jsonl").endswith("; did you mean train.jsonl.gz?")


def test_packed_files_are_no_hub_names() -> None:
    """Their endings tell them from those."""
    assert looks_local("data/train.jsonl.gz")
    assert looks_local("train.csv.ZST")
    assert not looks_local("org/name.gz")


def test_packed_files_are_guessed() -> None:
    """As others are, with the folder of the run named without their endings."""
    make("gsm8k_train.jsonl.gz", "gsm8k_test.jsonl.gz", "x.json.gz", ".train.jsonl")
    assert guess_train(Path()) == "gsm8k_train.jsonl.gz"
    assert possible_rows(Path()) == ["gsm8k_test.jsonl.gz", "gsm8k_train.jsonl.gz", "x.json.gz"]
    assert guess_validation("gsm8k_train.jsonl.gz") == ["gsm8k_test.jsonl.gz"]
    assert guess_run_folder("gsm8k_train.jsonl.gz", "model") == "runs/gsm8k"
