"""Runs whose files were damaged, deleted or exchanged go on from what is whole, say so, and end in the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_cli.errors import CheckpointError, OutputError, QloraError
from qlora_cli.recipe.schema import Recipe
from qlora_cli.training import going_on
from qlora_cli.training.checkpoint import list_checkpoints, set_aside
from qlora_cli.training.events import Event, Notice
from qlora_cli.training.manifest import FORMAT_VERSION, Fault
from qlora_cli.training.run import train
from qlora_cli.training.run_folder import RunFolder
from tests.support.faults import crash, with_training
from tests.support.finished_runs import FinishedRun
from tests.support.runs import tiny_recipe

FILES = (
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
    "manifest.json",
)
BEGINNING = "no checkpoint to go on from: starting from the beginning"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, FinishedRun, Path]:
    """A run of four steps with two checkpoints, as it ended, and a copy of its folder."""
    folder = tmp_path_factory.mktemp("damage")
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 1, "eval_steps": 3}
    settings |= {"optimizer": "adamw_torch"}
    recipe = tiny_recipe(folder, rows=6, validation_rows=2, lora={"dropout": 0.1}, training=settings)
    train(recipe)
    run = Path(recipe.output_dir)
    return recipe, FinishedRun.of(RunFolder(run)), Path(shutil.copytree(run, folder / "kept"))


@pytest.fixture
def run(made: tuple[Recipe, FinishedRun, Path]) -> Path:
    """The run's folder, as it was when it had ended."""
    recipe, _, kept = made
    shutil.rmtree(recipe.output_dir, ignore_errors=True)
    return Path(shutil.copytree(kept, recipe.output_dir))


def _resume(recipe: Recipe) -> list[str]:
    """Go on; what was said."""
    events: list[Event] = []
    train(recipe, resume=True, listeners=[events.append])
    return [event.text for event in events if isinstance(event, Notice)]


def _cut(file: Path, older: Path) -> str:
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    return f"{{name}} has {size // 2:,} bytes, {size:,} were written"


def _flip(file: Path, older: Path) -> str:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return "{name} is not what was written: its SHA-256 is another"


def _delete(file: Path, older: Path) -> str:
    file.unlink()
    return "{name} is missing"


def _exchange(file: Path, older: Path) -> str:
    """For the older checkpoint's; what is told is told of whatever file the two differ in."""
    file.write_bytes(older.read_bytes())
    return ""


@pytest.mark.parametrize("damage", [_cut, _flip, _delete, _exchange])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(
    name: str, damage: Callable[[Path, Path], str], made: tuple[Recipe, FinishedRun, Path], run: Path
) -> None:
    """Each file of the newest: which checkpoint, which file and why are said, the one before is gone on from, and the
    end is the same. The damaged one stays, out of the way."""
    recipe, whole, _ = made
    newest, older = list_checkpoints(run / "checkpoints")
    same = (newest / name).read_bytes() == (older / name).read_bytes()
    fault = damage(newest / name, older / name).format(name=name)
    if name == "manifest.json":
        fault = "has no manifest.json" if damage is _delete else "manifest.json is damaged"
    told = _resume(recipe)
    if damage is _exchange:
        if same:
            assert "going on from step-000004" in told
            return
        assert told[0].startswith("passed over checkpoint step-000004: ")
    else:
        assert told[0] == f"passed over checkpoint step-000004: {fault}"
    assert "going on from step-000002" in told
    assert whole.differences(RunFolder(run)) == []
    assert (run / "checkpoints" / "damaged-step-000004").exists()


def _of_another_version(checkpoint: Path) -> str:
    """As the first version of the format has it; what is said of it."""
    (checkpoint / "manifest.json").write_text('{"format_version": 1, "files": {}}')
    return f"has format version 1, this is {FORMAT_VERSION}: another version of this tool wrote it"


def test_a_checkpoint_of_another_version_is_kept(made: tuple[Recipe, FinishedRun, Path], run: Path) -> None:
    """It is passed over where there is an older one, under a name that does not call it damaged. Where there is none,
    this version may not go on at all: nothing in the folder changes."""
    recipe, whole, _ = made
    newest, _ = list_checkpoints(run / "checkpoints")
    fault = _of_another_version(newest)
    files = _contents(newest)
    assert _resume(recipe) == [f"passed over checkpoint step-000004: {fault}", "going on from step-000002"]
    assert whole.differences(RunFolder(run)) == []
    assert _contents(run / "checkpoints" / "other-version-step-000004") == files

    shutil.rmtree(run / "adapter")
    for checkpoint in list_checkpoints(run / "checkpoints"):
        _of_another_version(checkpoint)
    before = _contents(run)
    with pytest.raises(CheckpointError) as caught:
        _resume(recipe)
    assert str(caught.value) == (
        f"{newest} {fault}. Go on with the version of qlora-cli that the run began with (run.json has it), or train "
        "into another folder with --output-dir"
    )
    assert _contents(run) == before


