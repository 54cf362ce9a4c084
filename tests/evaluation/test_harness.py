"""lm-eval scores what our model answers: the same numbers as with its `hf` backend, quietly, and again the same."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from qlora_cli.errors import EvaluationError, TaskError
from qlora_cli.evaluation.events import Remark
from qlora_cli.evaluation.harness import TaskScores, score_tasks
from qlora_cli.evaluation.scoring import AnsweringModel
from qlora_cli.evaluation.tasks.build import build_tasks
from qlora_cli.evaluation.tasks.index import load_index
from qlora_cli.evaluation.tasks.loaded import LoadedTasks, TaskOptions
from tests.support.benchmarks import keep_index, write_data_root
from tests.support.models import tiny_model
from tests.support.small_tasks import choice_task, small_tasks, text_task, writing_task
from tests.support.tokenizers import PLAIN, tiny_tokenizer

BENCHMARKS = ["mmlu", "arc_easy", "piqa", "rte", "sst2", "cola"]


def model_and_words(chat_template: str | None = PLAIN) -> tuple[Any, Any]:
    """A tiny model with room for five examples in a prompt."""
    words = tiny_tokenizer(chat_template)
    model = tiny_model("llama", vocab_size=len(words))
    model.config.max_position_embeddings = 2048
    model.generation_config.eos_token_id = words.eos_token_id
    return model, words


def scored(loaded: Any, **options: Any) -> TaskScores:
    return score_tasks(AnsweringModel(*model_and_words(), report=lambda _: None), loaded, **options)


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedTasks]:
    """Parts of real benchmarks, with two examples in every prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        root = write_data_root(tmp_path_factory.mktemp("data"))
        options = TaskOptions(data_root=root, allow_partial=True, num_fewshot=2)
        keep_index()
        yield build_tasks(BENCHMARKS, load_index([]), options)


def by_hf_backend(loaded: Any, **options: Any) -> dict[str, Any]:
    """What `lm_eval --model hf` makes of the same tasks: `simple_evaluate` without its look at the machine."""
    model, words = model_and_words()
    oracle = HFLM(pretrained=model, tokenizer=words, batch_size=4)
    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    for task in loaded.tasks.values():
        task.set_fewshot_seed(1234)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")
        everything = {"tasks": loaded.tasks, "groups": loaded.groups}
        found: dict[str, Any] = evaluate(lm=oracle, task_dict=everything, bootstrap_iters=200, **options)
    return found


@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")  # scikit-learn's, under the hf backend
@pytest.mark.parametrize("limit", [None, 3, 0.5])
def test_benchmarks_score_as_with_the_hf_backend(benchmarks: LoadedTasks, limit: float | None) -> None:
    """Every value of every task and group, its standard error, its counts and its settings are lm-eval's own."""
    expected = by_hf_backend(benchmarks, limit=limit)
    found = scored(benchmarks, limit=limit, bootstrap_iters=200)
    for part in found.results:
        assert found.results[part] == expected[part], part
    assert set(found.samples) == set(expected["samples"])
    for task, rows in expected["samples"].items():
        same = ("doc_id", "doc", "target", "arguments", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash")
        assert [{k: row[k] for k in same} for row in found.samples[task]] == [{k: row[k] for k in same} for row in rows]
    assert found.questions == sum(len(row["arguments"]) for rows in found.samples.values() for row in rows)


def test_generation_and_perplexity_score_as_with_the_hf_backend() -> None:
    """Tasks that are answered in writing, and texts scored whole."""
    expected = by_hf_backend(small_tasks(writing_task(), text_task()))
    found = scored(small_tasks(writing_task(), text_task()), bootstrap_iters=200)
    assert found.results["results"]["writing"] == expected["results"]["writing"]
    for metric, value in expected["results"]["texts"].items():
        assert found.results["results"]["texts"][metric] == (
            pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
        )


def test_conversations_score_as_with_the_hf_backend() -> None:
    """A chat template, examples as turns or in one turn, a system instruction."""
    for turns in (False, True):
        options: dict[str, Any] = {"fewshot_as_multiturn": turns, "system_instruction": "Be brief."}
        tasks = small_tasks(choice_task(num_fewshot=3), writing_task())
        expected = by_hf_backend(tasks, apply_chat_template=True, **options)
        found = scored(tasks, chat_template=True, bootstrap_iters=200, **options)
        assert found.results["results"] == expected["results"]
        prompts = [row["arguments"] for row in found.samples["choices"]]
        assert prompts == [row["arguments"] for row in expected["samples"]["choices"]]
        assert "Be brief." in prompts[0][0][0]
        assert found.settings["chat_template"] == PLAIN


def test_scored_twice_is_the_same_twice() -> None:
    """The second time has the same examples in its prompts, as a comparison of two models needs."""
    tasks = small_tasks(choice_task(num_fewshot=3))
    first, second, other = scored(tasks), scored(tasks), scored(tasks, seed=5)
    assert first.samples == second.samples
    assert first.results == second.results
    assert [row["prompt_hash"] for row in first.samples["choices"]] != [
        row["prompt_hash"] for row in other.samples["choices"]
    ]


def test_everybodys_random_numbers_go_on_as_if_nothing_had_been() -> None:
    """Training that is scored in between draws what it would have drawn."""

    def state() -> list[Any]:
        return [random.random(), np.random.rand(), torch.rand(3).tolist()]

    def seed() -> None:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)

    tasks = small_tasks(choice_task(num_fewshot=2), writing_task(do_sample=True, temperature=1.0))
    seed()
    expected = state() + state()
    seed()
    found = state()
    scored(tasks)
    assert found + state() == expected


