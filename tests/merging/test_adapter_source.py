"""Every way to name an adapter finds it, with its base and how that was stored; what is none is told with a way on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_cli.errors import ModelError, RecipeError
from qlora_cli.merging.adapters.source import AdapterSource, adapter_sha256, find_adapter
from qlora_cli.model.source import ModelSource
from qlora_cli.recipe.schema import Recipe
from tests.support.adapters import write_adapter, write_run


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder as far as it is looked at here."""
    return write_base(tmp_path / "base")


def write_base(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"} | config))
    return folder


def recipe_over(base: Path | str, **changes: object) -> Recipe:
    data = {"base_model": str(base), "dataset": {"train": "gone.jsonl"}, "output_dir": str(Path.cwd() / "runs/one")}
    return Recipe.model_validate(data | changes)


def find(
    path: Path | str, base_model: str | None = None, revision: str | None = None, trained_base: str | None = None
) -> AdapterSource:
    return find_adapter(Path(path), base_model=base_model, revision=revision, trained_base=trained_base)


def refusal(path: Path | str, **arguments: str) -> str:
    with pytest.raises(ModelError) as caught:
        find(path, **arguments)
    return str(caught.value)


def test_a_finished_run(base: Path) -> None:
    """Its adapter/ is taken, named as the run or as itself, from wherever; the recipe tells base and storage, even if
    the run's data is gone."""
    run = write_run(recipe_over(base, quantization={"quant_type": "fp4"}), steps=(5,))
    for path in (
        "runs/one",
        "runs/one/",
        "runs/one/adapter",
        run.path,
        "runs/one/adapter/..",
        "runs/one/checkpoints/..",
    ):
        found = find(path)
        assert found.folder.resolve() == run.adapter.resolve(), path
        assert found.run is not None
        assert found.run.path.resolve() == run.path.resolve()
        assert found.base == ModelSource(str(base))
        assert (found.quantization.quant_type, found.quantization.double_quant) == ("fp4", True)
        assert (found.told_by, found.step, found.remarks) == ("the run's recipe", None, ())
        assert found.recipe is not None
        assert found.recipe.base_model == str(base)


@pytest.mark.parametrize("status", ["interrupted", "running"])
def test_a_run_that_did_not_finish(base: Path, status: str) -> None:
    """Its newest whole checkpoint is taken, and said; a damaged one is passed over, and said."""
    run = write_run(recipe_over(base), status=status, steps=(5, 10, 15), adapter=False)
    state = run.checkpoints / "step-000015/state.json"
    size = state.stat().st_size
    state.write_text("{}")
    found = find("runs/one")
    assert (found.folder, found.step) == (run.checkpoints / "step-000010/adapter", 10)
    how = "did not finish" if status == "running" else "did not finish (interrupted)"
    assert found.remarks == (
        f"passed over checkpoint step-000015: state.json has 2 bytes, {size:,} were written",
        f"the run in runs/one {how}: its newest whole checkpoint, step-000010, is taken",
    )


def test_a_finished_run_that_was_going_on(base: Path) -> None:
    """The adapter/ of its first part is taken only as long as no checkpoint has gone beyond it."""
    run = write_run(recipe_over(base), status="interrupted", steps=(5, 10))
    assert find("runs/one").folder == run.adapter
    assert find("runs/one").remarks == ()
    write_adapter(run.adapter, str(base), seed=5)
    assert find("runs/one").step == 10


def test_a_named_checkpoint(base: Path) -> None:
    """A checkpoint, or the adapter/ in it, is taken though newer ones are there; the run around it is found."""
    run = write_run(recipe_over(base), steps=(5, 10))
    for path in ("runs/one/checkpoints/step-000005", "runs/one/checkpoints/step-000005/adapter"):
        found = find(path)
        assert (found.folder, found.step) == (run.checkpoints / "step-000005/adapter", 5)
        assert found.run == run


def test_a_damaged_checkpoint(base: Path) -> None:
    """What is wrong with it is told, and which others are whole."""
    run = write_run(recipe_over(base), steps=(5, 10))
    weights = run.checkpoints / "step-000010/adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    expected = (
        "runs/one/checkpoints/step-000010: the checkpoint is damaged: adapter/adapter_model.safetensors is not what "
        "was written: its SHA-256 is another. Whole ones beside it: step-000005"
    )
    assert refusal("runs/one/checkpoints/step-000010") == expected
    assert refusal("runs/one/checkpoints/step-000010/adapter") == expected