def test_a_checkpoint_that_cannot_be_read_is_not_passed_over(made: tuple[Recipe, FinishedRun, Path], run: Path) -> None:
    """Its disk may be back in a minute: the run does not go on from an older one, and nothing is renamed."""
    recipe, whole, _ = made
    newest, _ = list_checkpoints(run / "checkpoints")
    manifest = newest / "manifest.json"
    text = manifest.read_text()
    manifest.unlink()
    manifest.symlink_to(manifest)  # as root reads what has no permission
    with pytest.raises(CheckpointError, match=r"^.*step-000004 has a file that cannot be read, manifest\.json: "):
        _resume(recipe)
    manifest.unlink()
    manifest.write_text(text)
    assert _resume(recipe) == ["going on from step-000004"]
    assert whole.differences(RunFolder(run)) == []


def test_all_checkpoints_damaged_begins_again(made: tuple[Recipe, FinishedRun, Path], run: Path) -> None:
    """Nothing to go on from, as a run has no result before it ends: both are named, it begins at step 1, and ends the
    same."""
    recipe, whole, _ = made
    shutil.rmtree(run / "adapter")
    for checkpoint in list_checkpoints(run / "checkpoints"):
        (checkpoint / "state.json").unlink()
    assert _resume(recipe)[-3:] == [
        "passed over checkpoint step-000004: state.json is missing",
        "passed over checkpoint step-000002: state.json is missing",
        BEGINNING,
    ]
    assert whole.differences(RunFolder(run)) == []


def test_a_result_is_not_replaced_by_a_beginning(made: tuple[Recipe, FinishedRun, Path], run: Path) -> None:
    """The run has ended, and its checkpoints are damaged, or deleted to save room: what was trained stays, its record
    and its metrics with it."""
    recipe, _, _ = made
    (run / "checkpoints" / "step-000004" / "state.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000002")
    told = (
        f"--resume: the run in {run} has a trained adapter, and no checkpoint to go on from: it would begin again and "
        f"replace that. Move {run / 'adapter'} somewhere else, or train into another folder with --output-dir"
    )
    for fault in ("\n  step-000004: state.json is missing", ""):
        before = _contents(run)
        with pytest.raises(OutputError) as caught:
            _resume(with_training(recipe, learning_rate=1.0))
        assert str(caught.value) == told + fault
        assert _contents(run) == before
        shutil.rmtree(run / "checkpoints", ignore_errors=True)


def test_a_result_that_cannot_be_looked_at_is_one(run: Path) -> None:
    """A link to a disk that is away; an empty folder is none."""
    folder = RunFolder(run)
    assert folder.may_hold_a_result()
    (run / "adapter").rename(run / "away")
    assert not folder.may_hold_a_result()
    (run / "adapter").mkdir()
    assert not folder.may_hold_a_result()
    (run / "adapter").rmdir()
    (run / "adapter").symlink_to(run / "nowhere")
    assert folder.may_hold_a_result()


