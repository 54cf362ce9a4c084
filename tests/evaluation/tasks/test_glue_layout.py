"""GLUE's own TSV files as the hub's nyu-mll/glue."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import datasets
import pytest

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.data_root import DataRoot
from qlora_cli.evaluation.tasks.layouts.found import DatasetName

_MNLI_DEV = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label\n"
    "0\tp\tq\tg\tx\tx\tx\tx\tOne.\tTwo.\tneutral\tneutral\tneutral\tneutral\tneutral\tneutral\n"
)
_STSB = (
    "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    "0\tg\tf\t2012\t1\tnone\tnone\tOne.\tTwo.\t3.25\n"
)


def _read(folder: Path, config: str, split: str) -> datasets.Dataset:
    root = DataRoot(folder)
    found = root.find(DatasetName("nyu-mll/glue", config), split)
    assert found is not None
    return root.read(found, frozenset())


def _write(folder: Path, name: str, content: str) -> None:
    file = folder / "glue" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode())


@pytest.mark.parametrize(
    ("config", "split", "file", "content", "row", "classes"),
    [
        (
            "cola",
            "validation",
            "CoLA/dev.tsv",
            'gj04\t1\t\t"Quoted", they say.\n',
            {"sentence": '"Quoted", they say.', "label": 1},
            ["unacceptable", "acceptable"],
        ),
        (
            "sst2",
            "train",
            "SST-2/train.tsv",
            "sentence\tlabel\nfine . \t1\n",
            {"sentence": "fine . ", "label": 1},
            ["negative", "positive"],
        ),
        (
            "mrpc",
            "validation",
            "MRPC/dev.tsv",
            '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said "a.\tShe said b"\n',
            {"sentence1": 'He said "a.', "sentence2": 'She said b"', "label": 1},
            ["not_equivalent", "equivalent"],
        ),
        (
            "qqp",
            "validation",
            "QQP/dev.tsv",
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n5\t1\t2\tWhy?\tHow?\t0\n",
            {"question1": "Why?", "question2": "How?", "label": 0},
            ["not_duplicate", "duplicate"],
        ),
        (
            "mnli",
            "validation_mismatched",
            "MNLI/dev_mismatched.tsv",
            _MNLI_DEV,
            {"premise": "One.", "hypothesis": "Two.", "label": 1},
            ["entailment", "neutral", "contradiction"],
        ),
        (
            "qnli",
            "validation",
            "QNLI/dev.tsv",
            "index\tquestion\tsentence\tlabel\n0\tWho?\tMe.\tnot_entailment\n",
            {"question": "Who?", "sentence": "Me.", "label": 1},
            ["entailment", "not_entailment"],
        ),
        (
            "rte",
            "train",
            "RTE/train.tsv",
            "9\tOne.\tTwo.\tentailment\n",  # cut out of the original, without its header
            {"sentence1": "One.", "sentence2": "Two.", "label": 0},
            ["entailment", "not_entailment"],
        ),
        (
            "wnli",
            "validation",
            "WNLI/dev.tsv",
            "index\tsentence1\tsentence2\tlabel\n0\tOne.\tTwo.\t1\n",
            {"sentence1": "One.", "sentence2": "Two.", "label": 1},
            ["not_entailment", "entailment"],
        ),
        ("stsb", "validation", "STS-B/dev.tsv", _STSB, {"sentence1": "One.", "sentence2": "Two.", "label": 3.25}, None),
        (
            "rte",
            "test",
            "RTE/test.tsv",
            "index\tsentence1\tsentence2\n0\tOne.\tTwo.\n",
            {"sentence1": "One.", "sentence2": "Two.", "label": -1},
            ["entailment", "not_entailment"],
        ),
    ],
)
def test_columns_and_types_are_those_of_the_hub(
    tmp_path: Path, config: str, split: str, file: str, content: str, row: dict[str, Any], classes: list[str] | None
) -> None:
    """Every task's table, with its own header or none, becomes the hub's columns; quotes are letters."""
    _write(tmp_path, file, content)
    dataset = _read(tmp_path, config, split)
    assert dataset[0] == row | {"idx": 0}
    kind = datasets.ClassLabel(names=classes) if classes else datasets.Value("float32")
    assert dataset.features["label"] == kind
    assert dataset.features["idx"] == datasets.Value("int32")


def test_rows_are_counted_and_blank_lines_are_none(tmp_path: Path) -> None:
    """`idx` counts rows from 0, with Windows' line ends too."""
    _write(tmp_path, "SST-2/dev.tsv", "sentence\tlabel\r\na\t0\r\n\r\nb\t1\r\n")
    dataset = _read(tmp_path, "sst2", "validation")
    assert dataset["idx"][:] == [0, 1]
    assert dataset["sentence"][:] == ["a", "b"]


