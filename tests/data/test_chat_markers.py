"""Markers as stretches of a text."""

from __future__ import annotations

import pytest

from qlora_cli.data.markers import Markers
from tests.support.tokenizers import tiny_tokenizer

MARKERS = Markers(tiny_tokenizer(extra_special=("</s>", "<|end|>", "<|endoftext|>", "\n\n")))


@pytest.mark.parametrize(
    ("text", "begin", "end"),
    [
        ("a</s>", 1, 5),
        ("a</s>b<|end|>", 6, 13),
        ("<|endoftext|>", 0, 13),
        ("<|end|>", 0, 7),
        ("ab\n\n", 4, 4),
        ("", 0, 0),
    ],
)
def test_a_marker_at_the_end_of_a_text(text: str, begin: int, end: int) -> None:
    """It is found from both of its sides and reaches no further than the text; whitespace is none."""
    assert MARKERS.begin(text, len(text)) == begin
    assert MARKERS.end(text, begin) == end


@pytest.mark.parametrize(("at", "uncut"), [(0, 0), (2, 2), (3, 2), (8, 2), (9, 9), (10, 10), (11, 11)])
def test_a_cut_goes_round_a_marker(at: int, uncut: int) -> None:
    """Before it, if it would go through it; the ends of a marker are no cut, nor is the end of the text."""
    assert MARKERS.uncut("ab<|end|>cd", at) == uncut
    assert MARKERS.uncut("a</s>", 5) == 5