def _contents(folder: Path) -> dict[str, bytes]:
    """Every file in it; the lock's stays beside a run."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ".lock"}


@pytest.mark.parametrize("left", [[], ["adapter_config.json", "tokenizer.json"]], ids=["all", "some"])
def test_a_deleted_adapter_is_written_again(left: list[str], made: tuple[Recipe, FinishedRun, Path], run: Path) -> None:
    """Of a completed run, all of it or its weights alone: resumed, every byte is there again, and no step is done."""
    recipe, whole, _ = made
    for path in (run / "adapter").iterdir():
        if path.name not in left:
            path.unlink()
    if not left:
        (run / "adapter").rmdir()
    assert _resume(recipe)[-1] == "going on from step-000004"
    assert whole.differences(RunFolder(run)) == []


def _go_on_without(recipe: Recipe, file: Path, text: str | None) -> None:
    """Go on from step 2 of 4 with that file of the run lost, or full of something else."""
    shutil.rmtree(file.parent / "checkpoints" / "step-000004")
    file.unlink()
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    assert _resume(recipe)[-1] == "going on from step-000002"


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "\x00\x00", '{"started_at": 5}', '{"started_at": "x"}', "é"])
def test_a_lost_record_is_made_anew(text: str | None, made: tuple[Recipe, FinishedRun, Path], run: Path) -> None:
    """run.json deleted or full of something else: the run goes on, and has a record of what it did since."""
    recipe, whole, _ = made
    _go_on_without(recipe, run / "run.json", text)
    assert whole.differences(RunFolder(run)) == []
    record = json.loads((run / "run.json").read_text())
    assert record["last_eval"]["step"] == 4


@pytest.mark.parametrize(
    "text", [None, "", "7\n", "{}\n", '{"event": "other", "step": 1}\n', "é\n", "\x00" * 9, "[" * 10**5]
)
def test_lost_metrics_begin_where_the_run_goes_on(
    text: str | None, made: tuple[Recipe, FinishedRun, Path], run: Path
) -> None:
    """metrics.jsonl deleted or full of something else: the steps that are done from here on are in it, once."""
    recipe, whole, _ = made
    _go_on_without(recipe, run / "metrics.jsonl", text)
    after = FinishedRun.of(RunFolder(run))
    assert after.adapter == whole.adapter
    assert after.metrics == [record for record in whole.metrics if record["step"] > 2]


@pytest.mark.parametrize(
    "found",
    [
        {"best_eval": {"step": 2}},
        {"first_eval": "x"},
        {"last_eval": {"step": 2, "eval_loss": "x"}},
        {"first_benchmark": [], "last_benchmark": {"scores": 3}},
        {"best": {"score": 1}, "last_checkpoint": 7, "adapter_step": "7", "last_train": {}},
        {"best": {"step": "2", "score": "x", "value": True, "checkpoint": "step-000002"}},
    ],
)
def test_a_record_of_other_things(found: dict[str, object], made: tuple[Recipe, FinishedRun, Path], run: Path) -> None:
    """run.json is JSON, and what is in it is not what was written: it counts for nothing."""
    recipe, whole, _ = made
    record = json.loads((run / "run.json").read_text()) | found
    _go_on_without(recipe, run / "run.json", json.dumps(record))
    assert whole.differences(RunFolder(run)) == []
    after = json.loads((run / "run.json").read_text())
    assert [after[name] for name in found if name in ("best", "best_eval", "first_benchmark")] in ([], [None])
    assert after["last_eval"]["step"] == 4


def test_lines_around_a_damaged_one_are_kept(made: tuple[Recipe, FinishedRun, Path], run: Path) -> None:
    """One line of metrics.jsonl has become nonsense: the others before the checkpoint stay."""
    recipe, whole, _ = made
    shutil.rmtree(run / "checkpoints" / "step-000004")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([lines[0], b"\xff" + lines[1], *lines[2:]]))
    _resume(recipe)
    assert FinishedRun.of(RunFolder(run)).metrics == [whole.metrics[0], *whole.metrics[2:]]


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "a link to nothing"])
def test_missing_checkpoints_are_missed(what: str, made: tuple[Recipe, FinishedRun, Path], run: Path) -> None:
    """They may be on a disk that is not mounted, and run.json tells of one: refused, and nothing changes. Where it is
    deleted, too, the run begins again."""
    recipe, whole, _ = made
    shutil.rmtree(run / "adapter")
    checkpoints = run / "checkpoints"
    shutil.rmtree(checkpoints)
    if what == "an empty folder":
        checkpoints.mkdir()
    if what == "a link to nothing":
        checkpoints.symlink_to("away")
    before = _contents(run)
    with pytest.raises(OutputError) as caught:
        _resume(recipe)
    assert str(caught.value) == (
        f"--resume: {run / 'run.json'} tells of step-000004, and there is no checkpoint in {checkpoints}: is it on a "
        f"disk that is not mounted, or was it moved? Put it back, or delete {run / 'run.json'} to begin again"
    )
    assert _contents(run) == before
    (run / "run.json").unlink()
    if checkpoints.is_symlink():
        checkpoints.unlink()
    assert _resume(recipe)[-1] == BEGINNING
    assert whole.differences(RunFolder(run)) == []


def test_a_beginning_that_is_killed_begins_again(
    made: tuple[Recipe, FinishedRun, Path], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All checkpoints are damaged; the run that begins again is killed when the first is out of the way, and when the
    last is."""
    recipe, whole, _ = made
    shutil.rmtree(run / "adapter")
    for checkpoint in list_checkpoints(run / "checkpoints"):
        (checkpoint / "state.json").unlink()
    for kept in (1, 0):
        with monkeypatch.context() as patch:
            patch.setattr(going_on, "set_aside", _until(kept, run / "checkpoints"))
            with pytest.raises(ZeroDivisionError):
                _resume(recipe)
        assert len(list_checkpoints(run / "checkpoints")) == kept
    assert _resume(recipe)[-1] == BEGINNING
    assert whole.differences(RunFolder(run)) == []


def _until(left: int, checkpoints: Path) -> Callable[[Path, Fault], Path]:
    """A `set_aside` that dies when there are only so many checkpoints left."""

    def dying(checkpoint: Path, fault: Fault) -> Path:
        aside = set_aside(checkpoint, fault)
        if len(list_checkpoints(checkpoints)) == left:
            crash()
        return aside

    return dying


def test_a_file_in_the_place_of_checkpoints_is_told(made: tuple[Recipe, FinishedRun, Path], run: Path) -> None:
    """It is not taken for a folder, nor replaced by one."""
    recipe, _, _ = made
    for name in ("adapter", "checkpoints"):
        shutil.rmtree(run / name)
    (run / "run.json").unlink()
    (run / "checkpoints").write_text("")
    with pytest.raises(QloraError, match=r"checkpoints: could not be written: File exists$"):
        _resume(recipe)
