"""Chat templates from a recipe, and a plain one for base models that have none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_cli.data.chat import has_template
from qlora_cli.data.markers import leading_bos
from qlora_cli.errors import DataError, ModelError
from qlora_cli.recipe.data_files import shown_path

_FIELD = "dataset.chat_template"
_BOS = "{{ bos_token }}"  # before the plain template, for tokenizers that begin every text with it
# Such as <|im_end|>, <end_of_turn> and [/INST].
_MARKER = re.compile(r"<[|\uff5c][^\s<>{}|\uff5c]+[|\uff5c]>|<(?:start|end)_of_turn>|\[/?INST\]")
_PLAIN_WORD = "plain"

# For base models: a heading for every turn, on a line of its own, and the tokenizer's eos after every answer.
#
#     ### System:
#     Be brief.
#
#     ### User:
#     What is two and two?
#
#     ### Assistant:
#     Four.</s>
#
# Each turn is written once, whatever follows. Tools open the text, one JSON object a line; calls follow the content.
PLAIN = (
    "{% if tools %}{{ '### Tools:\\n' }}"
    "{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ ('\\n' if message['content'] or not loop.first else '') + (call['function'] or call) | tojson }}"
    "{% endfor %}"
    "{{ (eos_token if message['role'] == 'assistant' else '') + '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


def adopt_template(tokenizer: Any, value: str | None, *, conversations: bool) -> None:
    """Give the tokenizer the chat template that `dataset.chat_template` names.

    By default it keeps its own; where it has none and the rows are conversations, it gets the plain one. Raises
    DataError as `read_template` does, and ModelError if the plain one has no end of sequence to end an answer with.
    """
    if value is None and (has_template(tokenizer) or not conversations):
        return
    source = PLAIN if value is None else read_template(value)
    tokenizer.chat_template = _plain_for(tokenizer) if source == PLAIN else source


def is_plain(source: object) -> bool:
    """Whether this is the plain template, as a tokenizer has it."""
    return isinstance(source, str) and source.removeprefix(_BOS) == PLAIN


def unknown_markers(source: str, tokenizer: Any) -> list[str]:
    """What a template writes in the look of a special token, but the tokenizer has no token for, in order."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return [marker for marker in dict.fromkeys(_MARKER.findall(source)) if marker not in known]


def read_template(value: str) -> str:
    """The chat template that `dataset.chat_template` names: plain, the template itself, or an absolute path.

    Raises DataError, with file and line, for a file that cannot be read and for what is no template of messages.
    """
    if value == _PLAIN_WORD:
        return PLAIN
    inline = "{{" in value or "{%" in value
    source = value if inline else _read(Path(value))
    name = _FIELD if inline else f"{_FIELD}: {shown_path(Path(value))}"
    try:
        render_jinja_template(conversations=[], chat_template=source)  # compiles it, and no more
    except TemplateSyntaxError as error:
        raise DataError(f"{name}, line {error.lineno}: not a Jinja template: {error.message}") from error
    if "messages" not in source:
        raise DataError(f"{name}: expected a Jinja template that writes `messages`, which this one does not mention.")
    return source


def _read(path: Path) -> str:
    name = f"{_FIELD}: {shown_path(path)}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: the template cannot be read: {error.strerror or error}.") from error
    if not data.strip():
        raise DataError(f"{name}: the template is empty.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}, line {line}: the template is not UTF-8 text. Save it as UTF-8.") from error


def _plain_for(tokenizer: Any) -> str:
    """The plain template, after bos where the tokenizer puts one before a text."""
    if not tokenizer.eos_token:
        raise ModelError(
            "the tokenizer has no end-of-sequence token, so a model trained with the plain chat template could not "
            "learn to stop. Set dataset.chat_template to a template that ends an answer with a token of its own."
        )
    return PLAIN if leading_bos(tokenizer) is None else _BOS + PLAIN
