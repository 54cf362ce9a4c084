"""Generation arguments are read as lm-eval's `hf` backend reads them."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_cli.evaluation.decoding_terms import Terms, decoding_terms


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, Terms(("</s>",), 256)),
        ({"until": "\n"}, Terms(("\n", "</s>"), 256)),
        ({"until": ["\n", "</s>", ""], "max_new_tokens": "7"}, Terms(("\n", "</s>"), 7)),
        ({"max_gen_toks": 5, "max_tokens": 9}, Terms(("</s>",), 5)),
        ({"do_sample": False, "temperature": 0.8, "top_p": 0.9}, Terms(("</s>",), 256)),
        ({"temperature": 0.0, "num_beams": 1}, Terms(("</s>",), 256)),
        ({"num_beams": 4}, Terms(("</s>",), 256, sampling={"do_sample": False, "num_beams": 4})),
        (
            {"temperature": 0.8, "top_p": 0.9},
            Terms(("</s>",), 256, sampling={"do_sample": True, "temperature": 0.8, "top_p": 0.9}, drawn=True),
        ),
        ({"do_sample": True, "top_p": 0.9}, Terms(("</s>",), 256, contradicted=True)),
        ({"max_length": 50}, Terms(("</s>",), 256, max_length=50)),
    ],
)
def test_arguments_become_terms(arguments: dict[str, Any], expected: Terms) -> None:
    """Stop texts with the end of texts, lengths by any of their names, greedy unless a temperature says otherwise."""
    before = {name: list(value) if isinstance(value, list) else value for name, value in arguments.items()}
    assert decoding_terms(arguments, "</s>") == expected
    assert arguments == before  # a task's own, of which every prompt has the same