def test_a_run_without_anything_yet(base: Path) -> None:
    """No adapter and no checkpoint: how to go on; and no checkpoint that is whole: why."""
    run = write_run(recipe_over(base), status="failed", adapter=False)
    assert refusal("runs/one") == (
        "runs/one: the run did not finish (failed), and has no checkpoint yet. Go on with it: "
        "qlora train RECIPE --resume"
    )
    (run.checkpoints / "step-000005/adapter").mkdir(parents=True)
    assert refusal("runs/one") == (
        "runs/one: the run has no adapter, and no checkpoint of it is whole:\n  step-000005: has no manifest.json"
    )


def test_a_run_whose_recipe_is_damaged(base: Path) -> None:
    """It is told as any recipe's mistakes are."""
    run = write_run(recipe_over(base))
    run.recipe.write_text("base_model: 3\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        find("runs/one")


def test_the_adapter_of_a_run_taken_elsewhere(base: Path) -> None:
    """Without its recipe it is like any PEFT folder: what is not known is assumed, and said with the way out."""
    run = write_run(recipe_over(base))
    run.adapter.rename("adapter")
    found = find("adapter")
    assert (found.base, found.run, found.recipe) == (ModelSource(str(base)), None, None)
    assert (found.quantization.bits, found.quantization.compute_dtype) == (16, "bfloat16")
    assert found.told_by == "assumed, as nothing tells"
    assert found.remarks == (
        "nothing tells how the base was stored while this adapter was trained: 16 bits are assumed. If it was in 4 "
        "bits, say --trained-base nf4-double (QLoRA's own; or nf4, fp4, fp4-double)",
    )


@pytest.mark.parametrize(
    ("word", "form"),
    [
        ("16bit", (16, "nf4", True)),
        ("nf4", (4, "nf4", False)),
        ("nf4-double", (4, "nf4", True)),
        ("fp4", (4, "fp4", False)),
        ("fp4-double", (4, "fp4", True)),
    ],
)
def test_how_the_base_was_stored_can_be_said(base: Path, word: str, form: tuple[int, str, bool]) -> None:
    """Every word of --trained-base; of 16 bits, the rest means nothing."""
    write_adapter(Path("peft"), str(base))
    found = find("peft", trained_base=word)
    section = found.quantization
    assert section.bits == form[0]
    assert section.bits == 16 or (section.quant_type, section.double_quant) == form[1:]
    assert (found.told_by, found.remarks) == ("--trained-base", ())


def test_a_base_that_is_stored_in_4_bits_says_so_itself(tmp_path: Path) -> None:
    """Its quantization_config tells; an argument that says otherwise is refused, one that agrees is not."""
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    stored |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    write_adapter(Path("peft"), str(write_base(tmp_path / "base4", quantization_config=stored)))
    found = find("peft", trained_base="nf4-double")
    assert found == find("peft")
    assert found.told_by == "the base's own quantization_config"
    section = found.quantization
    assert (section.bits, section.quant_type, section.double_quant) == (4, "nf4", True)
    assert section.compute_dtype == "bfloat16"
    assert refusal("peft", trained_base="fp4") == (
        "--trained-base: fp4 was said, but the base's own quantization_config has NF4, double quantisation, bfloat16 "
        "compute. Leave it out: it is for adapters of which nothing tells how their base was stored"
    )


def test_the_copy_in_4_bits_that_an_adapter_names(tmp_path: Path, base: Path) -> None:
    """Given the whole model in its place, it still tells how the adapter was trained; if it is gone, nothing does."""
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    copy = write_base(tmp_path / "model-bnb-4bit", quantization_config=stored)
    write_adapter(Path("peft"), str(copy))
    found = find("peft", base_model="base")
    assert (found.base.name, found.quantization.bits, found.quantization.double_quant) == (str(base), 4, False)
    assert found.told_by == f"the quantization_config of {copy}, which the adapter names"
    copy.rename("gone")
    assert find("peft", base_model="base").told_by == "assumed, as nothing tells"


def test_a_base_that_is_stored_otherwise(tmp_path: Path) -> None:
    """GPTQ, 8 bits: neither of the two bases can be had from it."""
    stored = {"quant_method": "gptq", "bits": 4}
    write_adapter(Path("peft"), str(write_base(tmp_path / "gptq", quantization_config=stored)))
    assert refusal("peft") == (
        "the base model's weights are stored quantised (gptq), which cannot be merged into. Name the model it was made "
        "from with --base-model"
    )


def test_a_recipe_is_not_contradicted(base: Path) -> None:
    """--trained-base against what the run's recipe says."""
    write_run(recipe_over(base))
    assert find("runs/one", trained_base="nf4-double").told_by == "the run's recipe"
    assert refusal("runs/one", trained_base="16bit").startswith(
        "--trained-base: 16bit was said, but the run's recipe has NF4, double quantisation, bfloat16 compute. "
    )


def test_half_precision_is_held_in_full(tmp_path: Path) -> None:
    """The values of a float16 base are all in float32; bfloat16 would lose three bits of each."""
    write_adapter(Path("peft"), str(write_base(tmp_path / "half", dtype="float16")))
    assert find("peft").quantization.compute_dtype == "float32"
    assert find("peft", trained_base="nf4").quantization.compute_dtype == "float32"


def test_the_base_that_was_moved(base: Path) -> None:
    """A base that is no longer there is told with the argument that names it; that goes before, relative or not."""
    write_run(recipe_over(base, trust_remote_code=True))
    write_adapter(Path("peft"), str(base))
    base.rename("moved")
    elsewhere = ". If it is elsewhere now, say where with --base-model"
    assert refusal("runs/one") == f"the run's recipe: the base model base: there is no such folder{elsewhere}"
    assert refusal("peft") == (f"peft/adapter_config.json: the base model base: there is no such folder{elsewhere}")
    found = find("runs/one", base_model="moved")
    # What was said of its code holds for the model, wherever it is.
    assert found.base == ModelSource(str(Path("moved").absolute()), None, True)
    assert found.remarks == ("the base model's own code may run here: trust_remote_code in the run's recipe allows it",)
    assert found.quantization.bits == 4
    assert find("peft", base_model="./moved").base == ModelSource(str(Path("moved").absolute()))
    assert refusal("peft", base_model="./nowhere") == ("--base-model: the base model nowhere: there is no such folder")
    assert refusal("peft", base_model="a b") == (
        "--base-model: the base model 'a b' is no folder that is there, and no hub name such as org/name"
    )


def test_a_base_on_the_hub(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name and revision are the recipe's or the adapter's, unless others are said."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or its client tries for 23 seconds
    write_run(recipe_over("org/model", revision="v1"))
    assert find("runs/one").base == ModelSource("org/model", "v1")
    assert find("runs/one", revision="v2").base == ModelSource("org/model", "v2")
    assert find("runs/one", base_model="org/model").base == ModelSource("org/model", "v1")
    assert find("runs/one", base_model="org/other").base == ModelSource("org/other", None)
    write_adapter(Path("peft"), "org/model", revision="v1")
    assert find("peft", base_model=str(base)).base == ModelSource(str(base))
    assert refusal("peft", base_model="base", revision="v1") == (
        "--revision: is for models of the hub, and the base model is a local folder, base: leave it out"
    )


def test_an_adapter_that_names_no_base() -> None:
    """The argument that names it is told."""
    write_adapter(Path("peft"), None)
    assert refusal("peft") == (
        "peft/adapter_config.json does not say which model the adapter was trained over. Say it with --base-model"
    )


def test_what_is_no_adapter(base: Path) -> None:
    """Every mistake in naming one: what is there, what was expected, what to do."""
    write_run(recipe_over(base), steps=(5,))
    Path("empty").mkdir()
    Path("recipe.yaml").write_text(Path("runs/one/recipe.yaml").read_text())
    Path("broken.yaml").write_text("a: [")
    Path("notes.txt").write_text("")
    expected = {
        "runs/oen": "runs/oen: there is no such folder; did you mean one?",
        "org/lora": "org/lora: there is no such folder. If it is an adapter on the hub, fetch it first: "
        "hf download org/lora --local-dir lora",
        "runs": "runs: no adapter in this folder, but in folders inside. Name one: runs/one",
        "empty": "empty: no adapter in this folder. Expected a run folder (adapter/ or checkpoints/ in it), a "
        "checkpoint, or adapter_config.json and adapter_model.safetensors",
        "base": "base is a whole model, not an adapter. Give the adapter here, and the model it was trained over, if "
        "that is not where the adapter says, with --base-model",
        "recipe.yaml": "recipe.yaml is a recipe; expected an adapter: the folder of the run, which it says is "
        f"{Path.cwd()}/runs/one",
        "broken.yaml": "broken.yaml is a recipe; expected an adapter: the folder of the run that was made with it",
        "notes.txt": "notes.txt is a file; expected a run folder, a checkpoint or an adapter folder",
        "runs/one/adapter/adapter_model.safetensors": "runs/one/adapter/adapter_model.safetensors is a file of an "
        "adapter; expected its folder: runs/one/adapter",
    }
    assert {path: refusal(path) for path in expected} == expected


def test_an_adapter_with_a_part_missing(base: Path) -> None:
    """Each of its two files; weights that are there only as pickle are refused with the way out."""
    config = write_adapter(Path("peft"), str(base)) / "adapter_config.json"
    text = config.read_text()
    config.unlink()
    assert refusal("peft") == (
        "peft: has adapter_model.safetensors, but no adapter_config.json beside it, which says how to apply it"
    )
    config.write_text(text)
    weights = Path("peft/adapter_model.safetensors")
    weights.rename("peft/adapter_model.bin")
    assert refusal("peft") == (
        "peft: has its weights only as pickle (adapter_model.bin), which can run code when read. If you trust it, "
        "convert it with PEFT: load it with PeftModel.from_pretrained and write it with save_pretrained"
    )
    Path("peft/adapter_model.bin").unlink()
    assert refusal("peft") == "peft: has adapter_config.json, but no adapter_model.safetensors beside it"


@pytest.mark.parametrize(("text", "said"), [("{", "not valid JSON: "), ("[]", "expected a JSON object, got list")])
def test_a_damaged_configuration(base: Path, text: str, said: str) -> None:
    """It is told with its file."""
    (write_adapter(Path("peft"), str(base)) / "adapter_config.json").write_text(text)
    assert said in refusal("peft")
    assert "peft/adapter_config.json: " in refusal("peft")


def test_an_unknown_word_for_the_trained_base(base: Path) -> None:
    """The words there are."""
    write_adapter(Path("peft"), str(base))
    assert refusal("peft", trained_base="int8") == (
        "--trained-base: expected 16bit, nf4, nf4-double, fp4 or fp4-double, got 'int8'"
    )


def test_the_hash_is_that_of_the_weights_file(base: Path) -> None:
    """As sha256sum gives it."""
    folder = write_adapter(Path("peft"), str(base))
    (folder / "adapter_model.safetensors").write_bytes(b"abc")
    assert adapter_sha256(folder) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_base_that_cannot_be_a_path_is_told(tmp_path: Path) -> None:
    """No file system has such a long name: a message, no traceback."""
    adapter = write_adapter(tmp_path / "adapter", "a" * 5000)
    with pytest.raises(ModelError, match=r"is no folder that is there, and no hub name"):
        find_adapter(adapter, base_model=None, revision=None, trained_base=None)
