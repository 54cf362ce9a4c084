"""Whole runs, in seconds: what is learned, what is left on disk, and what happens when something goes wrong."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM, PreTrainedModel

from qlora_cli.errors import DataError, Interrupted, ModelError, NonFiniteError, OutputError
from qlora_cli.model.base import load_base
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.load import load_recipe
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training import evaluation as evaluation_module
from qlora_cli.training import gradients as gradients_module
from qlora_cli.training import run as run_module
from qlora_cli.training.events import Event, Notice, StepDone
from qlora_cli.training.run import train
from tests.support.faults import FAULTS, broken_at, digest, with_training
from tests.support.models import FAMILIES
from tests.support.runs import read_metrics, tiny_recipe
from tests.support.tokenizers import tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[PreTrainedModel]:
    """The base models that runs load, to look at afterwards."""
    models: list[PreTrainedModel] = []

    def spy(*args: Any) -> PreTrainedModel:
        models.append(load_base(*args))
        return models[-1]

    monkeypatch.setattr("qlora_cli.training.loading.load_base", spy)
    return models


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_and_its_base_stays(family: str, tmp_path: Path, loaded: list[PreTrainedModel]) -> None:
    """NF4, double quantisation, bfloat16, checkpointing, an evaluation: the loss falls, and not one bit of the frozen
    weights changes."""
    recipe = tiny_recipe(
        tmp_path,
        family,
        quantization={"compute_dtype": "bfloat16"},
        training={"max_steps": 24, "max_grad_norm": 1.0, "eval_steps": 12},
    )
    finished = train(recipe)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run", "train")]
    # A random 2-layer model with tiny embeddings learns little by LoRA alone; 0.25 nats is far beyond noise.
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.25
    assert finished.last_eval_loss is not None
    assert finished.first_eval_loss is not None
    assert finished.last_eval_loss < finished.first_eval_loss - 0.25
    fresh = load_base(ModelSource(recipe.base_model), recipe.quantization, CPU).state_dict()
    after = {name.replace(".base.", "."): value for name, value in loaded[0].state_dict().items()}
    assert fresh.keys() <= after.keys()
    assert all(torch.equal(value, after[name]) for name, value in fresh.items())


def test_the_run_folder_is_what_the_docs_say(tmp_path: Path) -> None:
    """Every file, the resolved recipe, the record, the metrics' fields, rotation, and an adapter with its tokenizer."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 7, "save_steps": 2, "eval_steps": 4, "logging_steps": 2})
    train(recipe)
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml", "run.json", "metrics.jsonl", "adapter", "checkpoints", ".lock"
    }  # fmt: skip
    assert load_recipe(run / "recipe.yaml") == recipe
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000006", "step-000007"}
    assert {path.name for path in (run / "checkpoints" / "step-000007").iterdir()} == {
        "adapter", "optimizer.safetensors", "random.safetensors", "state.json", "manifest.json"
    }  # fmt: skip

    trained = read_metrics(run, "train")
    assert [record["step"] for record in trained] == [2, 4, 6, 7]
    fields = {"event", "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "seconds"}
    assert trained[0].keys() == fields
    assert [record["step"] for record in read_metrics(run, "eval")] == [0, 4, 7]
    assert {"event", "step", "eval_loss", "perplexity"} <= read_metrics(run, "eval")[0].keys()

    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "completed"
    assert record["error"] is None
    assert record["model"]["trainable_parameters"] == sum(
        p.numel() for name, p in _in_peft(recipe, run).named_parameters() if "lora_" in name
    )
    assert record["data"]["train"]["rows"] == 32
    assert record["data"]["train"]["fingerprint"] != record["data"]["validation"]["fingerprint"]
    assert record["last_eval"]["step"] == 7
    assert record["peak_memory_bytes"] > 0
    assert record["versions"]["torch"] == torch.__version__

    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(recipe.base_model).chat_template


def _in_peft(recipe: Recipe, run: Path) -> torch.nn.Module:
    base = load_base(ModelSource(recipe.base_model), recipe.quantization, CPU)
    return peft.PeftModel.from_pretrained(base, run / "adapter").eval()


def test_peft_scores_the_adapter_as_the_run_did(tmp_path: Path) -> None:
    """The held-out loss in metrics.jsonl is the one that PEFT's model and transformers' own loss give, to 1e-5."""
    recipe = tiny_recipe(tmp_path, training={"per_device_eval_batch_size": 3})
    train(recipe)
    run = tmp_path / "run"
    model = _in_peft(recipe, run)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    total = count = 0.0
    for line in (tmp_path / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt + row["completion"] + "<|im_end|>", return_tensors="pt").input_ids
        start = len(tokenizer(prompt).input_ids)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        labels = ids.clone()
        labels[:, :start] = -100
        # The template's newline after the end of turn is context for what follows, never a target.
        rest = tokenizer(whole, return_tensors="pt").input_ids
        labels = torch.nn.functional.pad(labels, (0, rest.shape[1] - ids.shape[1]), value=-100)
        with torch.no_grad():
            loss = model(input_ids=rest, labels=labels).loss.item()
        supervised = int((labels != -100).sum())
        total, count = total + loss * supervised, count + supervised
    last = read_metrics(run, "eval")[-1]
    assert last["supervised_tokens"] == count
    assert last["eval_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_same_seed_same_bits(dropout: float, tmp_path: Path) -> None:
    """Twice the same recipe gives the same adapter, byte for byte; another seed another."""
    recipe = tiny_recipe(tmp_path, lora={"dropout": dropout}, training={"gradient_accumulation_steps": 2})
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(with_training(recipe, tmp_path / name, seed=seed))
        digests.append(digest(tmp_path / name))
        torch.rand(3)  # whatever happens in between
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "paged_adamw_32bit", "adamw_8bit", "lion_8bit"])
def test_a_resumed_run_ends_in_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    """Stopped after 5 of 12 steps in the middle of an epoch, with dropout and accumulation, and gone on with: the
    adapter and every metric are those of the run that was never stopped."""
    recipe = tiny_recipe(
        tmp_path,
        rows=28,
        lora={"dropout": 0.1, "rank": 64},
        training={
            "optimizer": optimizer,
            "max_steps": 12,
            "gradient_accumulation_steps": 2,
            "logging_steps": 3,
            "eval_steps": 4,
            "save_steps": 5,
        },
    )
    train(with_training(recipe, tmp_path / "whole"))

    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    stopped = with_training(recipe, tmp_path / "stopped")
    with pytest.raises(Interrupted, match=r"^SIGINT: stopped after step 5, state saved$"):
        train(stopped, listeners=[stop])
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["status"] == "interrupted"
    notices: list[Event] = []
    train(stopped, resume=True, listeners=[notices.append])
    assert Notice("going on from step-000005") in notices
    assert digest(tmp_path / "whole") == digest(tmp_path / "stopped")
    clocks = ("seconds", "tokens_per_second")
    for event in ("train", "eval"):
        whole, resumed = (
            [{k: v for k, v in record.items() if k not in clocks} for record in read_metrics(tmp_path / name, event)]
            for name in ("whole", "stopped")
        )
        assert whole == resumed


