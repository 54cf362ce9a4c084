"""Whether a task that was built can be asked about all of its rows."""

from __future__ import annotations

import ast
import contextlib
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_cli.errors import TaskError
from qlora_cli.evaluation.tasks.layouts.found import Needed, refuse_problems
from qlora_cli.evaluation.tasks.loaded import TaskOptions
from qlora_cli.evaluation.tasks.supply import Supply
from qlora_cli.recipe.data_files import shown_path

_TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix")
_WORD = re.compile(r"[A-Za-z_]\w*")
_FIELD = re.compile(r"\{\{(.*?)\}\}|\{%(.*?)%\}", re.DOTALL)


def columns_in_templates(config: Mapping[str, Any]) -> Needed:
    """Every word in the templates of a task that may be the name of a column."""
    words: set[str] = set()
    for key in _TEMPLATES:
        template = config.get(key)
        if isinstance(template, str):
            # Without braces it is the name of a column, or plain text.
            fields = [inner for pair in _FIELD.findall(template) for inner in pair] or [template]
            words.update(word for inner in fields for word in _WORD.findall(inner))
    return frozenset(words)


def check_rows(task: Any, supply: Supply, options: TaskOptions) -> None:
    """Raise TaskError if there is nothing to ask about, too little to draw examples from, or a metric is no function.

    With rows from the data root, that every row gives a question and an answer is checked as well.
    """
    docs = getattr(task, "task_docs", None) or task.eval_docs
    if not len(docs):
        raise TaskError(f"there is no row to ask about{_of(supply.files)}.")
    for metric, function in getattr(task, "_metric_fn_list", {}).items():
        if function is None and task.config.process_results is None:
            raise TaskError(f"metric {metric!r} is neither one of lm-eval nor could it be had from the hub.")
    shots = task.get_config("num_fewshot") or 0
    pool = getattr(getattr(task, "sampler", None), "df", None)
    if shots and pool is not None:
        # One more is drawn where the question itself may be among them.
        asked_itself = task.fewshot_cfg.split == task.config.test_split
        if len(pool) < shots + asked_itself:
            raise TaskError(
                f"expected {shots + asked_itself} rows at least to draw {shots} examples from, got {len(pool)}"
                f"{_of(supply.files)}."
            )
    if options.data_root is not None and task.OUTPUT_TYPE == "multiple_choice":
        refuse_problems(_bad_choices(task, docs, supply.files))


def _bad_choices(task: Any, docs: Any, files: list[Path]) -> Iterator[str]:
    """What is wrong with rows that give no prompt or no choices, or whose right answer is none of them."""
    if task.multiple_input or task.config.process_results is not None or not hasattr(task, "features"):
        return
    config = task.config
    text_of = _reader(config.doc_to_text, task.features, str)
    target_of = _reader(config.doc_to_target, task.features, _target) or task.doc_to_target
    choices_of = _reader(config.doc_to_choice, task.features, ast.literal_eval) or task.doc_to_choice
    for number, doc in enumerate(docs, 1):
        try:
            _ = text_of(doc) if text_of else None
            choices, target = choices_of(doc), target_of(doc)
            answers = target if isinstance(target, list) else [target]
            # An answer in words that is none of the choices is the task's own business: some ask so.
            wrong = [answer for answer in answers if isinstance(answer, int) and not 0 <= answer < len(choices)]
        except Exception as error:  # of a template over this row
            yield f"question {number}{_of(files)}: {type(error).__name__}: {' '.join(str(error).split())}."
            continue
        for answer in wrong:
            yield (
                f"question {number}{_of(files)}: expected the number of one of {len(choices)} choices as the answer, "
                f"from 0, got {answer}."
            )


def _reader(template: object, columns: list[str], convert: Callable[[str], Any]) -> Callable[[Any], Any] | None:
    """How lm-eval takes a value out of a row; None for what is neither a column nor a template.

    lm-eval compiles a template anew for every row, which takes thirty times as long as to fill it in.
    """
    if not isinstance(template, str):
        return None
    if template in columns:
        return operator.itemgetter(template)
    from lm_eval.utils import env

    compiled = env.from_string(template)
    return lambda doc: convert(compiled.render(**doc))


def _target(text: str) -> Any:
    """A rendered target as lm-eval understands it: the number of a choice, a list of such, or words."""
    if text.isdigit():
        return int(text)
    with contextlib.suppress(SyntaxError, ValueError):
        return ast.literal_eval(text) if text[:1] == "[" and text[-1:] == "]" else text
    return text


def _of(files: list[Path]) -> str:
    return f" of {', '.join(dict.fromkeys(map(shown_path, files)))}" if files else ""
