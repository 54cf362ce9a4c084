"""Each check of the self-test passes on what is right, and tells what is wrong."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_cli.errors import Interrupted, RunError
from qlora_cli.model.packing import BLOCK_DIAGONAL
from qlora_cli.recipe.schema import Recipe
from qlora_cli.selftest import accumulation, adapter_files, child, four_bits, killed, packed, same_seed
from qlora_cli.selftest.differences import largest, relative_to_largest
from qlora_cli.selftest.events import Begun, Check, Checking, Event, Measured, Result
from qlora_cli.selftest.run import CHECKS, run_selftest
from qlora_cli.selftest.workbench import Workbench, workbench
from qlora_cli.training.events import Finished, StepDone
from qlora_cli.training.run import train
from qlora_cli.training.run_folder import RunFolder

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def bench() -> Iterator[Workbench]:
    with workbench(torch.device("cpu")) as made:
        yield made


def training(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})


def flip_a_bit(folder: Path) -> None:
    """The lowest bit of one number of an adapter, and its metadata as it was."""
    tensors = load_file(folder / WEIGHTS)
    first = next(iter(tensors.values()))
    first.view(torch.int32)[0, 0] ^= 1
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------- The same seed


def test_another_seed_is_not_the_same_bits(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which dropout draws something else each time: both digests are told."""
    seeds = iter((1, 2))
    monkeypatch.setattr(same_seed, "train", lambda recipe: train(training(recipe, seed=next(seeds))))
    measured = same_seed.check_same_seed(bench)
    assert not measured.passed
    first, second = measured.bound["sha256"], measured.figure["sha256"]
    assert first != second
    assert measured.detail == (
        "two runs of 5 steps in NF4 with double quantisation, dropout and accumulation: "
        f"the first adapter has SHA-256 {first}, the second SHA-256 {second}"
    )


