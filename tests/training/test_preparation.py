"""From sources to the rows that training sees: what is held out, mixed, refused and doubted."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from qlora_cli.data.encoded import EncodedRows
from qlora_cli.errors import DataError
from qlora_cli.recipe.schema import DatasetSection
from qlora_cli.training.doubts import doubts
from qlora_cli.training.preparation import Split, encode_all, hold_out, lay_out, prepare
from tests.support.encoded import DAY, rows_of_tokens
from tests.support.tokenizers import tiny_tokenizer

CONFIG = LlamaConfig(vocab_size=400, max_position_embeddings=256)
# Earlier answers are cut once others follow.
REWRITING = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{{ message['content'] if loop.last or message['role'] == 'user' else '…' }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: Iterable[Any]) -> str:
    Path(name).write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(Path(name).absolute())


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def ready(tokenizer: Any = None, *, seed: int = 0, **fields: Any) -> tuple[Split, Split | None, DatasetSection]:
    section = DatasetSection(**fields)
    return *prepare(section, tokenizer or tiny_tokenizer(), CONFIG, seed=seed, today=DAY), section


def refusal(tokenizer: Any = None, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        ready(tokenizer, **fields)
    return str(caught.value)


def doubted(tokenizer: Any = None, **fields: Any) -> list[str]:
    tokenizer = tokenizer or tiny_tokenizer()
    train, validation, section = ready(tokenizer, **fields)
    return list(doubts(train, validation, section, tokenizer))


# ------------------------------------------------------------------------------------------- Held-out rows


def rows(number: int) -> EncodedRows:
    return rows_of_tokens(*[([1, 2], [False, True])] * number)


@pytest.mark.parametrize(("fraction", "held_out"), [(0.25, 5), (0.001, 1), (0.999, 19)])
def test_a_fraction_is_held_out(fraction: float, held_out: int) -> None:
    """A split is the same for the same seed, loses no row, keeps line numbers and leaves a row on each side."""
    train, validation = hold_out(rows(20), fraction, 1)
    assert (len(train), len(validation)) == (20 - held_out, held_out)
    assert sorted([*train.row_numbers, *validation.row_numbers]) == list(range(1, 21))
    for part in (train, validation):
        assert part.row_numbers.tolist() == sorted(part.row_numbers)
    assert np.array_equal(hold_out(rows(20), fraction, 1)[0].row_numbers, train.row_numbers)
    if held_out == 5:
        assert not np.array_equal(hold_out(rows(20), fraction, 2)[0].row_numbers, train.row_numbers)


def test_the_rows_held_out_stay_the_same() -> None:
    """Those that a seed holds out are part of what a run was: these must never change."""
    assert hold_out(rows(20), 0.25, 42)[1].row_numbers.tolist() == [3, 7, 11, 13, 17]


def test_one_row_cannot_be_split() -> None:
    """Holding out a fraction of one row is refused, of one row that became two sequences as well."""
    path = write("r.jsonl", [pair("Q", "A")])
    assert refusal(train=path, validation_fraction=0.5) == (
        "r.jsonl: dataset.validation_fraction needs at least 2 rows, got 1."
    )
    path = write("r.jsonl", [chat("Q", "A", "Q", "B")])
    assert refusal(tiny_tokenizer(REWRITING), train=path, validation_fraction=0.5).endswith("got 1.")


def test_the_sequences_of_a_row_stay_together() -> None:
    """What one conversation became is all learned or all held out: else it would be evaluated on what it has seen."""
    path = write("r.jsonl", [chat("Q", f"A{n}", "Q", f"B{n}") for n in range(20)])
    train, validation, _ = ready(tiny_tokenizer(REWRITING), train=path, validation_fraction=0.3)
    assert validation is not None
    assert (len(train.kept), len(validation.kept)) == (28, 12)
    assert not set(train.kept.row_numbers) & set(validation.kept.row_numbers)
    assert (train.ready().rows, train.ready().sequences) == (14, 28)


# ------------------------------------------------------------------------------------------- Several sources


def test_sources_of_different_kinds_are_one_split() -> None:
    """Each in its own format, one after another; rows are named with their files, and weights are kept."""
    a = write("a.jsonl", [pair("Q", "one"), pair("Q", "two")])
    b = write("b.jsonl", [chat("Q", "three")])
    Path("c").mkdir()
    for name in "xy":
        write(f"c/{name}.jsonl", [{"text": f"the text of {name}"}])
    train, _, _ = ready(train=[a, {"path": b, "weight": 2.0}, {"path": str(Path("c").absolute()), "weight": 0.5}])
    kept = train.kept
    assert kept.part_of.tolist() == [0, 0, 1, 2, 2]
    assert [part.weight for part in kept.parts] == [1.0, 2.0, 0.5]
    assert [kept.where(i) for i in range(5)] == [
        "a.jsonl, line 1",
        "a.jsonl, line 2",
        "b.jsonl, line 1",
        "c/x.jsonl, line 1",
        "c/y.jsonl, line 1",
    ]
    assert (
        kept.counted(np.arange(5)) == "5 rows (a.jsonl line 1, 2; b.jsonl line 1; c/x.jsonl line 1; c/y.jsonl line 1)"
    )
    assert kept.counted(np.array([3])) == "1 row (c/x.jsonl line 1)"
    tokenizer = tiny_tokenizer()
    said = [tokenizer.decode(kept.input_ids(i)[kept.labels(i) != -100]) for i in range(5)]
    assert said[:3] == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]
    assert said[3].endswith("text of x<|im_end|>")
    assert [(s.source, s.format, s.rows) for s in train.ready().sources] == [
        ("a.jsonl", "prompt_completion", 2),
        ("b.jsonl", "messages", 1),
        ("c", "text", 2),
    ]
    assert kept.is_text.tolist() == [False, False, False, True, True]


def test_a_mixture_has_a_fingerprint_of_its_own() -> None:
    """Of its sources in their order; a changed byte in one of them changes it."""

    def fingerprint(*names: str) -> str:
        section = DatasetSection(train=[str(Path(name).absolute()) for name in names])
        return encode_all(
            lay_out("dataset.train", section.train_sources, section), section, tiny_tokenizer(), today=DAY
        ).fingerprint

    write("a.jsonl", [pair("Q", "one")])
    write("b.jsonl", [pair("Q", "two")])
    first = fingerprint("a.jsonl", "b.jsonl")
    assert fingerprint("a.jsonl", "b.jsonl") == first
    assert len({first, fingerprint("b.jsonl", "a.jsonl"), fingerprint("a.jsonl")}) == 3
    write("b.jsonl", [pair("Q", "two!")])
    assert fingerprint("a.jsonl", "b.jsonl") != first


# ------------------------------------------------------------------------------------------- Refused, doubted


def test_labels_that_are_all_the_same_are_refused() -> None:
    """Of rows that differ; two labels are a task, and one row many times is a way of trying things out."""
    same = [{"text": f"text {n}", "label": "yes"} for n in range(4)]
    assert refusal(train=write("r.jsonl", same)) == (
        "r.jsonl: all 4 labels are the same ('yes'): there is nothing to tell apart. Look at the column of labels, and "
        "at whether these are all rows."
    )
    assert ready(train=write("r.jsonl", [*same, {"text": "text", "label": "no"}]))[0].kept.format == "classification"
    assert len(ready(train=write("r.jsonl", same[:1] * 3))[0].kept) == 3


def test_answers_that_are_all_the_same_are_a_note() -> None:
    """It may be meant so: a model that always says one thing."""
    path = write("r.jsonl", [pair(f"Question {n}", "I cannot say.") for n in range(3)])
    assert doubted(train=path) == ["all 3 training rows have the same answer ('I cannot say.'), whatever the prompt"]
    assert doubted(train=write("r.jsonl", [pair("Q", "A")] * 3)) == []
    path = write("r.jsonl", [pair(f"Question {n}", "I cannot say.") for n in range(3)])
    assert doubted(train=path, supervise="everything") == []


def test_skipped_rows_are_told() -> None:
    """How many of which split, and why of the first."""
    bad = ["{\n", {"prompt": "Q"}, {"prompt": "Q", "completion": None}]
    train = write("t.jsonl", [pair("Q", "A"), *bad, *["[]\n"] * 4, pair("Q", "B")])
    validation = write("v.jsonl", [pair("Q", "C"), "5\n"])
    assert doubted(train=train, validation=validation, on_bad_row="skip") == [
        "7 rows of t.jsonl could not be read and were skipped:\n"
        '  t.jsonl, line 2: expected one JSON object, got "{" (expecting property name enclosed in double quotes at '
        "column 2).\n"
        "  t.jsonl, line 3: completion: expected text, got nothing.\n"
        "  t.jsonl, line 4: completion: expected text, got null.\n"
        "  t.jsonl, line 5: expected one JSON object, got a list of 0.\n"
        "  t.jsonl, line 6: expected one JSON object, got a list of 0.\n"
        "  …",
        "1 row of v.jsonl could not be read and was skipped:\n"
        "  v.jsonl, line 2: expected one JSON object, got the number 5.",
    ]


def test_rows_that_became_several_sequences_are_told() -> None:
    """How many, and why."""
    path = write("r.jsonl", [chat("Q", "A"), chat("Q", "A", "Q", "B")])
    assert doubted(tiny_tokenizer(REWRITING), train=path) == [
        "the chat template renders earlier turns differently once others follow: 1 row of several answers became a "
        "sequence for each, as the model sees it when it gives that answer"
    ]
    assert doubted(tiny_tokenizer(REWRITING), train=path, supervise="last_assistant") == []


def test_cut_answers_are_counted() -> None:
    """Those that lose a part, and those that lose a whole answer, which is more than its end."""
    long = "the end " * 30
    path = write("r.jsonl", [chat("Q", "A"), chat("Q", long), chat("Q", "A", long, "B"), chat("Q", "A", "Q", long)])
    (note,) = doubted(train=path, max_length=48, overlong="truncate")
    assert note == "3 of 4 training rows lose part of their answer at dataset.max_length, 1 of them whole answers"


# ------------------------------------------------------------------------------------------- Templates and dates


def test_conversations_of_a_base_model_get_the_plain_template() -> None:
    """Which is then the tokenizer's, to be saved with the adapter; prompts and completions stay as they are."""
    tokenizer = tiny_tokenizer(None)
    train, _, _ = ready(tokenizer, train=write("r.jsonl", [chat("Q", "A")]))
    assert tokenizer.decode(train.kept.input_ids(0)) == "### User:\nQ\n\n### Assistant:\nA<|im_end|>\n\n"
    assert "### " in tokenizer.chat_template
    bare = tiny_tokenizer(None)
    ready(bare, train=write("r.jsonl", [pair("Q", "A")]))
    assert bare.chat_template is None


