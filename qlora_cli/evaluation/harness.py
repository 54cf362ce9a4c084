"""lm-eval's own evaluation of tasks, asked by us and answered by our model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list
from lm_eval import evaluator
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import get_sample_size

from qlora_cli.errors import EvaluationError, QloraError, TaskError
from qlora_cli.evaluation.asking import cut_remark, too_long_an_answer
from qlora_cli.evaluation.decoding_terms import decoding_terms
from qlora_cli.evaluation.hush import Hush
from qlora_cli.evaluation.randomness import other_seed, python_seed, seeded
from qlora_cli.evaluation.scoring import AnsweringModel


class Loaded(Protocol):
    """Tasks and groups as lm-eval takes them, by name."""

    @property
    def tasks(self) -> Mapping[str, Any]: ...

    @property
    def groups(self) -> Mapping[str, Any]: ...


class Asked(Protocol):
    """What is to be known of a model to tell whether tasks can be asked of it."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def max_length(self) -> int: ...

    @property
    def world_size(self) -> int: ...


@dataclass(frozen=True)
class TaskScores:
    """What came of tasks.

    Attributes:
        results: in lm-eval's own form: `results`, `groups`, `group_subtasks`, `configs`, `versions`, `n-shot`,
            `higher_is_better`, `n-samples`. The same on every process.
        samples: by task, one record for each document and filter, in lm-eval's own form; empty on every process but
            the first.
        questions: how many the model was asked, `kept` of them answered by an earlier start; of all processes.
        cut: by task, questions that lost their beginning because the model's context is shorter.
        way: how log-likelihoods were computed, None if none was.
        seconds: all of it, from `started_at`, seconds since 1970.
        settings: what decided the prompts: limit, seeds, template, system instruction and the like.
        model: what lm-eval's file says of the model and its tokenizer.
    """

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    questions: int
    kept: int
    cut: dict[str, int]
    way: str | None
    seconds: float
    started_at: float
    settings: dict[str, Any]
    model: dict[str, Any]


def score_tasks(
    lm: AnsweringModel,
    loaded: Loaded,
    *,
    limit: int | float | None = None,
    bootstrap_iters: int = 1000,
    chat_template: bool = False,
    fewshot_as_multiturn: bool = True,
    system_instruction: str | None = None,
    seed: int | None = None,
) -> TaskScores:
    """Ask a model what tasks ask, and have lm-eval score its answers.

    The same prompts each time: tasks may be scored again, with another model or later in its training. Generators of
    random numbers are afterwards where they were.

    Args:
        limit: documents of each task, or the share of them if below 1; None: all.
        bootstrap_iters: resamples for standard errors that have no formula; 0 leaves out all standard errors.
        chat_template: whether prompts are rendered with the tokenizer's chat template.
        fewshot_as_multiturn: whether examples are then turns of their own.
        system_instruction: said before every prompt.
        seed: of everything that is drawn; None: lm-eval's own seeds.

    Raises:
        TaskError: before anything is computed, if a task cannot be asked of this model; every one that cannot.
        EvaluationError: if a task's own code fails, naming the task; see also `AnsweringModel`.
    """
    refuse_unanswerable(lm, loaded, limit=limit, chat_template=chat_template)
    started_at, started = time.time(), time.monotonic()
    before = _Counts.of(lm)
    asked = {
        "limit": limit,
        "bootstrap_iters": bootstrap_iters,
        "fewshot_as_multiturn": chat_template and fewshot_as_multiturn,
        "system_instruction": system_instruction,
    }
    results = _evaluate(lm, loaded, seed, apply_chat_template=chat_template, **asked)
    results, counts = _shared(lm, results, _Counts.of(lm).since(before, loaded))
    samples = {task: _in_order(rows) for task, rows in results.pop("samples", {}).items()}
    return TaskScores(
        results=results,
        samples=samples,
        questions=counts.asked,
        kept=counts.kept,
        cut=dict(counts.cut),
        way=lm.way,
        seconds=time.monotonic() - started,
        started_at=started_at,
        settings={
            **asked,
            "seed": {"python": python_seed(seed), "other": other_seed(seed)},
            "chat_template": lm.chat_template(True) if chat_template else None,
        },
        model=lm.facts(),
    )


def _evaluate(lm: AnsweringModel, loaded: Loaded, seed: int | None, **asked: Any) -> dict[str, Any] | None:
    """lm-eval's results, on the first process alone."""
    for task in loaded.tasks.values():
        task.set_fewshot_seed(other_seed(seed))  # or examples would be others the second time
    hush = Hush(lm.remark_once)
    with seeded(seed), lm.aloud(hush), hush.fallen(), _naming_the_task():
        results: dict[str, Any] | None = evaluator.evaluate(
            lm=lm,
            task_dict={"tasks": dict(loaded.tasks), "groups": dict(loaded.groups)},
            confirm_run_unsafe_code=True,  # such tasks were refused when they were built, unless that was asked for
            **asked,
        )
    return results