def test_resume_passes_over_a_damaged_checkpoint(tmp_path: Path) -> None:
    """The newest one is cut short: the one before is taken, and it is said."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 4, "save_steps": 2})
    train(recipe)
    broken = tmp_path / "run" / "checkpoints" / "step-000004" / "optimizer.safetensors"
    size = broken.stat().st_size
    broken.write_bytes(broken.read_bytes()[:-1])
    notices: list[Event] = []
    train(with_training(recipe, max_steps=6), resume=True, listeners=[notices.append])
    texts = [event.text for event in notices if isinstance(event, Notice)]
    told = f"optimizer.safetensors has {size - 1:,} bytes, {size:,} were written"
    assert f"passed over checkpoint step-000004: {told}" in texts
    assert "going on from step-000002" in texts
    assert [record["step"] for record in read_metrics(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]


def test_resume_without_a_checkpoint_begins(tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint starts over, and says so."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"event": "train", "step": 1}\n{"event": "tra')
    notices: list[Event] = []
    train(recipe, resume=True, listeners=[notices.append])
    assert Notice("no checkpoint to go on from: starting from the beginning") in notices
    assert [record["step"] for record in read_metrics(tmp_path / "run", "train")] == [1, 2]


def test_resume_under_another_recipe_is_refused(tmp_path: Path) -> None:
    """What would have made another run is listed; what only changes reporting or length is free."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    changed = with_training(recipe, learning_rate=1e-3, seed=7, logging_steps=2, max_steps=4)
    with pytest.raises(OutputError) as caught:
        train(changed, resume=True)
    assert str(caught.value) == (
        f"--resume: the run in {tmp_path / 'run'} was made with other settings:\n"
        "  training.learning_rate: was 0.01, is 0.001\n"
        "  training.seed: was 42, is 7\n"
        "Resume with the same recipe, or train into another folder with --output-dir"
    )


