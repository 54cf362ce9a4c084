"""Show what an editor makes of recipes: speak to yaml-language-server as an editor does.

npm install --no-save yaml-language-server   gets the server, into node_modules/
python scripts/try_editor.py                 takes the one on PATH or in node_modules/.bin
python scripts/try_editor.py --server PATH

The documents are opened as if they lay in recipes/, but nothing is written. Prints what is underlined, offered and
told. Exits 1 if a misspelt key is not underlined, a key or a value that fits is not offered, or anything in a
shipped recipe is underlined; 2 if there is no server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SECONDS = 30  # for one answer
HOW = "get it with npm install --no-save yaml-language-server"
# As an editor would send them. By default the server asks schemastore.org for a catalogue, which is not needed here.
SETTINGS = {"yaml": {"schemaStore": {"enable": False}, "validate": True, "completion": True, "hover": True}}

MODELINE = "# yaml-language-server: $schema=recipe.schema.json\n"
MISTAKES = f"""{MODELINE}base_model: HuggingFaceTB/SmolLM2-135M-Instruct
quantization:
  bits: 16
  quant_type: nf4
lora:
  rnk: 4
dataset:
  train:
    - rows.jsonl
    - pth: more.jsonl
  format: chatml
  max_length: long
training:
  learning_rate: 2e-4
  max_steps: 20
  num_train_epochs: 1
  eval_steps: 10
