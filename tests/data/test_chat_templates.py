"""Templates that a recipe names, and the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qlora_cli.data.templates import PLAIN, adopt_template, read_template
from qlora_cli.errors import DataError, ModelError
from tests.support.masks import assistant, encode, ids_and_labels, render_marked, system, user
from tests.support.tokenizers import CHATML, tiny_tokenizer


def plain_tokenizer(**options: Any) -> Any:
    tokenizer = tiny_tokenizer(None, **options)
    adopt_template(tokenizer, None, conversations=True)
    return tokenizer


CHAT = (system("Be brief."), user("How many?"), assistant("Four."), user("And now?"), assistant("Five."))
CHAT_PLAIN = (
    "### System:\nBe brief.\n\n### User:\nHow many?\n\n### Assistant:\n⟦Four.<|im_end|>⟧\n\n"
    "### User:\nAnd now?\n\n### Assistant:\n⟦Five.<|im_end|>⟧\n\n"
)


@pytest.mark.parametrize("add_bos", [False, True])
def test_the_plain_template(add_bos: bool) -> None:
    """A heading for each turn, eos after each answer, and bos first if the tokenizer puts one before a text."""
    tokenizer = plain_tokenizer(add_bos=add_bos)
    expected = ("<|bos|>" if add_bos else "") + CHAT_PLAIN
    assert render_marked(tokenizer, *CHAT) == [expected]
    encoded = encode(tokenizer, {"messages": list(CHAT)})
    ids, labels = ids_and_labels(tokenizer, expected)
    assert (encoded.input_ids(0).tolist(), encoded.labels(0).tolist()) == (ids, labels)


def test_the_plain_template_writes_tools_and_calls() -> None:
    """Tools first; a call after what is said with it, and learned; what it answers is not."""
    call = {"function": {"name": "add", "arguments": {"a": 2}}}
    chat = (
        user("Q"),
        assistant("", tool_calls=[call]),
        {"role": "tool", "content": "4"},
        assistant("Well.", tool_calls=[call, call]),
    )
    assert render_marked(plain_tokenizer(), *chat, tools=({"name": "add"}, {"name": "sub"})) == [
        '### Tools:\n{"name": "add"}\n{"name": "sub"}\n\n### User:\nQ\n\n'
        '### Assistant:\n⟦{"name": "add", "arguments": {"a": 2}}<|im_end|>⟧\n\n### Tool:\n4\n\n'
        '### Assistant:\n⟦Well.\n{"name": "add", "arguments": {"a": 2}}\n{"name": "add", "arguments": {"a": 2}}'
        "<|im_end|>⟧\n\n"
    ]


def test_which_template_is_taken() -> None:
    """The recipe's, else the tokenizer's own, else plain for conversations and none for the rest."""
    for given, value, conversations, taken in (
        (CHATML, None, True, CHATML),
        (CHATML, "plain", True, PLAIN),
        (CHATML, "plain", False, PLAIN),
        ({"default": CHATML}, "{{ messages }}", True, "{{ messages }}"),
        (None, None, True, PLAIN),
        (None, None, False, None),
        (None, CHATML, False, CHATML),
    ):
        tokenizer = tiny_tokenizer(given)
        adopt_template(tokenizer, value, conversations=conversations)
        assert tokenizer.chat_template == taken


def test_the_plain_template_needs_an_end() -> None:
    """Without an end of sequence no answer would end."""
    tokenizer = tiny_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError) as caught:
        adopt_template(tokenizer, "plain", conversations=True)
    assert str(caught.value) == (
        "the tokenizer has no end-of-sequence token, so a model trained with the plain chat template could not learn "
        "to stop. Set dataset.chat_template to a template that ends an answer with a token of its own."
    )


def test_a_template_from_a_file(tmp_path: Path) -> None:
    """As it is in the file, with or without a byte order mark; templates with generation tags are templates."""
    path = tmp_path / "chat.jinja"
    for text in (CHATML + "\n", "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}"):
        for mark in (b"", b"\xef\xbb\xbf"):
            path.write_bytes(mark + text.encode())
            assert read_template(str(path)) == text
    assert read_template("plain") == PLAIN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, ": the template cannot be read: No such file or directory."),
        (b"", ": the template is empty."),
        (b" \n", ": the template is empty."),
        (b"{{ messages }}\n\n\xff", ", line 3: the template is not UTF-8 text. Save it as UTF-8."),
        (b"{{ messages }}\n{{ a | nofilter }}", ", line 2: not a Jinja template: No filter named 'nofilter'."),
        (
            b"{{ messages",
            ", line 1: not a Jinja template: unexpected end of template, expected 'end of print statement'.",
        ),
        (b'{"a": 1}', ": expected a Jinja template that writes `messages`, which this one does not mention."),
    ],
)
def test_what_is_wrong_with_a_template(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file and the line are named, as is the recipe's field."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("chat.jinja").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_template(str(tmp_path / "chat.jinja"))
    assert str(caught.value) == "dataset.chat_template: chat.jinja" + message


def test_a_folder_is_no_template(tmp_path: Path) -> None:
    """Nor is anything else that cannot be read."""
    with pytest.raises(DataError, match=r"the template cannot be read: Is a directory\.$"):
        read_template(str(tmp_path))


def test_what_is_wrong_with_a_template_in_the_recipe() -> None:
    """It has lines, but no file."""
    with pytest.raises(DataError) as caught:
        read_template("{{ messages }}\n{% if %}")
    assert str(caught.value).startswith("dataset.chat_template, line 2: not a Jinja template: ")