def test_a_template_of_the_recipe_goes_before_the_tokenizers() -> None:
    """A file, for rows of any format that has a prompt."""
    Path("t.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}")
    tokenizer = tiny_tokenizer()
    train, _, _ = ready(
        tokenizer, train=write("r.jsonl", [pair("Q", "A")]), chat_template=str(Path("t.jinja").absolute())
    )
    assert tokenizer.decode(train.kept.input_ids(0)) == "<user>Q<|im_end|><assistant>A<|im_end|>"
    assert tokenizer.chat_template == Path("t.jinja").read_text()


def test_the_date_is_the_callers() -> None:
    """So that a run that goes on tomorrow learns what it began with."""
    section = DatasetSection(train=write("r.jsonl", [chat("Q", "A")]))
    dated = "{{ strftime_now('%d.%m.') }}" + str(tiny_tokenizer().chat_template)
    texts = []
    for days in (0, 0, 1):
        tokenizer = tiny_tokenizer(dated)
        train, _ = prepare(section, tokenizer, CONFIG, seed=0, today=DAY + datetime.timedelta(days=days))
        texts.append((tokenizer.decode(train.kept.input_ids(0))[:6], train.kept.fingerprint))
    assert texts[0] == texts[1]
    assert [text for text, _ in texts] == ["02.01.", "02.01.", "03.01."]
    assert texts[2][1] != texts[0][1]


