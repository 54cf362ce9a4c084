"""Files of random rows, end to end: what is learned is what the assistant said, and all else is told by file and row.

Users, systems and tools speak in capitals and assistants in small letters, so that a letter of theirs that is learned
shows. Names of columns and of special tokens are written in both.
"""

from __future__ import annotations

import datetime
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, LlamaConfig, PreTrainedTokenizerFast

from qlora_cli.check_view import facts_json
from qlora_cli.console import visible
from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.files import BadRow, read_file
from qlora_cli.data.formats import Format
from qlora_cli.data.row_encoder import RowEncoder
from qlora_cli.data.sources import SourceRow, open_source
from qlora_cli.errors import RequestError
from qlora_cli.recipe.schema import FORMAT_COLUMNS, DatasetSection, Recipe
from qlora_cli.training.checking import check_data
from qlora_cli.training.preparation import prepare
from tests.data.test_files_fuzz import KINDS as BROKEN_KINDS
from tests.data.test_files_fuzz import MUTATIONS, good, packed
from tests.support.masks import DAY
from tests.support.models import save_tiny_model
from tests.support.random_rows import END, Draw, Json, write
from tests.support.templates import family_tokenizer

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".json.zst", ".csv.zst", ".tsv.gz")
FORMATS = tuple(FORMAT_COLUMNS)
FILES = 9  # of each kind and format
ROWS = 8  # of a file, at most
BROKEN_FILES = 25  # of each kind
CHECKED_FILES = 10  # of each format

CONFIG = LlamaConfig(vocab_size=512, max_position_embeddings=10_000_000)

TOKENIZERS = {name: family_tokenizer(name) for name in ("chatml", "qwen-2.5", "qwen-3", "tagged, without end")}


class OneByOne:
    """What each row of a file is by itself: its number, and its sequences as ids and mask; nothing for a bad one."""

    def __init__(self, section: DatasetSection, tokenizer: PreTrainedTokenizerFast, format: Format) -> None:
        source = open_source("dataset.train", section.train_sources[0])
        encoder = RowEncoder(source, format, section, tokenizer, today=DAY)
        self.read = self.skipped = 0
        self.sequences: list[tuple[int, list[int], list[bool]]] = []
        self.rows: dict[int, dict[str, Json]] = {}
        for number, row in read_file(Path(section.train), "rows"):
            self.read += 1
            chunk = encoder.encode([SourceRow(0, number, row)])
            self.skipped += len(chunk.problems)
            if not isinstance(row, BadRow):
                self.rows[number] = row
            start = 0
            for length in chunk.records["length"]:
                words = chunk.words[start : start + length]
                start += length
                self.sequences.append((number, (words & 0x7FFFFFFF).tolist(), (words >> 31).astype(bool).tolist()))


def sequences(rows: EncodedRows) -> list[tuple[int, list[int], list[bool]]]:
    found = []
    for position, number in enumerate(rows.row_numbers.tolist()):
        ids, mask = rows.read(position)
        found.append((number, ids.tolist(), mask.tolist()))
    return found


def check_text(text: str, path: Path) -> None:
    """A message names the file, is text, and does nothing to a terminal as it is shown."""
    assert path.name in text, text
    text.encode()
    steering = {c for c in visible(text) if unicodedata.category(c) in ("Cc", "Cs")}
    assert steering <= {"\n", "\t"}, ascii(text)


def said_in(row: dict[str, Json], format: Format) -> str:
    """What is to be learned of a good row, by rules of its own: each answer and its end."""
    match format:
        case "messages" | "conversations":
            said = []
            turns = row[format]
            for turn in json.loads(turns) if isinstance(turns, str) else turns:  # as tables have them
                openai = format == "messages" or turn.get("from") is None
                speaks, says = ("role", "content") if openai else ("from", "value")
                content = turn[says]
                if turn[speaks] in ("assistant", "gpt") and turn.get("weight") != 0:
                    said.append(content if isinstance(content, str) else "".join(part["text"] for part in content))
            return "".join(text + END for text in said)
        case "classification":
            label = row["label"]
            label = int(label) if isinstance(label, float) else label
            return (str(label).lower() if isinstance(label, bool) else str(label)) + END
        case _:
            return str(row["output" if format == "alpaca" else "completion"]) + END


