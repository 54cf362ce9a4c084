"""The files of a base: its own folder, or of the hub no more than is needed, all of one commit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_cli.errors import HubUnreachableError, ModelError
from qlora_cli.model.files import commit_of, model_folder, read_config
from qlora_cli.model.source import ModelSource
from tests.support.cli import ENVIRONMENT
from tests.support.fake_hub import COMMIT, fake_hub

INDEX = "model.safetensors.index.json"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, with the hub out of reach; the folder of the one snapshot in it, of org/model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--model"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    return snapshot


def index(folder: Path, *shards: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(shards)}}))


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    """As it is; what cannot be a model is told as everywhere."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base = ModelSource(str(tmp_path))
    assert model_folder(base) == tmp_path
    assert read_config(base) == {"model_type": "llama"}
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"^base_model: .* has its weights only as pickle \(\.bin\)"):
        model_folder(base)
    with pytest.raises(ModelError, match=r"^base_model: .*/nowhere: there is no such folder"):
        model_folder(ModelSource(str(tmp_path / "nowhere")))


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_configuration_is_told(tmp_path: Path, text: str) -> None:
    """With its file."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"/config\.json: (not valid JSON: |expected a JSON object, got list)"):
        read_config(ModelSource(str(tmp_path)))


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_what_was_fetched_before_serves_without_the_hub(cache: Path, revision: str | None) -> None:
    """One file of weights, or all that the index names; licence and README may be absent."""
    base = ModelSource("org/model", revision)
    (cache / "model.safetensors").touch()
    assert model_folder(base) == cache
    (cache / "model.safetensors").unlink()
    index(cache, "a.safetensors", "b.safetensors", "a.safetensors")
    for name in ("a", "b"):
        (cache / f"{name}.safetensors").touch()
    assert model_folder(base) == cache
    assert read_config(base) == {"model_type": "llama"}


def test_a_part_of_the_weights_that_was_not_fetched(cache: Path) -> None:
    """Without the hub it cannot be had, which is nothing against the model."""
    index(cache, "a.safetensors", "b.safetensors")
    (cache / "a.safetensors").touch()
    with pytest.raises(HubUnreachableError) as caught:
        model_folder(ModelSource("org/model"))
    assert str(caught.value) == (
        "base_model: of the weights of org/model, 1 of 2 files are not in the hub's cache (b.safetensors is the "
        "first), and the hub cannot be reached. Try again with the network, or give a local folder"
    )


def test_weights_that_were_not_fetched(cache: Path) -> None:
    """Neither form is there: no word of pickle, for nobody knows."""
    with pytest.raises(
        HubUnreachableError, match=r"^base_model: the model of org/model \(revision main\) cannot be had"
    ):
        model_folder(ModelSource("org/model"))
    with pytest.raises(HubUnreachableError, match=r"^base_model: the configuration of org/other"):
        read_config(ModelSource("org/other"))


def test_an_index_that_names_nothing(cache: Path) -> None:
    """It is told with its file."""
    (cache / INDEX).write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json: expected a weight_map that names the file of every tensor$"):
        model_folder(ModelSource("org/model"))


def test_the_commit_of_a_snapshot(cache: Path, tmp_path: Path) -> None:
    """Told by where the folder is, and of no other folder."""
    assert commit_of(cache) == COMMIT
    assert commit_of(tmp_path) is None
    assert commit_of(tmp_path / COMMIT) is None


# The client reads the hub's address once, when it is imported.
_FETCH = """
import sys
from qlora_cli.errors import ModelError
from qlora_cli.model.files import model_folder
from qlora_cli.model.source import ModelSource
for name in sys.argv[1:]:
    try:
        print(model_folder(ModelSource(name)))
    except ModelError as error:
        print(error)
"""


def test_of_a_hub_model_only_what_is_needed_is_fetched(tmp_path: Path) -> None:
    """Weights in other forms and other files of weights stay where they are; a model in pickle is refused with the way
    out, and one that lacks a part is told."""
    index_of_two = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}).encode()
    beside = ("tokenizer.json", "tokenizer.model.v3", "source.spm", "LICENSE", "USE_POLICY.md", "README.md")
    needed = dict.fromkeys(("config.json", "1_Pooling/config.json", *beside), b"{}")
    others = ("pytorch_model.bin", "consolidated.safetensors", "onnx/config.json", "sub/model.safetensors", "a.gguf")
    models = {
        "org/one": needed | {"model.safetensors": b"w"} | dict.fromkeys(others, b"no"),
        "org/two": {"config.json": b"{}", INDEX: index_of_two, "1.safetensors": b"1", "2.safetensors": b"2"},
        "org/torn": {"config.json": b"{}", INDEX: index_of_two, "1.safetensors": b"1"},
        "org/pickle": {"config.json": b"{}", "pytorch_model.bin": b"p"},
    }
    hushed = {"HF_HUB_OFFLINE": "", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with fake_hub(models) as (address, fetched):
        environment = ENVIRONMENT | hushed | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
        command = [sys.executable, "-c", _FETCH, *models]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    one, two, torn, pickle = done.stdout.splitlines()
    assert {file.relative_to(one).as_posix() for file in Path(one).rglob("*") if file.is_file()} == {
        *needed,
        "model.safetensors",
    }
    assert {file.name for file in Path(two).iterdir()} == set(models["org/two"])
    assert commit_of(Path(one)) == COMMIT
    assert torn == f"base_model: org/torn lacks files that its {INDEX} names: 2.safetensors"
    assert pickle == (
        f"base_model: org/pickle (revision main) has no weights in safetensors (model.safetensors or {INDEX}). Pickle "
        "(.bin) can run code when read, and is refused: convert it to safetensors first, or name another revision or "
        "repository that has them"
    )
    assert not {*others} & {*fetched}
