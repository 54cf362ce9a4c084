"""scripts/try_editor.py speaks to a language server, and says so when an editor would see nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Speaks the protocol, asks for its settings before it publishes anything, and knows no schema.
BLIND_SERVER = """
import json, sys
def send(**message):
    body = json.dumps(message).encode()
    sys.stdout.buffer.write(b"Content-Type: x\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
    sys.stdout.buffer.flush()
while header := sys.stdin.buffer.readline():
    sys.stdin.buffer.readline()
    message = json.loads(sys.stdin.buffer.read(int(header.split(b":")[1])))
    method = message.get("method")
    if method == "initialized":
        send(id=1, method="workspace/configuration", params={"items": [{"section": "yaml"}, {"section": "other"}]})
    elif method is None:
        yaml, other = message["result"]
        configured = yaml["schemaStore"] == {"enable": False} and other is None
    elif method == "textDocument/didOpen":
        uri = message["params"]["textDocument"]["uri"]
        send(method="textDocument/publishDiagnostics", params={"uri": uri, "diagnostics": []})
    elif method == "textDocument/completion":
        send(id=message["id"], result={"items": [{"label": "rank"}] if configured else []})
    elif method == "textDocument/hover":
        send(id=message["id"], result={"contents": {"value": ""}})
    else:
        send(id=message["id"], result={"serverInfo": {"version": "blind"}})
"""


def try_editor(*arguments: str, folder: Path, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "try_editor.py"), *arguments],
        cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def program(path: Path, text: str) -> str:
    path.write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_without_a_server(tmp_path: Path) -> None:
    """Exit code 2, where it was looked for, and how to get it."""
    done = try_editor(folder=tmp_path, path=str(tmp_path))
    assert done.returncode == 2
    how = "get it with npm install --no-save yaml-language-server"
    assert done.stderr == f"no yaml-language-server on PATH or in node_modules/.bin; {how}\n"
    assert try_editor("--server", "./none", folder=tmp_path).stderr.startswith("no yaml-language-server at ./none;")


def test_a_server_that_sees_nothing(tmp_path: Path) -> None:
    """Exit code 1 and what is missing; the server was told to leave the network alone."""
    done = try_editor("--server", program(tmp_path / "server", BLIND_SERVER), folder=tmp_path)
    assert done.stderr == (
        "error: the misspelt key `rnk` is not underlined\n"
        "error: the misspelt key `pth` is not underlined\n"
        "error: `quant_type` is not offered\n"
        "error: `weight` is not offered in an item of `train`\n"
        "error: the values of `quant_type` are not offered\n"
    )
    assert done.returncode == 1
    assert done.stdout.startswith("yaml-language-server blind\n")
    assert "under `quantization:`:  rank\n" in done.stdout


def test_a_server_that_ends(tmp_path: Path) -> None:
    """Said in a line, not waited for."""
    done = try_editor("--server", program(tmp_path / "server", ""), folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "the server has gone\n")


@pytest.mark.skipif(not shutil.which("yaml-language-server"), reason="no yaml-language-server on PATH")
def test_the_real_server(tmp_path: Path) -> None:
    """It underlines what it should, offers what it should, and has nothing against the shipped recipes."""
    done = try_editor(folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rnk: 4\n        ~~~ Property rnk is not allowed." in done.stdout
    assert "after `quant_type: `:   nf4, fp4\n" in done.stdout
