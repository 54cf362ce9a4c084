"""Scores as files that lm-eval and the tools around it read: one of results, one of samples for each task."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_eval.loggers.utils import get_commit_from_path
from lm_eval.utils import handle_non_serializable, hash_string, sanitize_list, sanitize_model_name

from qlora_cli.evaluation.harness import TaskScores
from qlora_cli.evaluation.new_files import samples_file, write_new

_BACKEND = "qlora"  # where lm-eval has `hf`, `vllm` and the like

_HASHED = ("system_instruction", "chat_template")  # as they are: their hashes stand beside them


@dataclass(frozen=True)
class ResultFacts:
    """What the file says of a model beside its scores.

    Attributes:
        model: what was scored, as a person would name it: a hub name, or a folder.
        model_args: as lm-eval's command line would have it, for tools that look there.
        revision: of a model on the hub; None where there is none.
        own: what lm-eval has no place for; it is under `qlora`.
    """

    model: str
    model_args: str
    revision: str | None = None
    own: Mapping[str, Any] = field(default_factory=dict)


def write_results(file: Path, scores: TaskScores, facts: ResultFacts) -> Path:
    """Write the results file, whole or not at all; a folder is made for it. The home folder's name is not in it.

    Returns:
        Where it is: where `file` has come to be there, under the next free name.

    Raises:
        RunError: if it cannot be written.
    """
    return write_facts(file, results_json(scores, facts))


def write_facts(file: Path, facts: Mapping[str, Any]) -> Path:
    """Write anything else as results are written; returns and raises what `write_results` does."""
    told = {**_homeless(facts), **{name: facts[name] for name in _HASHED if name in facts}}
    text = json.dumps(told, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return write_new(file, [text, "\n"])


def results_json(scores: TaskScores, facts: ResultFacts) -> dict[str, Any]:
    """What lm-eval's `--output_path` holds after its `hf` backend was scored, and what is ours under `qlora`."""
    settings, model = scores.settings, dict(scores.model)
    tokenizer = {name: model.pop(name) for name in list(model) if name.startswith(("tokenizer_", "eot_", "max_"))}
    seed = settings["seed"]
    return {
        **scores.results,
        "config": {
            "model": _BACKEND,
            "model_args": facts.model_args,
            "model_revision": facts.revision,
            **model,
            "use_cache": None,
            "limit": settings["limit"],
            "bootstrap_iters": settings["bootstrap_iters"],
            "gen_kwargs": {},  # as the tasks have them
            "random_seed": seed["python"],
            "numpy_seed": seed["other"],
            "torch_seed": seed["other"],
            "fewshot_seed": seed["other"],
        },
        "git_hash": get_commit_from_path(Path.cwd()),
        "date": scores.started_at,
        "pretty_env_info": _environment(),
        "transformers_version": metadata.version("transformers"),
        "lm_eval_version": metadata.version("lm_eval"),
        "upper_git_hash": None,
        **tokenizer,
        "task_hashes": {task: _task_hash(rows) for task, rows in scores.samples.items()},
        "model_source": _BACKEND,
        "model_name": facts.model,
        "model_name_sanitized": sanitize_model_name(facts.model),
        "system_instruction": settings["system_instruction"],
        "system_instruction_sha": _hash(settings["system_instruction"]),
        "fewshot_as_multiturn": settings["fewshot_as_multiturn"],
        "chat_template": settings["chat_template"],
        "chat_template_sha": _hash(settings["chat_template"]),
        "total_evaluation_time_seconds": str(scores.seconds),
        "qlora": {
            "log_likelihoods": scores.way,
            "questions": scores.questions,
            "kept_answers": scores.kept,
            "truncated_questions": scores.cut,
            "prompts_sha256": {task: _prompts_hash(rows) for task, rows in scores.samples.items()},
            **facts.own,
        },
    }


def write_samples(file: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Path]:
    """Write every document's prompt, answers and values beside the results file, a file for each task.

    They are lm-eval's lines; see `samples_file` for the names.

    Returns:
        The files, in the order of the tasks. Each is there whole or not at all; a name that is taken is left as it is,
        and the next free one taken.

    Raises:
        RunError: if one cannot be written.
    """
    return [write_new(samples_file(file, task), map(_line, rows)) for task, rows in samples.items()]


def _line(sample: Mapping[str, Any]) -> str:
    arguments = {
        f"gen_args_{number}": {f"arg_{place}": value for place, value in enumerate(asked)}
        for number, asked in enumerate(sample["arguments"])
    }
    told = {
        **sample,
        "resps": sanitize_list(sample["resps"]),
        "filtered_resps": sanitize_list(sample["filtered_resps"]),
        "arguments": arguments,
        "target": str(sample["target"]),
    }
    return json.dumps(told, default=handle_non_serializable, ensure_ascii=False) + "\n"


def _homeless(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with `~` in place of the home folder, wherever it is named."""
    try:
        home = str(Path.home())
    except RuntimeError:
        return value
    if home in ("", "/"):
        return value
    homeless: dict[str, Any] = _replaced(value, re.compile(re.escape(home) + r"(?=$|[/\\\s'\",;:)])"))
    return homeless


def _replaced(value: Any, home: re.Pattern[str]) -> Any:
    match value:
        case str():
            return home.sub("~", value)
        case dict():
            return {_replaced(key, home): _replaced(item, home) for key, item in value.items()}
        case list() | tuple():
            return [_replaced(item, home) for item in value]
        case _:
            return value


def _task_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    return str(hash_string("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows)))


def _prompts_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    return str(hash_string("".join(row["prompt_hash"] for row in rows)))


def _hash(text: str | None) -> str | None:
    return hash_string(text) if text else None


def _environment() -> str:
    """What lm-eval has torch tell, short and without names of this machine's."""
    lines = [f"Python {platform.python_version()} on {platform.system()} {platform.machine()}", *_packages()]
    return "\n".join(lines)


def _packages() -> Iterator[str]:
    for name in ("torch", "transformers", "datasets", "lm_eval"):
        yield f"{name} {metadata.version(name)}"
