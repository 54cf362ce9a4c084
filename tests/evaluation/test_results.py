"""Results and samples are files that lm-eval's own tools read, whole, and without names of this machine's."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_file_datetime, get_file_task_name, hash_string, make_table

from qlora_cli.errors import RunError
from qlora_cli.evaluation.harness import TaskScores, score_tasks
from qlora_cli.evaluation.results import ResultFacts, results_json, write_results, write_samples
from qlora_cli.evaluation.scoring import AnsweringModel
from tests.support.models import tiny_model
from tests.support.small_tasks import choice_task, small_tasks, writing_task
from tests.support.tokenizers import tiny_tokenizer

FACTS = ResultFacts("org/model", "pretrained=org/model,dtype=float32", own={"storage": "NF4, double quantisation"})


def parts() -> tuple[Any, Any]:
    words = tiny_tokenizer()
    return tiny_model("llama", vocab_size=len(words)), words


def tasks() -> Any:
    return small_tasks(choice_task("one"), choice_task("two", 4), group="both")


@pytest.fixture(scope="module")
def scores() -> TaskScores:
    return score_tasks(AnsweringModel(*parts(), report=lambda _: None), tasks(), bootstrap_iters=100)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that lm-eval's own tracker writes for the same tasks with its `hf` backend."""
    folder = tmp_path_factory.mktemp("lm-eval")
    tracker = EvaluationTracker(output_path=str(folder))
    model, words = parts()
    oracle = HFLM(pretrained=model, tokenizer=words)
    asked = list(tasks().groups.values())
    results = simple_evaluate(
        model=oracle, tasks=asked, gen_kwargs={}, bootstrap_iters=100, evaluation_tracker=tracker,
        task_manager=TaskManager(include_defaults=False),  # which reads no task of lm-eval's own: that takes seconds
    )  # fmt: skip
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    return folder


def test_results_have_what_lm_evals_have(tmp_path: Path, scores: TaskScores, published: Path) -> None:
    """Every key of its file is in ours, every score, setting and hash of a prompt is the same."""
    (theirs,) = published.rglob("results_*.json")
    expected = json.loads(theirs.read_text())
    file = tmp_path / "out" / "results.json"
    write_results(file, scores, FACTS)
    found = json.loads(file.read_text())
    assert set(expected) - set(found) == set()
    assert set(expected["config"]) - set(found["config"]) == set()
    same = ["results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples"]
    same += ["task_hashes", "max_length", "eot_token_id", "tokenizer_eos_token", "tokenizer_bos_token"]
    same += ["tokenizer_pad_token", "lm_eval_version", "transformers_version", "chat_template", "system_instruction"]
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    settings = ["limit", "bootstrap_iters", "random_seed", "numpy_seed", "torch_seed", "fewshot_seed", "gen_kwargs"]
    settings += ["model_num_parameters", "model_dtype", "device"]
    unlike = {name for name in settings if found["config"][name] != expected["config"][name]}
    assert unlike <= {"device"}  # a person gives lm-eval's on the command line
    assert make_table(found).splitlines()[:3] == make_table(expected).splitlines()[:3]
    assert make_table(found, "groups") == make_table(expected, "groups")


def test_the_model_is_where_lm_evals_tools_look_for_it(scores: TaskScores) -> None:
    """`config.model` is the backend; the name is what they find in `model_args`, a text that may be taken apart."""
    found = results_json(scores, FACTS)
    config = found["config"]
    assert (config["model"], found["model_source"]) == ("qlora", "qlora")
    assert dict(item.split("=", 1) for item in config["model_args"].split(",")) == {
        "pretrained": "org/model", "dtype": "float32",
    }  # fmt: skip
    assert GeneralConfigTracker._get_model_name(config["model_args"]) == found["model_name"] == "org/model"
    assert config["gen_kwargs"] == {}


def test_ours_is_beside_it(scores: TaskScores) -> None:
    """What lm-eval has no place for is under one name."""
    own = results_json(scores, FACTS)["qlora"]
    assert own["storage"] == "NF4, double quantisation"
    assert (own["log_likelihoods"], own["questions"], own["kept_answers"]) == ("prefix tree", 30, 0)
    assert set(own["prompts_sha256"]) == {"one", "two"}
    assert own["truncated_questions"] == {}


