"""Whether every row of a task gives it a question and an answer.

lm-eval looks at the first row when it builds a task. Of the others it finds a fault while it asks, or after all was
answered, or takes it for a wrong answer: a label that is none of the choices scores 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

from qlora_cli.data.files import describe
from qlora_cli.evaluation.tasks.templates import NoValueError, is_overridden, reader, value_of

Check: TypeAlias = Callable[[Any], None]

_OF_EXAMPLES = ("doc_to_text", "doc_to_target")


class BadRow(NamedTuple):
    """What is wrong with a row, by its number from 1.

    `nearly` tells that its answer would be right if it were a number. In CSV, one cell that is no number makes a
    column one of texts: that cell is the fault, not the others.
    """

    number: int
    problem: str
    nearly: bool = False


class _UnusableError(ValueError):
    def __init__(self, expected: str, got: object, *, nearly: bool = False) -> None:
        self.nearly = nearly
        super().__init__(f"expected {expected}, got {'none' if got is None else describe(got)}.")


def bad_questions(task: Any, docs: Any) -> list[BadRow]:
    """The rows that lm-eval could not ask about, or whose answer is none that could be given."""
    check = _check_of_choices(task, docs[0]) if task.OUTPUT_TYPE == "multiple_choice" else _check_of_texts(task)
    found = _bad_rows(docs, check)
    return [bad for bad in found if not bad.nearly] or found


def bad_examples(task: Any, docs: Iterable[Any]) -> list[BadRow]:
    """The rows that would have "None" in an example. What else is wrong with one is told when it is drawn, if it is."""
    templates = {key: getattr(task.fewshot_cfg, key) or getattr(task.config, key) for key in _OF_EXAMPLES}
    readers = [
        reader(template, key, task.features, choosing=True)
        for key, template in templates.items()
        if isinstance(template, str) and not is_overridden(task, key)
    ]

    def check(doc: Any) -> None:
        for read in readers:
            read(doc)

    return _bad_rows(docs, check, only=NoValueError)


def misnamed_columns(task: Any) -> Iterator[tuple[str, str]]:
    """What plainly is to be the name of a column, and is none: lm-eval would take it for the text itself. With the key
    under which it stands, that first."""
    config = task.config
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        name = getattr(config, key)
        if not isinstance(name, str) or name in task.features or is_overridden(task, key):
            continue
        several = key != "doc_to_text" and config.doc_to_choice is not None  # words may be in a name: `Answer Key`
        if not (name.replace(" ", "_") if several else name).isidentifier():
            continue
        if key == "doc_to_target" and (_scores_itself(task) or _is_a_choice(task, name)):
            continue
        yield key, name


def _bad_rows(docs: Iterable[Any], check: Check, *, only: type[Exception] = Exception) -> list[BadRow]:
    found = []
    for number, doc in enumerate(docs, 1):
        try:
            check(doc)
        except (NoValueError, _UnusableError) as error:
            found.append(BadRow(number, str(error), getattr(error, "nearly", False)))
        except Exception as error:  # of a template, or of the task's own code, over this row
            if isinstance(error, only):
                found.append(BadRow(number, f"{type(error).__name__}: {' '.join(str(error).split())}."))
    return found


def _scores_itself(task: Any) -> bool:
    """Whether code of the task's own scores answers: what the right one is, is then its own business."""
    return task.config.process_results is not None or is_overridden(task, "process_results")


def _is_a_choice(task: Any, word: str) -> bool:
    choices = task.config.doc_to_choice
    return word in (choices.values() if isinstance(choices, dict) else choices if isinstance(choices, list) else ())


def _check_of_texts(task: Any) -> Check:
    """How a row is checked whose question is answered in writing, or that is a text: only for what is null."""
    keys = ("doc_to_text",) if _scores_itself(task) else ("doc_to_text", "doc_to_target")
    # A function may take what it likes.
    readers = [value_of(task, key) for key in keys if isinstance(getattr(task.config, key), str)]

    def check(doc: Any) -> None:
        for read in readers:
            read(doc)

    return check


def _check_of_choices(task: Any, first: Any) -> Check:
    text_of, target_of, choices_of = (value_of(task, key) for key in ("doc_to_text", "doc_to_target", "doc_to_choice"))
    own = _scores_itself(task)
    empty_too = own or callable(task.config.doc_to_choice) or is_overridden(task, "doc_to_choice")
    several = False  # beginnings of one end: these are the choices then, and the text says which is right
    with contextlib.suppress(Exception):  # which is told of the row
        several = isinstance(text_of(first), int)

    def check(doc: Any) -> None:
        text, choices = text_of(doc), choices_of(doc)
        _refuse_choices(choices, empty_too=empty_too)
        prompt, answer = (target_of(doc), text) if several else (text, None if own else target_of(doc))
        if not isinstance(prompt, str):
            raise _UnusableError("a text as the end of each choice" if several else "a text to ask", prompt)
        if not own:
            _refuse_answer(answer, choices)

    return check


def _refuse_choices(choices: Any, *, empty_too: bool) -> None:
    if not isinstance(choices, list | tuple) or not choices:
        raise _UnusableError("a list of choices", choices)
    for number, choice in enumerate(choices, 1):
        if not isinstance(choice, str) or not (choice or empty_too):
            raise _UnusableError(f"a text as choice {number} of {len(choices)}", choice)


def _refuse_answer(answer: Any, choices: Any) -> None:
    """By lm-eval's own rule: the number of a choice, several of them in a list, or a choice in words."""
    count = len(choices)
    for one in answer if isinstance(answer, list) else [answer]:
        in_words = isinstance(one, str) and not isinstance(answer, list)
        # True and False stand for the second choice and the first, where there are no others.
        of_number = isinstance(one, int) and 0 <= one < count and (count == 2 or not isinstance(one, bool))
        if of_number or (in_words and one in choices):
            continue
        nearly = in_words and one.strip().isdecimal() and int(one) < count
        words = ", or one of them in words" if in_words else ""
        raise _UnusableError(f"the number of one of {count} choices as the answer, from 0{words}", one, nearly=nearly)