def check_learned(alone: OneByOne, tokenizer: PreTrainedTokenizerFast, format: Format, exact: bool) -> None:
    """That of each sequence only what the assistant says is learned; all of it, if `exact`."""
    for number, ids, mask in alone.sequences:
        learned = tokenizer.decode([i for i, told in zip(ids, mask, strict=True) if told])
        if format == "text":
            text = tokenizer.decode(ids)
            said = alone.rows[number]["text"]
            assert text == said if said.endswith(END) else text == said + END
            assert mask[1:] == [True] * (len(mask) - 1)
            continue
        spoken = learned.replace("<|IM_END|>", "")
        theirs = set(spoken) & set("ABCXYZ")
        assert not theirs, ascii(learned[:300])
        assert END in learned
        if exact:
            expected = said_in(alone.rows[number], format)
            assert learned[:300] == expected[:300]
            assert len(learned) == len(expected)


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("format", FORMATS)
def test_random_rows_are_learned_skipped_or_refused_by_name(tmp_path: Path, suffix: str, format: Format) -> None:
    """With skip, what is kept is what each good row is by itself, under its number; with error, a row is named."""
    draw = Draw(f"{suffix} {format}")
    for number in range(FILES):
        path = tmp_path / str(number) / f"rows{suffix}"
        path.parent.mkdir()
        write(path, [draw.row(format, strict=number % 2 == 0) for _ in range(draw.randrange(1, ROWS + 1))])
        name = draw.choice(list(TOKENIZERS))
        fields = {"train": str(path), "max_length": 1_000_000, "format": draw.choice((format, "auto"))}
        results = {}
        for on_bad_row in ("skip", "error"):
            section = DatasetSection.model_validate({**fields, "on_bad_row": on_bad_row})
            try:
                results[on_bad_row] = prepare(section, TOKENIZERS[name], CONFIG, seed=0, today=DAY)[0].whole
            except RequestError as error:
                check_text(str(error), path)
        if not results:
            continue
        rows = results["skip"]
        alone = OneByOne(section, TOKENIZERS[name], rows.parts[0].format)
        same = sequences(rows) == alone.sequences  # by itself: pytest would compare thousands of tokens
        assert same
        assert rows.skipped == alone.skipped
        assert rows.count(np.arange(len(rows))) + rows.skipped == alone.read
        assert len(rows.problems) == min(rows.skipped, 5)
        for problem in rows.problems:
            check_text(problem, path)
        assert ("error" in results) == (rows.skipped == 0)
        check_learned(alone, TOKENIZERS[name], rows.parts[0].format, name == "chatml")


@pytest.mark.parametrize("suffix", BROKEN_KINDS)
def test_broken_files_are_skipped_over_or_refused_by_name(tmp_path: Path, suffix: str) -> None:
    """Of a file whose bytes are broken, training sees the rows that read well one by one, or a message names it."""
    draw = Draw(suffix)
    start = good(suffix)
    kept = refused = 0
    for number in range(BROKEN_FILES):
        path = tmp_path / str(number) / f"rows{suffix}"
        path.parent.mkdir()
        path.write_bytes(packed(draw.choice(MUTATIONS)(start, draw), suffix))
        section = DatasetSection(train=str(path), max_length=1_000_000, on_bad_row="skip")
        try:
            rows = prepare(section, TOKENIZERS["chatml"], CONFIG, seed=0, today=DAY)[0].whole
        except RequestError as error:
            check_text(str(error), path)
            refused += 1
            continue
        alone = OneByOne(section, TOKENIZERS["chatml"], rows.parts[0].format)
        assert sequences(rows) == alone.sequences
        assert (rows.skipped, len(rows) + rows.skipped) == (alone.skipped, alone.read)
        kept += 1
    assert min(kept, refused) > 0


@pytest.mark.parametrize("format", FORMATS)
def test_a_check_finds_what_training_refuses(tmp_path: Path, format: Format) -> None:
    """Of random rows a check raises nothing, and has a problem to tell where and only where training would stop."""
    tokenizer = TOKENIZERS["chatml"]
    base = save_tiny_model(tmp_path / "base", tokenizer=tokenizer)
    config = AutoConfig.from_pretrained(base)
    draw = Draw(f"check {format}")
    for number in range(CHECKED_FILES):
        path = tmp_path / str(number) / "rows.jsonl"
        path.parent.mkdir()
        write(path, [draw.row(format, strict=True) for _ in range(draw.randrange(1, ROWS + 1))])
        data = {"train": str(path), "max_length": 64}
        data |= {"on_bad_row": draw.choice(("skip", "error")), "overlong": draw.choice(("error", "drop", "truncate"))}
        data |= {"supervise": draw.choice(("all_assistant", "last_assistant", "everything"))}
        data |= {"packing": draw.random() < 0.5, "validation_fraction": draw.choice((None, 0.3))}
        recipe = Recipe.model_validate({"base_model": str(base), "dataset": data, "output_dir": str(tmp_path / "run")})
        facts = check_data(recipe, examples=2)
        for problem in facts.problems:
            check_text(problem, path)
        for notice in facts.notices:
            notice.encode()
        facts_json(path, facts)
        try:
            prepare(recipe.dataset, tokenizer, config, seed=recipe.training.seed, today=datetime.date.today())
            refusal = None
        except RequestError as error:
            refusal = str(error)
        assert refusal in facts.problems if refusal else not facts.problems