def test_cut_off_rows_of_qqp_are_left_out_as_on_the_hub(tmp_path: Path) -> None:
    """QQP has a few such rows; the hub's has not, and counts them."""
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    _write(tmp_path, "QQP/dev.tsv", f"{header}5\t1\t2\tWhy?\n6\t1\t2\tWhy?\tHow?\t1\n")
    dataset = _read(tmp_path, "qqp", "validation")
    assert dataset["idx"][:] == [1]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "RTE/dev.tsv: there is no row in it. Expected the columns label, sentence1, sentence2."),
        (
            "index\tsentence1\tsentence2\tlabel\n",
            "RTE/dev.tsv: there is no row in it. Expected the columns label, sentence1, sentence2.",
        ),
        (
            "index\tpremise\tlabel\n",
            "RTE/dev.tsv, line 1: expected a header with the columns label, sentence1, sentence2, "
            'got "index", "premise", "label".',
        ),
        (
            "index\tsentence1\tsentence2\tlabel\n0\tOne.\n",
            "RTE/dev.tsv, line 2: expected the columns label, sentence1, sentence2, got only 2 cells.",
        ),
        (
            "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\tb\tmaybe\n",
            'RTE/dev.tsv, line 3: label: expected entailment, not_entailment or a number from 0 to 1, got "maybe".',
        ),
    ],
)
def test_broken_files_are_told_with_their_line(tmp_path: Path, content: str, problem: str) -> None:
    """File and line, and what was expected."""
    _write(tmp_path, "RTE/dev.tsv", content)
    with pytest.raises(TaskError) as caught:
        _read(tmp_path, "rte", "validation")
    assert problem in str(caught.value)


def test_other_bytes_are_told(tmp_path: Path) -> None:
    """A file in Latin-1 is named with the line."""
    file = tmp_path / "glue" / "SST-2" / "dev.tsv"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"sentence\tlabel\nfine\t1\ncaf\xe9\t0\n")
    with pytest.raises(TaskError, match=r"SST-2/dev\.tsv, line 3: expected UTF-8, got other bytes"):
        _read(tmp_path, "sst2", "validation")
    file.write_bytes(b"sentence\tl\xe4bel\nfine\t1\n")
    with pytest.raises(TaskError) as caught:
        _read(tmp_path, "sst2", "validation")
    assert str(caught.value) == f"{file}, line 1: expected UTF-8, got other bytes. Save the file as UTF-8."


def test_what_is_no_text_is_told(tmp_path: Path) -> None:
    """Without the name of an error of ours."""
    file = tmp_path / "glue" / "SST-2" / "dev.tsv"
    file.parent.mkdir(parents=True)
    file.write_bytes("sentence\tlabel\nfine\t1\n".encode("utf-16"))
    with pytest.raises(TaskError) as caught:
        _read(tmp_path, "sst2", "validation")
    assert str(caught.value) == f"{file}, line 1: expected UTF-8, got UTF-16. Save the file as UTF-8."


@pytest.mark.parametrize("name", ["glue", "nyu-mll/glue"])
def test_both_names_are_read_alike(tmp_path: Path, name: str) -> None:
    """The old name of the dataset is that of the folder, too, whose tables are no plain ones."""
    _write(tmp_path, "SST-2/train.tsv", 'sentence\tlabel\n"fine\t1\n')
    _write(tmp_path, "sst2/train.tsv", "sentence\tlabel\nanother\t0\n")
    root = DataRoot(tmp_path)
    found = root.find(DatasetName(name, "sst2"), "train")
    assert found is not None
    assert root.read(found, frozenset()).to_list() == [{"sentence": '"fine', "label": 1, "idx": 0}]


def test_packed_files(tmp_path: Path) -> None:
    """As gzip leaves them."""
    file = tmp_path / "glue" / "SST-2" / "dev.tsv.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(b"sentence\tlabel\nfine\t1\n"))
    assert _read(tmp_path, "sst2", "validation")["sentence"][:] == ["fine"]
