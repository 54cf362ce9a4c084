"""What lm-eval's requests come to, and those that cannot be answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lm_eval.api.instance import Instance

from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.answering.questions import Prompt
from qlora_cli.evaluation.decoding_terms import Terms
from qlora_cli.evaluation.encoding import Encoded

_TOLD = 5  # tasks by name


def check_continuations(requests: Sequence[Instance], encoded: Sequence[Encoded], max_length: int) -> None:
    """Raise EvaluationError for a continuation without a token, or with more than the model reads."""
    for request, (tokens, scored, _) in zip(requests, encoded, strict=True):
        if not 0 < scored < len(tokens):
            got = f"{scored:,}, the model's context being {max_length:,}" if scored else "none"
            raise EvaluationError(
                f"{_named(request)}: expected an answer to score of at least one token and no more than the model "
                f"reads, got {got}: {request.args[1]!r:.80}"
            )


def room_for_prompts(requests: Sequence[Instance], terms: Sequence[Terms], max_length: int) -> list[tuple[str, int]]:
    """Each text to go on from, and how many tokens of it the model can read if the answer is to fit in, too.

    Raises:
        EvaluationError: for a task that wants longer answers than the model's context has room for.
    """
    for request, one in zip(requests, terms, strict=True):
        if one.max_new_tokens >= max_length:
            raise EvaluationError(too_long_an_answer(_named(request), one.max_new_tokens, max_length))
    return [(request.args[0], max_length - one.max_new_tokens) for request, one in zip(requests, terms, strict=True)]


def prompts_of(requests: Sequence[Instance], terms: Sequence[Terms], encoded: Sequence[Encoded]) -> list[Prompt]:
    """The questions as a model is asked them. Raises EvaluationError for one without a text or without room."""
    prompts = []
    for request, one, (tokens, _, _) in zip(requests, terms, encoded, strict=True):
        most = one.max_new_tokens if one.max_length is None else one.max_length - len(tokens)
        if not tokens or most < 1:
            problem = "an empty one" if not tokens else f"{len(tokens):,} tokens, and max_length {one.max_length}"
            raise EvaluationError(f"{_named(request)}: expected a prompt and room to go on from it, got {problem}")
        prompts.append(Prompt(tokens, one.until, most, one.sampling))
    return prompts


def contradictions(requests: Sequence[Instance], terms: Sequence[Terms]) -> Iterator[str]:
    """What to say of tasks that ask for answers drawn at random in a way that leaves no choice."""
    for task in dict.fromkeys(r.task_name for r, one in zip(requests, terms, strict=True) if one.contradicted):
        yield f"{task} wants answers drawn at random, at temperature 0: they are greedy"


def too_long_an_answer(asked: str, max_new_tokens: int, max_length: int) -> str:
    """What is wrong with a task that wants longer answers than the model has room for."""
    return (
        f"{asked}: it wants answers of up to {max_new_tokens:,} tokens, and the model's context, prompt and answer "
        f"together, is {max_length:,}. Leave this task out, or lower max_gen_toks in its generation_kwargs"
    )


def cut_remark(cut: Mapping[str, int], max_length: int, most: int) -> str:
    """What to say of questions that lost their beginning, by task; `most` is how many tokens one of them lost."""
    tasks = sorted(cut.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{task} ({number:,})" for task, number in tasks[:_TOLD])
    more = f" and {len(cut) - _TOLD:,} more tasks" if len(cut) > _TOLD else ""
    number = sum(cut.values())
    they_are, their = ("question is", "its") if number == 1 else ("questions are", "their")
    return (
        f"{number:,} {they_are} longer than the model's context of {max_length:,} tokens and lost {their} beginning, "
        f"up to {most:,} tokens of it: {named}{more}"
    )


def _named(request: Instance) -> str:
    return f"{request.task_name}, document {request.doc_id}"