def refuse_unanswerable(lm: Asked, loaded: Loaded, *, limit: int | float | None, chat_template: bool) -> None:
    """Raise TaskError for tasks that cannot be asked of this model, all of them at once."""
    problems = []
    if chat_template and not getattr(lm.tokenizer, "chat_template", None):
        problems.append(
            "prompts are to be rendered with a chat template, and the tokenizer has none: leave that out, or score a "
            "model that has one"
        )
    for name, task in loaded.tasks.items():
        documents = get_sample_size(task, limit)
        there = len(task.eval_docs)
        there = there if documents is None else min(there, documents)
        if there < lm.world_size:
            problems.append(
                f"{name}: {there} documents cannot be shared by {lm.world_size} processes: score it on one of them"
            )
        problems += _too_long_an_answer(name, task, lm.max_length)
        if getattr(task, "MULTIMODAL", False):
            problems.append(f"{name}: it asks about pictures or sound, and a language model is scored here")
    if problems:
        raise TaskError("\n".join(problems))


def _too_long_an_answer(name: str, task: Any, max_length: int) -> Iterator[str]:
    if task.OUTPUT_TYPE == "generate_until":
        terms = decoding_terms(task.get_config("generation_kwargs") or {}, None)
        if terms.max_new_tokens >= max_length:
            yield too_long_an_answer(name, terms.max_new_tokens, max_length)


@dataclass(frozen=True)
class _Counts:
    """Of questions, on one process or on all."""

    asked: int
    kept: int
    cut: Counter[str]
    cut_tokens: int

    @classmethod
    def of(cls, lm: AnsweringModel) -> _Counts:
        return cls(lm.asked, lm.kept, Counter(lm.cut), lm.cut_tokens)

    def since(self, before: _Counts, loaded: Loaded) -> _Counts:
        """What has come since then; of several processes, lm-eval has some ask more than their share."""
        asked = sum(instance.repeats for task in loaded.tasks.values() for instance in task.instances)
        kept = min(self.kept - before.kept, asked)
        return _Counts(asked, kept, self.cut - before.cut, self.cut_tokens)


def _shared(lm: AnsweringModel, results: dict[str, Any] | None, mine: _Counts) -> tuple[dict[str, Any], _Counts]:
    """What all processes have found and done, told to each of them; samples to the first alone."""
    every = lm.gather_object(mine)
    told: list[Any] = [None]
    samples: dict[str, Any] = {}
    if results is not None and every is not None:
        samples = results.pop("samples")
        cut = sum((one.cut for one in every), Counter[str]())
        most = max(one.cut_tokens for one in every)
        counts = _Counts(sum(one.asked for one in every), sum(one.kept for one in every), cut, most)
        if cut and lm.world_size > 1:  # else it was told when they were cut
            lm.remark_once(cut_remark(cut, lm.max_length, most))
        told = [(results, counts)]
    if lm.world_size > 1:
        broadcast_object_list(told)
    shared, counts = told[0]
    return {**shared, "samples": samples}, counts


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Filter after filter, document after document, as one process has them."""
    filters = list(dict.fromkeys(row["filter"] for row in rows))
    return sorted(rows, key=lambda row: (filters.index(row["filter"]), row["doc_id"]))


@contextmanager
def _naming_the_task() -> Iterator[None]:
    """Failures in a task's own code as a message; what fails in ours goes on as it is."""
    try:
        yield
    except QloraError:
        raise
    except Exception as error:
        task, document = _where(error.__traceback__)
        if task is None:
            raise
        place, look = (task, "") if document is None else (f"{task}, document {document}", " and at this document")
        raise EvaluationError(
            f"{place}: the task's own code failed: {type(error).__name__}: {error}. Look at its definition{look}, or "
            "leave the task out"
        ) from error


def _where(traceback: TracebackType | None) -> tuple[str | None, int | None]:
    """The task and the document that lm-eval was at."""
    task: str | None = None
    document: int | None = None
    while traceback is not None:
        here = traceback.tb_frame.f_locals
        found = next((value for value in (here.get("self"), here.get("task")) if isinstance(value, Task)), None)
        task = found.task_name if found is not None else task
        if isinstance(here.get("doc_id"), int):
            document = here["doc_id"]
        if "raw_metrics" in here:  # all documents together
            document = None
        if isinstance(here.get("self"), AnsweringModel) and "requests" in here:
            return None, None
        traceback = traceback.tb_next
    return task, document