def test_prompts_hash_is_of_prompts_alone(scores: TaskScores) -> None:
    """Other prompts, another hash; other answers, the same."""
    samples = {"one": [{**row, "resps": [], "target_hash": "x"} for row in scores.samples["one"]]}
    other = score_tasks(
        AnsweringModel(*parts(), report=lambda _: None),
        small_tasks(choice_task("one", num_fewshot=1)),
        bootstrap_iters=0,
    )
    changed = TaskScores(**{**vars(scores), "samples": samples})
    hashes = [results_json(each, FACTS)["qlora"]["prompts_sha256"]["one"] for each in (scores, changed, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_samples_are_lm_evals_lines(tmp_path: Path, scores: TaskScores, published: Path) -> None:
    """Line for line but for the last digits of floats; `datasets` reads them, as lm-eval's hub tools do."""
    files = write_samples(tmp_path / "results_2026-11-24T01-02-03.000004.json", scores.samples)
    assert [file.name for file in files] == [
        "samples_one_2026-11-24T01-02-03.000004.jsonl",
        "samples_two_2026-11-24T01-02-03.000004.jsonl",
    ]
    for file in files:
        task = get_file_task_name(file.name)
        assert get_file_datetime(file.name) == "2026-11-24T01-02-03.000004"
        (theirs,) = published.rglob(f"samples_{task}_*.jsonl")
        for ours, line in zip(lines(file), lines(theirs), strict=True):
            assert list(ours) == list(line)
            answers = ("resps", "filtered_resps")
            assert {k: v for k, v in ours.items() if k not in answers} == {
                k: v for k, v in line.items() if k not in answers
            }
            assert [float(value) for value, _ in ours["filtered_resps"]] == pytest.approx(
                [float(value) for value, _ in line["filtered_resps"]], abs=1e-4
            )
            assert [greedy for _, greedy in ours["filtered_resps"]] == [greedy for _, greedy in line["filtered_resps"]]
        read = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
        assert len(read) == len(scores.samples[task])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("results.json", "samples_my_task_results.jsonl"),
        ("results_a.json", "samples_my_task_a.jsonl"),
        ("my_run.json", "samples_my_task_my-run.jsonl"),
    ],
)
def test_samples_are_named_after_the_results(tmp_path: Path, file: str, name: str) -> None:
    """So that lm-eval's tools find the task's name in them."""
    (found,) = write_samples(tmp_path / file, {"my_task": []})
    assert found == tmp_path / name
    assert get_file_task_name(name) == "my_task"


def test_a_tasks_name_makes_no_folder(tmp_path: Path) -> None:
    """Names of tasks come from elsewhere."""
    (found,) = write_samples(tmp_path / "r.json", {"../a/b c": []})
    assert found == tmp_path / "samples_..__a__b__c_r.jsonl"


def test_strange_letters_are_written(tmp_path: Path, scores: TaskScores) -> None:
    """Halves of surrogate pairs, which come out of broken data, are read back as they were."""
    row = {**scores.samples["one"][0], "target": "a\ud800b", "doc": {"text": "«\u2028»"}}
    (file,) = write_samples(tmp_path / "r.json", {"one": [row]})
    (found,) = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert (found["target"], found["doc"]) == ("a\ud800b", {"text": "«\u2028»"})


def test_the_home_folder_is_not_named(tmp_path: Path, scores: TaskScores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a path has got into what is written."""
    monkeypatch.setenv("HOME", "/home/somebody")
    own = {"data": "/home/somebody/data/x.csv", "/home/somebody": ["in '/home/somebody'", "/home/somebodyelse"]}
    said = "Look into /home/somebody/notes."  # as it was said: its hash stands beside it
    scores = replace(scores, settings=scores.settings | {"system_instruction": said})
    facts = ResultFacts("/home/somebody/models/a", "pretrained=/home/somebody/models/a", own=own)
    write_results(tmp_path / "r.json", scores, facts)
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["model_name"], found["config"]["model_args"]) == ("~/models/a", "pretrained=~/models/a")
    assert (found["system_instruction"], found["system_instruction_sha"]) == (said, hash_string(said))
    assert (found["qlora"]["data"], found["qlora"]["~"]) == ("~/data/x.csv", ["in '~'", "/home/somebodyelse"])


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, scores: TaskScores) -> None:
    """A write that fails leaves what was there, and nothing beside it."""
    file = tmp_path / "results.json"
    assert write_results(file, scores, FACTS) == file
    before = file.read_bytes()

    def breaking() -> Any:
        yield scores.samples["one"][0]
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"samples_one_results\.jsonl: could not be written: No space left on device$"):
        write_samples(file, {"one": breaking()})
    assert sorted(tmp_path.iterdir()) == [file]
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        (tmp_path / "file").write_text("")
    except OSError:  # not for root, who may write anywhere
        with pytest.raises(RunError, match="could not be written"):
            write_results(file, scores, FACTS)
        assert file.read_bytes() == before
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_answers_in_writing_are_written(tmp_path: Path) -> None:
    """Text answers as they are."""
    found = score_tasks(AnsweringModel(*parts(), report=lambda _: None), small_tasks(writing_task()))
    (file,) = write_samples(tmp_path / "r.json", found.samples)
    assert [line["resps"] for line in lines(file)] == [row["resps"] for row in found.samples["writing"]]
    assert lines(file)[0]["arguments"]["gen_args_0"]["arg_1"]["max_gen_toks"] == 12