output_dir: runs/mine
"""
# The cursor is at the bar.
AT_TOP = f"{MODELINE}|\n"
UNDER_SECTION = f"{MODELINE}quantization:\n  |\n"
IN_ITEM = f"{MODELINE}dataset:\n  train:\n    - path: rows.jsonl\n      |\n"
AFTER_KEY = f"{MODELINE}quantization:\n  quant_type: |\n"
ON_KEY = f"{MODELINE}quantization:\n  quant|_type: nf4\n"


class Server:
    """A language server on its standard input and output, asked one thing at a time."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._inbox: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._asked = self._opened = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """End the server, whatever it is doing."""
        self._process.kill()
        self._process.wait()

    def ask(self, method: str, params: dict[str, Any] | None) -> Any:
        """The server's answer to one request."""
        self._asked += 1
        self._send({"id": self._asked, "method": method, "params": params})
        answer = next(message for message in self._messages() if message.get("id") == self._asked)
        if "error" in answer:
            raise SystemExit(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def tell(self, method: str, params: dict[str, Any]) -> None:
        """Say what has no answer."""
        self._send({"method": method, "params": params})

    def open(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """Open a new document in recipes/; returns its URI and its diagnostics."""
        self._opened += 1
        uri = (RECIPES / f"opened-{self._opened}.yaml").as_uri()
        document = {"uri": uri, "languageId": "yaml", "version": 1, "text": text}
        self.tell("textDocument/didOpen", {"textDocument": document})
        published = (m["params"] for m in self._messages() if m.get("method") == "textDocument/publishDiagnostics")
        return uri, next(params["diagnostics"] for params in published if params["uri"] == uri)

    def at_cursor(self, what: str, text: str) -> Any:
        """Open `text`, whose `|` is the cursor, and ask for `completion` or `hover` there."""
        before, _, after = text.partition("|")
        uri, _ = self.open(before + after)
        place = {"line": before.count("\n"), "character": len(before) - before.rfind("\n") - 1}
        return self.ask(f"textDocument/{what}", {"textDocument": {"uri": uri}, "position": place})

    def offered(self, text: str) -> list[str]:
        """The completions at the cursor."""
        return [item["label"] for item in self.at_cursor("completion", text)["items"]]

    def _messages(self) -> Iterator[dict[str, Any]]:
        """What the server says, its own questions answered on the way."""
        while True:
            try:
                message = self._inbox.get(timeout=SECONDS)
            except queue.Empty:
                raise SystemExit(f"the server has said nothing for {SECONDS} s") from None
            if message is None:
                raise SystemExit("the server has gone")
            if "method" in message and "id" in message:
                asked = message["params"].get("items", []) if message["method"] == "workspace/configuration" else None
                answer = None if asked is None else [SETTINGS.get(item["section"]) for item in asked]
                self._send({"id": message["id"], "result": answer})
            else:
                yield message

    def _send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        try:
            self._process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise SystemExit("the server has gone") from None

    def _listen(self) -> None:
        stream = self._process.stdout
        while header := stream.readline():
            if header.lower().startswith(b"content-length:"):
                while stream.readline().strip():
                    pass  # what other headers there are, up to the empty line
                self._inbox.put(json.loads(stream.read(int(header.split(b":")[1]))))
        self._inbox.put(None)


def find_server(given: str | None) -> str | None:
    """The program to start, if it is there."""
    local = Path("node_modules/.bin/yaml-language-server").resolve()
    return shutil.which(given) if given else shutil.which("yaml-language-server") or shutil.which(local)


def show(server: Server) -> list[str]:
    """Open, ask and print; returns what was not as it should be."""
    print("\nUnderlined in a recipe with mistakes\n")
    _, diagnostics = server.open(MISTAKES)
    for number, line in enumerate(MISTAKES.splitlines()):
        print(f"  {number + 1:2}  {line}".rstrip())
        for start, end, message in _marks(diagnostics, number):
            print(f"      {' ' * start}{'~' * (end - start)} {message}")
    top, under, item, after = (server.offered(text) for text in (AT_TOP, UNDER_SECTION, IN_ITEM, AFTER_KEY))
    print(f"\nOffered\n\n  at the top:             {', '.join(top)}")
    print(f"  under `quantization:`:  {', '.join(under)}")
    print(f"  in an item of `train:`: {', '.join(item)}\n  after `quant_type: `:   {', '.join(after)}")
    told = server.at_cursor("hover", ON_KEY)["contents"]["value"].replace("\n\n", "\n").splitlines()
    print("\nTold of `quant_type`\n")
    print("\n".join(f"  {line}" for line in told if not line.startswith("Source:")))
    print("\nUnderlined in the shipped recipes\n")
    shipped = {path.name: server.open(path.read_text(encoding="utf-8"))[1] for path in sorted(RECIPES.glob("*.yaml"))}
    for name, found in shipped.items():
        print(f"  {name:20} {'; '.join(d['message'] for d in found) or 'nothing'}")
    lines = {key: MISTAKES[: MISTAKES.index(key)].count("\n") for key in ("rnk", "pth")}
    checks = {
        **{f"the misspelt key `{key}` is not underlined": _marks(diagnostics, n) != [] for key, n in lines.items()},
        "`quant_type` is not offered": "quant_type" in under,
        "`weight` is not offered in an item of `train`": "weight" in item,
        "the values of `quant_type` are not offered": {"nf4", "fp4"} <= set(after),
        "a shipped recipe has something underlined": bool(shipped) and not any(shipped.values()),
    }
    return [problem for problem, fine in checks.items() if not fine]


def _marks(diagnostics: list[dict[str, Any]], line: int) -> list[tuple[int, int, str]]:
    places = [(found["range"]["start"], found["range"]["end"], found["message"]) for found in diagnostics]
    return [(start["character"], end["character"], text) for start, end, text in places if start["line"] == line]


def main() -> int:
    """Start the server and talk to it; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--server", metavar="PATH", help="yaml-language-server; by default it is looked for")
    given = parser.parse_args().server
    program = find_server(given)
    if program is None:
        where = f"at {given}" if given else "on PATH or in node_modules/.bin"
        print(f"no yaml-language-server {where}; {HOW}", file=sys.stderr)
        return 2
    with contextlib.closing(Server([program, "--stdio"])) as server:
        capabilities = {"workspace": {"configuration": True}}
        told = server.ask("initialize", {"processId": None, "rootUri": None, "capabilities": capabilities})
        server.tell("initialized", {})
        print("yaml-language-server", told.get("serverInfo", {}).get("version", "of unknown version"))
        problems = show(server)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
