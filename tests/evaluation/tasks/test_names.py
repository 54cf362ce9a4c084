"""Names as people write them."""

from __future__ import annotations

import pytest

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.index import Listed
from qlora_cli.evaluation.tasks.names import choose, few, listing


def test_names_are_taken_apart_and_counted_once(index: dict[str, Listed]) -> None:
    """Commas and blanks separate names; what is named twice is one; a pattern stands for all that match."""
    assert choose(["mmlu, arc_easy", "arc_easy,piqa,"], index) == ["mmlu", "arc_easy", "piqa"]
    assert choose(["arc_eas*"], index) == ["arc_easy"]
    assert "mmlu_anatomy" in choose(["mmlu_*"], index)


def test_what_only_a_pattern_brought_is_known(index: dict[str, Listed]) -> None:
    """Not what was asked for by its name as well, before it or after."""
    chosen = choose(["mmlu_anatom?,mmlu_virolog?", "mmlu_anatomy"], index)
    assert chosen == ["mmlu_anatomy", "mmlu_virology"]
    assert chosen.patterns == {"mmlu_virology": "mmlu_virolog?"}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("ARC-Easy", "arc_easy"),
        ("SST-2", "sst2"),
        ("hellswag", "hellaswag"),
        ("mmlu_anatmy", "mmlu_anatomy"),
        ("winogrand", "winogrande"),
        ("openbook_qa", "openbookqa"),
        ("pica", "piqa"),
    ],
)
def test_misspelt_names_get_the_one_that_was_meant(index: dict[str, Listed], written: str, meant: str) -> None:
    """Other spellings, and slips, lead to the name."""
    with pytest.raises(TaskError) as caught:
        choose([written], index)
    assert str(caught.value) == f"{written!r} is no task, group or tag that lm-eval knows; did you mean {meant}?"


def test_a_word_leads_to_what_has_to_do_with_it(index: dict[str, Listed]) -> None:
    """`arc` is no name; lm-eval's folder of that name holds what was meant."""
    with pytest.raises(TaskError, match=r"did you mean ai2_arc or arc_easy or arc_challenge\?"):
        choose(["arc"], index)


def test_all_unknown_names_are_told_at_once(index: dict[str, Listed]) -> None:
    """One message for all of them."""
    with pytest.raises(TaskError) as caught:
        choose(["mmlu,qzqzqz", "hellswag", "zz*zz"], index)
    assert str(caught.value).splitlines() == [
        "'qzqzqz' is no task, group or tag that lm-eval knows. qlora eval --list shows those there are.",
        "'hellswag' is no task, group or tag that lm-eval knows; did you mean hellaswag?",
        "no task, group or tag matches 'zz*zz'. qlora eval --list shows those there are.",
    ]


def test_no_name(index: dict[str, Listed]) -> None:
    """Nothing between the commas is no request."""
    with pytest.raises(TaskError, match="no task is named"):
        choose([" , "], index)


def test_listing(index: dict[str, Listed]) -> None:
    """A pattern, or a part of a name; with the kind, the number of tasks, and what a task asks."""
    (line,) = listing("arc_easy", index)[:1]
    assert (line.name, line.kind, line.tasks, line.output_type) == ("arc_easy", "task", 1, "multiple_choice")
    (group,) = listing("mmlu", index)[:1]
    assert (group.name, group.kind, group.tasks) == ("mmlu", "group", 57)
    assert [line.name for line in listing("glu?", index)] == ["glue"]
    assert len(listing(None, index)) == len(index)
    with pytest.raises(TaskError, match="no task, group or tag that lm-eval knows"):
        listing("qzqzqz", index)


def test_of_many_names_a_few_are_told() -> None:
    """One more is told, and not counted as the only other."""
    assert few(list("abcd")) == "a, b, c, d"
    assert few(list("abcde")) == "a, b, c and 2 others"
