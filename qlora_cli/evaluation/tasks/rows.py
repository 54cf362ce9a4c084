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

_ASKED_AND_ANSWERED = ("doc_to_text", "doc_to_target")


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
    """The rows that would have "None" in an example, or that lm-eval takes none out of for the kind of their values.

    What else is wrong with one is told when it is drawn, if it is.
    """
    given = {key: getattr(task.fewshot_cfg, key) for key in _ASKED_AND_ANSWERED}
    templates = {key: getattr(task.config, key) if own is None else own for key, own in given.items()}
    readers = {
        key: reader(template, key, task.features, choosing=task.config.doc_to_choice is not None)
        for key, template in templates.items()
        if isinstance(template, str) and task.prompt is None and not is_overridden(task, key)
    }
    several, as_usual = bool(task.multiple_input), _writes_as_usual(task)
    numbered = bool(task.fewshot_cfg.doc_to_choice) and not several

    def check(doc: Any) -> None:
        values = {key: read(doc) for key, read in readers.items()}
        if as_usual and not several:
            _refuse_no_text(values.get("doc_to_text", ""), "a text to ask")
        if as_usual:
            _refuse_as_example(values.get("doc_to_target", ""), numbered=numbered)

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
        # A sentence in a script without spaces would be one word, too.
        if not name.isascii() or not (name.strip().replace(" ", "_") if several else name).isidentifier():
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
    """How a row is checked whose question is answered in writing, or that is a text: for what is null, and for what is
    no text where lm-eval takes nothing else."""
    texts = {}
    if _writes_as_usual(task) and not getattr(task, "multiple_input", 0):
        texts["doc_to_text"] = "a text to ask"
    if str(task.OUTPUT_TYPE).startswith("loglikelihood") and not is_overridden(task, "construct_requests"):
        texts["doc_to_target"] = "a text as the answer"
    keys = {"doc_to_text", *texts} if _scores_itself(task) else {"doc_to_text", "doc_to_target"}
    # A function may take what it likes.
    readers = {
        key: value_of(task, key)
        for key in _ASKED_AND_ANSWERED
        if key in keys and isinstance(getattr(task.config, key), str)
    }

    def check(doc: Any) -> None:
        for key, read in readers.items():
            value = read(doc)
            if key in texts:
                _refuse_no_text(value, texts[key])

    return check


def _writes_as_usual(task: Any) -> bool:
    """Whether it is lm-eval that puts prompts together, out of texts."""
    return not is_overridden(task, "fewshot_context") and not is_overridden(task, "build_qa_turn")


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
        if not (several and isinstance(prompt, int)):  # lm-eval writes a number as the end, and asks only texts
            _refuse_no_text(prompt, "a text as the end of each choice" if several else "a text to ask")
        if not own:
            _refuse_answer(answer, choices)

    return check


def _refuse_no_text(value: Any, expected: str) -> None:
    if not isinstance(value, str):
        raise _UnusableError(expected, value)


def _refuse_as_example(answer: Any, *, numbered: bool) -> None:
    """By lm-eval's own rule: a text, the first of several, or the number of a choice where examples have choices."""
    if answer != [] and not (numbered and isinstance(answer, int)):
        _refuse_no_text(answer[0] if isinstance(answer, list) else answer, "a text as the answer of an example")


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
        if isinstance(one, bool) and _is_said_by_another(one, choices):
            of_number = False
        if of_number or (in_words and one in choices):
            continue
        nearly = in_words and one.strip().isdecimal() and int(one) < count
        words = ", or one of them in words" if in_words else ""
        raise _UnusableError(f"the number of one of {count} choices as the answer, from 0{words}", one, nearly=nearly)


def _is_said_by_another(truth: bool, choices: Any) -> bool:
    """Whether the word `true` or `false` is a choice, but not that which the truth value stands for."""
    word = str(truth).lower()
    return any(choice.strip().lower() == word and number != truth for number, choice in enumerate(choices))