def test_nothing_is_printed_or_logged(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Neither bars nor prints of lm-eval's; a task's own prints neither; logging is afterwards as it was."""
    task = choice_task()
    inner = task.process_results

    def chatty(doc: Any, results: Any) -> Any:
        sys.stdout.write("here I am")
        logging.getLogger("lm_eval.tasks.mine").warning("mind   the\ngap")
        return inner(doc, results)

    task.process_results = chatty
    logger = logging.getLogger("lm_eval")
    before = logger.level, logger.propagate, list(logger.handlers), os.environ.get("DISABLE_MULTIPROC")
    told: list[Any] = []
    caplog.clear()
    score_tasks(AnsweringModel(*model_and_words(), report=told.append), small_tasks(task))
    assert (logger.level, logger.propagate, logger.handlers, os.environ.get("DISABLE_MULTIPROC")) == before
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert [event.text for event in told if isinstance(event, Remark)] == [
        "lm-eval: mind the gap",
        "lm-eval: 5 more like this one: mind the gap",
    ]


def test_what_lm_eval_says_of_each_document_is_told_once() -> None:
    """The first of its kind as it comes, the others by their number; what is said elsewhere is another kind."""
    task = choice_task(documents=6)
    inner = task.process_results
    logger = logging.getLogger("lm_eval.tasks.mine")

    def chatty(doc: Any, results: Any) -> Any:
        logger.warning(f"Label not in range, Sample:\n\n{doc['question']} {'and on ' * 99}")
        if doc["label"] == 2:
            logger.warning("two is a large number")
        return inner(doc, results)

    task.process_results = chatty
    told: list[Any] = []
    lm = AnsweringModel(*model_and_words(), report=told.append)
    for _ in range(2):
        score_tasks(lm, small_tasks(task))
    first, two, others, *of_two = [event.text for event in told if isinstance(event, Remark)]
    assert first.startswith("lm-eval: Label not in range, Sample: ")
    assert first.endswith(" …")
    assert len(first) <= 311
    assert two == "lm-eval: two is a large number"
    assert others.startswith("lm-eval: 5 more like this one: Label not in range, Sample: ")
    assert len(others) < 120
    assert of_two == ["lm-eval: 1 more like this one: two is a large number"]


def test_what_is_reported_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    """Who prints when told of progress reaches the terminal, in the middle of the silence."""
    lm = AnsweringModel(*model_and_words(), report=lambda event: sys.stdout.write(f"{type(event).__name__}\n"))
    score_tasks(lm, small_tasks(choice_task()))
    assert set(capsys.readouterr().out.split()) == {"Asking"}


def test_a_rich_console_draws_through_the_silence(capsys: pytest.CaptureFixture[str]) -> None:
    """A progress bar's own thread, which nobody lifts the silence for."""
    from rich.console import Console

    console = Console()
    task = choice_task()
    inner = task.doc_to_text
    task.doc_to_text = lambda *given: (console.print("still here"), inner(*given))[1]
    scored(small_tasks(task))
    assert "still here" in capsys.readouterr().out


def test_a_task_whose_code_fails_is_named() -> None:
    """At the document, while prompts are made or answers are looked at; and over all documents."""
    at_document = choice_task("broken")

    def fails(doc: Any, results: Any) -> Any:
        if doc["label"] == 2:
            raise ZeroDivisionError("division by zero")
        return {"acc": 1.0}

    at_document.process_results = fails
    with pytest.raises(EvaluationError) as caught:
        scored(small_tasks(choice_task(), at_document))
    assert str(caught.value) == (
        "broken, document 2: the task's own code failed: ZeroDivisionError: division by zero. Look at its definition "
        "and at this document, or leave the task out"
    )
    while_asking = choice_task(
        "broken", doc_to_text=lambda doc: doc["question"] if doc["label"] < 2 else doc["nothing"]
    )
    with pytest.raises(
        EvaluationError, match=r"^broken, document 2: the task's own code failed: KeyError: 'nothing'\."
    ):
        scored(small_tasks(choice_task(), while_asking))
    over_all = choice_task("broken")
    over_all.aggregation = lambda: {"acc": lambda items: items["a"], "acc_norm": max}
    with pytest.raises(EvaluationError, match=r"^broken: .*TypeError: .* Look at its definition, or leave the"):
        scored(small_tasks(choice_task(), over_all))


def test_what_fails_in_the_model_is_not_laid_at_a_tasks_door() -> None:
    """A model that raises is no task that fails; our own refusals come through as they are."""
    model, words = model_and_words()
    lm = AnsweringModel(model, words, report=lambda _: None)
    lm.__dict__["_scorer"] = None  # whatever it is that breaks
    with pytest.raises(AttributeError):
        score_tasks(lm, small_tasks(choice_task()))
    narrow = AnsweringModel(model, words, report=lambda _: None, max_length=2)
    with pytest.raises(EvaluationError, match=r"^choices, document 0: expected an answer to score"):
        score_tasks(narrow, small_tasks(choice_task()))


def test_what_cannot_be_asked_is_told_before_anything_is_computed() -> None:
    """All of it at once."""
    model, words = model_and_words(chat_template=None)
    pictures = choice_task("pictures")
    pictures.MULTIMODAL = True
    asked: list[Any] = []
    with pytest.raises(TaskError) as caught:
        score_tasks(
            AnsweringModel(model, words, report=asked.append),
            small_tasks(choice_task(), pictures, writing_task(max_gen_toks=2048)),
            chat_template=True,
        )
    assert str(caught.value) == (
        "prompts are to be rendered with a chat template, and the tokenizer has none: leave that out, or score a model "
        "that has one\n"
        "pictures: it asks about pictures or sound, and a language model is scored here\n"
        "writing: it wants answers of up to 2,048 tokens, and the model's context, prompt and answer together, is "
        "2,048. Leave this task out, or lower max_gen_toks in its generation_kwargs"
    )
    assert asked == []


def test_groups_are_aggregated_as_lm_eval_does() -> None:
    """The mean over documents, with its pooled standard error."""
    tasks = small_tasks(choice_task("one", 5), choice_task("two", 9), group="both")
    found = scored(tasks)
    rows = [row["acc"] for task in ("one", "two") for row in found.samples[task]]
    assert found.results["groups"]["both"]["acc,none"] == pytest.approx(np.mean(rows))
    assert found.results["group_subtasks"] == {"both": ["one", "two"]}


def shared_tasks() -> Any:
    """Documents that two processes cannot share evenly."""
    return small_tasks(choice_task("one", 5), choice_task("two", 2), writing_task(documents=3), group="all")


SHARED = """
import json, sys
from accelerate import Accelerator
from tests.evaluation.test_harness import shared_tasks, told_and_scored
accelerator = Accelerator(cpu=True)
with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
    json.dump(told_and_scored(shared_tasks(), accelerator), file)
accelerator.end_training()  # else the threads that talk to the other process may abort this one at its exit
"""


def told_and_scored(tasks: Any, accelerator: Any = None) -> dict[str, Any]:
    """What comes of tasks whose longer prompts are cut, as JSON has it."""
    told: list[Any] = []
    lm = AnsweringModel(*model_and_words(), report=told.append, accelerator=accelerator, max_length=20)
    scores = score_tasks(lm, tasks)
    values = {
        task: [(row["doc_id"], {metric: row[metric] for metric in row["metrics"]}) for row in rows]
        for task, rows in scores.samples.items()
    }
    facts = {"cut": scores.cut, "questions": scores.questions, "kept": scores.kept, "way": scores.way}
    remarks = [event.text for event in told if isinstance(event, Remark)]
    plain = {"results": scores.results["results"], "values": values, "remarks": remarks, **facts}
    return json.loads(json.dumps(plain))


def test_processes_share_the_documents(tmp_path: Path) -> None:
    """Two processes: the scores and the samples of one, known to both as far as they need them; told once."""
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    alone = told_and_scored(shared_tasks())
    assert alone["cut"]
    for part in ("cut", "questions", "kept", "way"):
        assert first[part] == alone[part] == second[part], part
    assert first["results"] == second["results"]
    for task, metrics in alone["results"].items():
        assert first["results"][task].pop("sample_count", None) == metrics.pop("sample_count", None)
        assert first["results"][task] == pytest.approx(metrics, abs=1e-12), task
    assert first["values"] == alone["values"]
    assert sorted(first["remarks"]) == sorted(alone["remarks"])
    assert len(alone["remarks"]) == 2
    assert (second["values"], second["remarks"]) == ({}, [])
