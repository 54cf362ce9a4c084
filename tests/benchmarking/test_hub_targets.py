"""Targets on the hub: a model by its configuration, an adapter fetched whole, and what is said of anything else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.adapters import write_adapter
from tests.support.cli import ENVIRONMENT
from tests.support.fake_hub import COMMIT, fake_hub
from tests.support.models import save_tiny_model

_FIND = """
import sys, torch
from qlora_cli.benchmarking.target import find_target
from qlora_cli.errors import QloraError
for name in sys.argv[1:]:
    try:
        target = find_target(name)
        print(target.name, target.kind, target.storage, target.base.name, target.fingerprint(torch.device("cpu")))
        if target.adapter is not None:
            print(type(target.load(torch.device("cpu"))).__name__, len(target.tokenizer()))
    except QloraError as error:
        print(type(error).__name__, error)
"""


def test_targets_on_the_hub(tmp_path: Path) -> None:
    """Of a model only the configuration is fetched; an adapter is put on its base, which is on the hub as well; a
    repository with a pickled adapter is refused by name."""
    base = save_tiny_model(tmp_path / "base")
    lora = write_adapter(tmp_path / "lora", "org/model", target_modules=["layers.0.self_attn.q_proj"])
    models = {
        "org/model": {file.name: file.read_bytes() for file in base.iterdir()},
        "org/lora": {file.name: file.read_bytes() for file in lora.iterdir()},
        "org/pickle": {"adapter_config.json": b"{}", "adapter_model.bin": b"p"},
        "org/nothing": {"README.md": b"nothing"},
    }
    hushed = {"HF_HUB_OFFLINE": "", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with fake_hub(models) as (address, fetched):
        environment = ENVIRONMENT | hushed | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "h"), "NO_PROXY": "*"}
        command = [sys.executable, "-c", _FIND, *models]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
        before_the_adapter = fetched[: fetched.index("adapter_config.json")]
    model, lora_line, loaded, pickle, nothing = done.stdout.splitlines()
    assert before_the_adapter == ["config.json"]
    assert model.startswith("org/model hub model unquantised, float32 org/model ")
    assert lora_line.startswith("org/lora hub adapter unquantised, float32 org/model ")
    assert loaded.startswith("LlamaForCausalLM ")
    assert pickle.startswith("ModelError TARGET: org/pickle (revision main) has an adapter_config.json, but its")
    assert nothing.startswith("ModelError TARGET: the configuration of org/nothing (revision main) cannot be had")
    assert COMMIT not in done.stdout