def test_resume_over_other_rows_is_refused(tmp_path: Path) -> None:
    """The file has the same name and other rows: told, and the run stays as it was."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(recipe)
    rows = Path(recipe.dataset.train)
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(OutputError, match=r"^--resume: the train rows are not those that the run in "):
        train(with_training(recipe, max_steps=4), resume=True)
    assert (tmp_path / "run" / "run.json").read_text() == before


def test_resume_for_fewer_steps_than_were_done_is_refused(tmp_path: Path) -> None:
    """A run of four steps is not made a completed one of two; resumed as it was, it stays complete."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 4})
    train(recipe)
    with pytest.raises(OutputError, match=r"has done 4 steps, and the recipe asks for 2\. Ask for more"):
        train(with_training(recipe, max_steps=2), resume=True)
    metrics, sha256 = (tmp_path / "run" / "metrics.jsonl").read_text(), digest(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    train(recipe, resume=True)
    again = json.loads((tmp_path / "run" / "run.json").read_text())
    assert ((tmp_path / "run" / "metrics.jsonl").read_text(), digest(tmp_path / "run")) == (metrics, sha256)
    kept = ("status", "started_at", "last_train", "first_eval", "last_eval", "last_checkpoint")
    assert {name: again[name] for name in kept} == {name: record[name] for name in kept}


def test_another_length_under_a_falling_rate_is_said(tmp_path: Path) -> None:
    """A cosine over more steps is another curve: a notice with both lengths; a constant rate needs none."""
    for kind, said in (("cosine", True), ("constant", False)):
        recipe = with_training(
            tiny_recipe(tmp_path, training={"max_steps": 2, "lr_scheduler_type": kind}), tmp_path / kind
        )
        train(recipe)
        events: list[Event] = []
        train(with_training(recipe, tmp_path / kind, max_steps=3), resume=True, listeners=[events.append])
        text = (
            f"the {kind} learning rate now falls over 3 steps, not 2: from here on this is not the run that it would "
            "have been"
        )
        assert (Notice(text) in events) == said


def test_doubts_are_said(tmp_path: Path) -> None:
    """Empty answers, a validation set that is the training set, a warmup that never ends: each a notice."""
    recipe = tiny_recipe(tmp_path, rows=8, training={"max_steps": 2, "warmup_steps": 5})
    rows = Path(recipe.dataset.train)
    rows.write_text(rows.read_text() + json.dumps({"prompt": "red", "completion": ""}) + "\n")
    recipe = recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update={"validation": str(rows)})})
    events: list[Event] = []
    train(recipe, listeners=[events.append])
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert "1 training row has an empty answer and teaches only to stop (line 9)" in notices
    assert "validation has the rows of train: its loss says nothing about rows the model has not seen" in notices
    assert "warmup_steps is 5 and the run ends after 2" in notices