def test_the_plain_template_is_told() -> None:
    """Where nobody asked for it: a base model without a template, and conversations."""
    path = write("r.jsonl", [chat("Q", "A")])
    note = (
        "the base model has no chat template: conversations are written with the plain one, which is saved with the "
        "adapter; set dataset.chat_template for another"
    )
    assert doubted(tiny_tokenizer(None), train=path) == [note]
    assert doubted(tiny_tokenizer(None, add_bos=True), train=path) == [note]
    assert doubted(tiny_tokenizer(None), train=path, chat_template="plain") == []
    assert doubted(tiny_tokenizer(None), train=write("p.jsonl", [pair("Q", "A")])) == []


def test_markers_that_are_no_tokens_are_told() -> None:
    """A template of another model's: its markers are words to this one."""
    path = write("r.jsonl", [chat("Q", "A")])
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    notes = doubted(tiny_tokenizer(), train=path, chat_template=template)
    assert notes[0] == (
        "dataset.chat_template writes <|end|>, <|assistant|>, which are no tokens of this tokenizer: the model learns "
        "them letter by letter, and whatever generates with it has to be told to stop there"
    )
    known = tiny_tokenizer(extra_special=("<|end|>", "<|assistant|>"))
    assert doubted(known, train=path, chat_template=template) == []
