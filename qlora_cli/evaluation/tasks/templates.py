"""What lm-eval takes out of a row for a task: by its templates, its columns, or its functions."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import env

from qlora_cli.evaluation.tasks.layouts.found import Needed

Reader: TypeAlias = Callable[[Any], Any]

_TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix")
_WORD = re.compile(r"[A-Za-z_]\w*")
_FIELD = re.compile(r"\{\{(.*?)\}\}|\{%(.*?)%\}", re.DOTALL)


class NoValueError(ValueError):
    """A row has null where a value would be taken: lm-eval writes "None" in its place."""


def columns_in_templates(config: Mapping[str, Any]) -> Needed:
    """Every word in the templates of a task that may be the name of a column."""
    return frozenset(word for key in _TEMPLATES if isinstance(config.get(key), str) for word in _words(config[key]))


def key_that_takes(name: str, config: Any) -> str:
    """The template of a task's configuration that takes the column `name`."""
    taking = (key for key in _TEMPLATES if isinstance(text := getattr(config, key, None), str) and name in _words(text))
    return next(taking, "its templates")


def value_of(task: Any, key: str) -> Reader:
    """How a task takes its `doc_to_text`, `doc_to_target` or `doc_to_choice` out of a row.

    lm-eval compiles a template anew for every row, which takes thirty times as long as to fill it in.
    """
    template = getattr(task.config, key)
    if is_overridden(task, key) or not isinstance(template, str) or task.prompt is not None:
        method: Reader = getattr(task, key)
        return method
    return reader(template, key, task.features, choosing=task.config.doc_to_choice is not None)


def is_overridden(task: Any, method: str) -> bool:
    """Whether the class of a task has a method of its own in the place of lm-eval's."""
    return getattr(type(task), method, None) is not getattr(ConfigurableTask, method)


def reader(template: str, key: str, columns: Collection[str], *, choosing: bool) -> Reader:
    """How lm-eval takes a value out of a row by the name of a column, or by a template.

    What is returned raises NoValueError where null would be taken. One that a template looks at only to leave it out,
    as in `{% if hint %}{{hint}}{% endif %}`, is nothing of the kind.
    """
    if template in columns:

        def column(doc: Any) -> Any:
            if doc[template] is None:
                raise NoValueError(f"expected a value in the column {template!r}, got none.")
            return doc[template]

        return column
    compiled = env.overlay(finalize=_not_null).from_string(template)
    convert = _CONVERSIONS[key]

    def filled(doc: Any) -> Any:
        try:
            text = compiled.render(**doc)
        except NoValueError:
            empty = [name for name in dict.fromkeys(_words(template)) if name in doc and doc[name] is None]
            where = f"in the column {', '.join(map(repr, empty))}" if empty else f"wherever {key} takes one"
            raise NoValueError(f"expected a value {where}, got none.") from None
        return convert(text, choosing)

    return filled


def _words(template: str) -> list[str]:
    fields = [inner for pair in _FIELD.findall(template) for inner in pair]
    # Without braces it is the name of a column, which may be of several words, or plain text.
    return [word for inner in fields or [template] for word in _WORD.findall(inner)] + ([] if fields else [template])


def _not_null(value: Any) -> Any:
    """What a template is about to write."""
    if value is None:
        raise NoValueError
    return value


def _text(text: str, choosing: bool) -> Any:
    return ast.literal_eval(text) if choosing and text.isdigit() else text


def _target(text: str, choosing: bool) -> Any:
    """A rendered target as lm-eval understands it: the number of a choice, a list of such, or words."""
    if choosing and text.isdigit():
        return ast.literal_eval(text)
    with contextlib.suppress(SyntaxError, ValueError):
        return ast.literal_eval(text) if text[:1] == "[" and text[-1:] == "]" else text
    return text


def _choices(text: str, _: bool) -> Any:
    return ast.literal_eval(text)


_CONVERSIONS: dict[str, Callable[[str, bool], Any]] = {
    "doc_to_text": _text,
    "doc_to_target": _target,
    "doc_to_choice": _choices,
}