def test_a_failed_evaluation_is_owed_by_the_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the evaluation after the last step: resumed, the run evaluates before it calls itself complete."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2, "eval_on_start": False})
    monkeypatch.setattr(evaluation_module, "supervised_loss", broken_at({1}, lambda loss: loss * torch.nan))
    with pytest.raises(NonFiniteError):
        train(recipe)
    monkeypatch.undo()
    for _ in range(2):
        train(recipe, resume=True)
        assert [record["step"] for record in read_metrics(tmp_path / "run", "eval")] == [2]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["last_eval"]["step"] == 2


def test_a_state_that_is_broken_itself_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update of step 2 makes a weight infinite: its checkpoint is not written, and step 1's not rotated out."""
    recipe = tiny_recipe(tmp_path, validation_rows=0, training={"save_steps": 1, "save_total_limit": 1})
    build = run_module.build_optimizer

    def overflowing(*args: Any) -> torch.optim.Optimizer:
        optimizer = build(*args)
        step, calls = optimizer.step, []

        def step_too_far() -> None:
            step()
            calls.append(1)
            if len(calls) == 2:
                optimizer.param_groups[0]["params"][0].data[0, 0] = torch.inf

        optimizer.step = step_too_far
        return optimizer

    monkeypatch.setattr(run_module, "build_optimizer", overflowing)
    with pytest.raises(NonFiniteError, match=r"^step 2: its update made a trained weight NaN or infinite"):
        train(recipe, rehearse=False)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]