def test_one_bit_is_not_the_same_bits(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest bit of one number in the second adapter."""

    def flipping(recipe: Recipe) -> Finished:
        finished = train(training(recipe, max_steps=2))
        if recipe.output_dir.endswith("second"):
            flip_a_bit(finished.adapter)
        return finished

    monkeypatch.setattr(same_seed, "train", flipping)
    assert not same_seed.check_same_seed(bench).passed


# ------------------------------------------------------------------------------------------- Killed and resumed


def stop_in_process(bench: Workbench, recipe: Recipe, *, after_step: int) -> int:
    """What a kill leaves, without a process that has to import everything first."""

    def stop(event: object) -> None:
        if isinstance(event, StepDone) and event.step == after_step:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(recipe, listeners=[stop])
    return after_step


def _flipped(run: RunFolder) -> None:
    flip_a_bit(run.adapter)


def _repeated(run: RunFolder) -> None:
    run.metrics.write_text(run.metrics.read_text() + run.metrics.read_text().splitlines()[0] + "\n")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (None, "the adapter has the SHA-256 of an unbroken run, {wanted}"),
        (_flipped, "the adapter has SHA-256 {got}, that of an unbroken run {wanted}"),
        (_repeated, "metrics.jsonl has not the steps and losses of an unbroken run"),
    ],
)
def test_what_a_resumed_run_leaves_is_compared(
    spoil: Callable[[RunFolder], None] | None, told: str, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All right, one bit of the adapter, a step told twice."""

    def spoiling(recipe: Recipe, *, resume: bool = False, listeners: Any = ()) -> Finished:
        finished = train(recipe, resume=resume, listeners=listeners)
        if resume and spoil is not None:
            spoil(RunFolder(Path(recipe.output_dir)))
        return finished

    monkeypatch.setattr(killed, "train_and_kill", stop_in_process)
    monkeypatch.setattr(killed, "train", spoiling)
    measured = killed.check_killed(bench)
    assert measured.passed == (spoil is None)
    expected = told.format(got=measured.figure["sha256"], wanted=measured.bound["sha256"])
    assert measured.detail == f"killed after step 3, resumed after step 2 of 6: {expected}"


def test_a_run_that_begins_anew_was_not_resumed(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a whole checkpoint the bits are the same, and nothing is shown: it is a failure."""

    def losing(bench: Workbench, recipe: Recipe, *, after_step: int) -> int:
        stop_in_process(bench, recipe, after_step=after_step)
        for file in Path(recipe.output_dir).glob("checkpoints/*/manifest.json"):
            file.unlink()
        return after_step

    monkeypatch.setattr(killed, "train_and_kill", losing)
    measured = killed.check_killed(bench)
    assert (measured.passed, measured.figure == measured.bound) == (False, True)
    assert measured.detail == ("killed after step 3, resumed after step 0 of 6: no checkpoint was found to go on from")


def test_a_process_that_fails_by_itself_is_told(bench: Workbench) -> None:
    """Its base is not there: what it said, and its exit code; nothing runs on."""
    recipe = bench.recipe("killed", rows=4).model_copy(update={"base_model": str(bench.folder / "nowhere")})
    with pytest.raises(RunError) as caught:
        child.train_and_kill(bench, recipe, after_step=5)
    message = str(caught.value)
    assert message.startswith("the training process ended by itself with exit code 2: error: ")
    assert "nowhere" in message


def test_a_process_that_hangs_is_told(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than there is patience for: killed, and said."""
    monkeypatch.setattr(child, "_PATIENCE", 0.0)
    with pytest.raises(RunError, match=r"^the training process had not done 5 steps after 0 s: it said nothing$"):
        child.train_and_kill(bench, bench.recipe("killed", rows=4), after_step=5)


def test_a_line_cut_short_is_no_step(bench: Workbench) -> None:
    """A kill in the middle of a write leaves half a line."""
    folder = RunFolder(bench.folder / "killed")
    assert child.last_step(folder) == 0
    folder.path.mkdir()
    lines = [json.dumps({"event": "train", "step": 3, "loss": 1.5}), json.dumps({"event": "eval", "step": 9})]
    folder.metrics.write_text("\n".join([*lines, '{"event": "train", "st']))
    assert child.losses(folder) == [(3, 1.5)]


# ------------------------------------------------------------------------------------------- Accumulation


def test_accumulation_is_the_same_step(bench: Workbench) -> None:
    """To float32 noise, which is far below the bound."""
    measured = accumulation.check_accumulation(bench)
    assert measured.passed
    assert measured.figure.keys() == measured.bound.keys() == {"loss", "adapter"}
    assert all(value < measured.bound[name] / 5 for name, value in measured.figure.items())


def test_rows_that_weigh_otherwise_are_told(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of the four seen by the accumulating run is another one: the loss says so, and the adapter."""

    def other(recipe: Recipe, **arguments: Any) -> Finished:
        if recipe.training.gradient_accumulation_steps > 1:
            rows = Path(recipe.dataset.train).read_text().splitlines(keepends=True)
            file = bench.folder / "other.jsonl"
            file.write_text("".join([*rows[:3], rows[0]]))
            recipe = recipe.model_copy(update={"dataset": recipe.dataset.model_copy(update={"train": str(file)})})
        return train(recipe, **arguments)

    monkeypatch.setattr(accumulation, "train", other)
    measured = accumulation.check_accumulation(bench)
    assert not measured.passed
    assert measured.figure["loss"] > 10 * accumulation.LOSS_BOUND
    assert measured.figure["adapter"] > 10 * accumulation.ADAPTER_BOUND


def test_an_adapter_that_moves_otherwise_is_told(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses are not enough: the last step's update shows in the adapter alone."""

    def shorter(recipe: Recipe, **arguments: Any) -> Finished:
        finished = train(recipe, **arguments)
        if recipe.training.gradient_accumulation_steps > 1:
            tensors = {name: tensor * 1.002 for name, tensor in load_file(finished.adapter / WEIGHTS).items()}
            save_file(tensors, finished.adapter / WEIGHTS)
        return finished

    monkeypatch.setattr(accumulation, "train", shorter)
    measured = accumulation.check_accumulation(bench)
    assert not measured.passed
    assert measured.figure["loss"] <= accumulation.LOSS_BOUND


# ------------------------------------------------------------------------------------------- Packing


def test_packs_are_the_rows(bench: Workbench) -> None:
    """In fewer sequences than rows, to float32 noise."""
    measured = packed.check_packed(bench)
    assert measured.passed
    assert measured.detail.startswith("12 rows in 5 packs, kept apart by variable-length attention: the loss differs")
    assert all(value < measured.bound[name] / 5 for name, value in measured.figure.items())


def test_rows_that_see_each_other_are_told(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes no heed of where rows begin."""
    monkeypatch.setattr(packed, "prepare_packing", lambda model: BLOCK_DIAGONAL)
    monkeypatch.setattr("qlora_cli.training.loss.packed_inputs", lambda model, position_ids: {})
    measured = packed.check_packed(bench)
    assert not measured.passed
    assert all(value > measured.bound[name] for name, value in measured.figure.items())


# ------------------------------------------------------------------------------------------- Adapter files


def test_an_adapter_comes_back(bench: Workbench) -> None:
    measured = adapter_files.check_adapter_files(bench)
    assert measured.passed
    assert measured.detail == (
        "saved, and loaded onto the base read anew: 0 of 28 tensors have other bits, and the logits of 48 tokens "
        "differ by 0 at most"
    )


def test_one_bit_of_an_adapter_is_told(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest bit of one number, which no logit need show."""
    save = adapter_files.save_adapter

    def flipping(model: Any, folder: Path, base: Any) -> None:
        save(model, folder, base)
        flip_a_bit(folder)

    monkeypatch.setattr(adapter_files, "save_adapter", flipping)
    measured = adapter_files.check_adapter_files(bench)
    assert (measured.passed, measured.figure["changed tensors"]) == (False, 1)


def test_another_scale_is_told(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors to the bit, and a config that says another alpha: the logits tell."""
    save = adapter_files.save_adapter

    def rescaling(model: Any, folder: Path, base: Any) -> None:
        save(model, folder, base)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 17}))

    monkeypatch.setattr(adapter_files, "save_adapter", rescaling)
    measured = adapter_files.check_adapter_files(bench)
    assert (measured.passed, measured.figure["changed tensors"]) == (False, 0)
    assert measured.figure["logits"] > 0


# ------------------------------------------------------------------------------------------- Four bits


def test_four_bits_come_back_as_near_as_they_are(bench: Workbench) -> None:
    measured = four_bits.check_four_bits(bench)
    assert measured.passed
    assert measured.figure.keys() == {"NF4", "NF4 double", "FP4", "FP4 double"}
    assert measured.bound["NF4"] == "0.0728 ± 0.001"


ROUND_TRIP = four_bits._round_trip


def _other_table(values: torch.Tensor, kind: str, double: bool, device: torch.device) -> torch.Tensor:
    return ROUND_TRIP(values, "fp4", double, device)


def _one_block_wrong(values: torch.Tensor, kind: str, double: bool, device: torch.device) -> torch.Tensor:
    got = ROUND_TRIP(values, kind, double, device)
    got[5, :64] = got[6, :64]
    return got


def _nothing_done(values: torch.Tensor, kind: str, double: bool, device: torch.device) -> torch.Tensor:
    return values.clone()


def _not_a_number(values: torch.Tensor, kind: str, double: bool, device: torch.device) -> torch.Tensor:
    return values * torch.nan


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (
            _other_table,
            r"^NF4 is off by 0\.0965 on average where 0\.0728 is known; NF4 is off by 0\.16\d of a block's ",
        ),
        (
            _one_block_wrong,
            r"^NF4 is off by [01]\.\d{3} of a block's largest value where 0\.152 is the most; NF4 double",
        ),
        (_nothing_done, r"^NF4 is off by 0\.0000 on average where 0\.0728 is known; NF4 double is off"),
        (_not_a_number, r"^NF4 is off by nan on average"),
    ],
)
def test_wrong_four_bits_are_told(
    broken: Callable[..., torch.Tensor], told: str, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another table of values, one block of 16,384 with its neighbour's values, nothing quantised at all, NaN."""
    monkeypatch.setattr(four_bits, "_round_trip", broken)
    measured = four_bits.check_four_bits(bench)
    assert not measured.passed
    assert re.match(told, measured.detail), measured.detail


# ------------------------------------------------------------------------------------------- All of them


def checks(*measures: Callable[[Workbench], Measured]) -> list[Check]:
    return [Check(f"c{i}", f"check {i}", f"meaning {i}", measure) for i, measure in enumerate(measures)]


def good(bench: Workbench) -> Measured:
    return Measured(True, {"x": 1.0}, {"x": 2.0}, "well")


def bad(bench: Workbench) -> Measured:
    return Measured(False, {"x": 3.0}, {"x": 2.0}, "badly")


def raising(error: BaseException) -> Callable[[Workbench], Measured]:
    def measure(bench: Workbench) -> Measured:
        raise error

    return measure


NOT_KNOWN = (
    "It could not be carried out, so whether this holds for your runs is not known: mend that and run the self-test "
    "again."
)


def test_a_check_that_raises_is_no_failure_and_the_others_are_made() -> None:
    """What a failure means is not said of it. Its message is the detail, without the name of an error of ours; each
    event comes as it happens."""
    events: list[Event] = []
    made = checks(raising(ValueError("no")), raising(RunError("ended")), good, bad)
    report = run_selftest("cpu", checks=made, listeners=[events.append])
    assert [type(event) for event in events] == [Begun, *[Checking, Result] * 4]
    assert [(r.status, r.passed, r.detail, r.meaning) for r in report.results] == [
        ("error", False, "ValueError: no", NOT_KNOWN),
        ("error", False, "ended", NOT_KNOWN),
        ("passed", True, "well", None),
        ("failed", False, "badly", "meaning 3"),
    ]
    assert report.titles("error") == ["check 0", "check 1"]
    assert not report.passed


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("SIGINT: stopped after step 5, state saved")])
def test_being_stopped_is_no_failed_check(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a run has made of Ctrl-C what a run makes of it: nothing more is checked, and the folder is gone."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        run_selftest("cpu", checks=checks(raising(error), good), listeners=[seen.append])
    assert not any(isinstance(event, Result) for event in seen)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded rows are kept on the workbench for its time, whether something was set before or not."""
    for before in ("/somewhere", None):
        if before is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", before)
        with workbench(torch.device("cpu")) as made:
            assert Path(made.environment()["XDG_CACHE_HOME"]).parent == made.folder
        assert os.environ.get("XDG_CACHE_HOME") == before
        assert not made.folder.exists()


def test_every_check_says_what_a_failure_means() -> None:
    """Names are for programs, titles fit their column, meanings are sentences."""
    assert [check.name for check in CHECKS] == [
        "same_seed", "killed_and_resumed", "accumulation", "packing", "adapter_files", "four_bits"
    ]  # fmt: skip
    assert all(len(check.title) <= 30 and check.meaning.endswith(".") for check in CHECKS)


def test_differences() -> None:
    """Relative to the largest entry; what should be zero everywhere and is not is infinitely far; NaN is never lost."""
    assert relative_to_largest(torch.tensor([1.0, 4.0]), torch.tensor([2.0, -4.0])) == 2.0
    assert relative_to_largest(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_to_largest(torch.ones(2), torch.zeros(2)) == math.inf
    assert largest([1.0, 3.0, 2.0]) == 3.0
    assert math.isnan(largest([1.0, math.nan, 2.0]))