def test_the_environment_does_not_change_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate config` may leave accumulation and precision in the environment; the recipe alone decides."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 2})
    train(with_training(recipe, tmp_path / "plain"))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(with_training(recipe, tmp_path / "other"))
    assert digest(tmp_path / "plain") == digest(tmp_path / "other")


def test_layers_the_model_never_calls_are_told(tmp_path: Path) -> None:
    """Mamba multiplies with one projection's weight itself: the first step names those layers, before any is lost."""
    tokenizer = tiny_tokenizer()
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    recipe = tiny_recipe(tmp_path, family="mamba", quantization={"bits": 16, "compute_dtype": "float32"})
    with pytest.raises(ModelError, match=r"took no part in the first step, .*: backbone\.layers\.0\.mixer\.dt_proj\. "):
        train(recipe)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ModelError, match=r"took no part in the first step"):
        train(with_training(recipe, tmp_path / "unrehearsed"), rehearse=False)
    train(with_training(_only(recipe, ["in_proj", "out_proj"]), tmp_path / "named"))


def _only(recipe: Recipe, names: list[str]) -> Recipe:
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"target_modules": names})})


def test_a_folder_that_holds_a_run_is_not_touched(tmp_path: Path) -> None:
    """Refused before anything is loaded; afterwards everything in it is as it was."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 1})
    train(recipe)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(OutputError, match=r"already holds a run\. Add --resume to go on with it"):
        train(recipe.model_copy(update={"base_model": "/nowhere"}))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_wrong_request_leaves_no_folder(tmp_path: Path) -> None:
    """An empty dataset, positions beyond the model's: told before a run folder is made."""
    recipe = tiny_recipe(tmp_path)
    Path(recipe.dataset.train).write_text("")
    with pytest.raises(DataError):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_a_row_beyond_the_models_positions_is_told(tmp_path: Path) -> None:
    """max_length above what the model was built for: the row is named before the model is loaded."""
    recipe = tiny_recipe(tmp_path, dataset={"max_length": 4096})
    rows = Path(recipe.dataset.train)
    rows.write_text(rows.read_text() + json.dumps({"prompt": "x " * 400, "completion": "y"}) + "\n")
    with pytest.raises(DataError) as caught:
        train(recipe)
    assert str(caught.value).startswith(f"{rows}, line 33 has ")
    assert str(caught.value).endswith(
        "the model has positions for 256. "
        "Set dataset.max_length to 256 or less, and dataset.overlong to drop or truncate"
    )


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_non_finite_step_stops_with_the_last_good_state(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3's loss is NaN, or its gradient is: exit code 1, the step and its rows named, step 2's state saved, no
    adapter, and a run without the fault goes on from there."""

    recipe = tiny_recipe(tmp_path, validation_rows=0, training={"max_steps": 4})
    monkeypatch.setattr(gradients_module, "supervised_loss", broken_at({3}, FAULTS[kind]))
    with pytest.raises(NonFiniteError) as caught:
        train(recipe, rehearse=False)  # which would be broken itself
    assert caught.value.exit_code == 1
    what = "loss is nan" if kind == "loss" else "gradient norm is nan"
    message = str(caught.value)
    assert message.startswith(f"step 3: the {what}, so training stopped; the state after step 2 is saved. Rows of ")
    named = message.split(" in it: line ")[1].split(". ")[0].split(", ")
    assert len(named) == 4
    assert all(1 <= int(row) <= 32 for row in named)
    run = tmp_path / "run"
    assert not (run / "adapter").exists()
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["last_checkpoint"]) == ("failed", "step-000002")
    assert record["error"] == message

    monkeypatch.undo()
    train(recipe, resume=True)
    whole = with_training(recipe, tmp_path / "whole")
    train(whole)
    assert digest(run) == digest(tmp_path / "whole")


def test_a_non_finite_evaluation_stops_with_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out loss after step 2 is NaN in its second batch: that batch's rows are named, step 2 is saved, and
    metrics.jsonl stays valid JSON."""
    recipe = tiny_recipe(tmp_path, training={"max_steps": 4, "eval_steps": 2, "eval_on_start": False})
    monkeypatch.setattr(evaluation_module, "supervised_loss", broken_at({2}, lambda loss: loss * torch.nan))
    with pytest.raises(NonFiniteError) as caught:
        train(recipe)
    message = str(caught.value)
    assert message.startswith("evaluation after step 2: the held-out loss is nan. Rows of ")
    assert len(message.split(" in it: ")[1].split(". ")[0].split(", ")) == 4
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["last_checkpoint"]) == ("failed", "step-000002")
    assert len(read_metrics(tmp_path / "run", "train")) == 2


def test_a_broken_base_is_told_before_the_first_step(tmp_path: Path) -> None:
    """NaN in the base's own weights: the rehearsal, or without one the first evaluation, says that it is the base."""
    recipe = tiny_recipe(tmp_path)
    weights = Path(recipe.base_model) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    for rehearse in (True, False):
        with pytest.raises(NonFiniteError, match=r"Nothing was trained yet, so it is the base model that gives this"):
            train(recipe, rehearse=rehearse)


def test_evaluation_does_not_disturb_training(tmp_path: Path) -> None:
    """With dropout on, a run that evaluates at every step ends in the bits of one that never does."""
    recipe = tiny_recipe(tmp_path, lora={"dropout": 0.3}, training={"max_steps": 4})
    train(with_training(recipe, tmp_path / "often", eval_steps=1))
    rarely = train(with_training(recipe, tmp_path / "rarely", eval_on_start=False))
    assert rarely.first_eval_loss is None  # what there is, was not before the first step
    assert rarely.last_eval_loss is not None
    assert digest(tmp_path / "often") == digest(tmp_path / "rarely")


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization": {"bits": 16, "compute_dtype": "float32"}},
        {"quantization": {"bits": 16, "compute_dtype": "bfloat16"}},
        {"quantization": {"quant_type": "fp4", "double_quant": False}},
        {"lora": {"target_modules": ["q_proj", "v_proj"]}},
        {"lora": {"target_modules": r".*\.mlp\..*"}},
        {"training": {"max_grad_norm": None, "weight_decay": 0.1, "save_steps": None}},
    ],
    ids=lambda changes: json.dumps(changes),
)
def test_the_other_ways_learn_too(changes: dict[str, Any], tmp_path: Path) -> None:
    """Unquantised, FP4, some layers only, no clipping: the held-out loss falls and the adapter loads in PEFT."""
    recipe = tiny_recipe(tmp_path, **changes)
    finished = train(recipe)
    assert finished.first_eval_loss is not None
    assert finished.last_eval_loss is not None
    assert finished.last_eval_loss < finished.first_eval_loss
    _in_peft(recipe, tmp_path / "run")
