"""What is wrong with a checkpoint's files is seen and told, whatever it is."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from qlora_cli.errors import CheckpointError
from qlora_cli.training import manifest as manifest_module
from qlora_cli.training.checkpoint import check_readable
from qlora_cli.training.manifest import Fault, FaultKind, find_fault
from tests.support.checkpoints import write_some


def _saved(folder: Path) -> Path:
    """A checkpoint of step 3 with a state of an optimizer in it."""
    parameter = nn.Parameter(torch.ones(5))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return write_some(folder, 3, optimizer, {"adapter_model.safetensors": b"weights"})


def test_any_flipped_bit_and_any_cut_is_seen(tmp_path: Path) -> None:
    """500 places drawn over all files of a checkpoint, its manifest among them, each file alike: a flipped bit there,
    or the file cut there, and it is not valid any more; mended, it is again."""
    checkpoint = _saved(tmp_path)
    assert find_fault(checkpoint) is None
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    draw = random.Random(0)
    for number in range(500):
        file = files[number % len(files)]
        original = file.read_bytes()
        position = draw.randrange(len(original))
        name = file.relative_to(checkpoint).as_posix()
        if draw.random() < 0.5:
            file.write_bytes(original[:position])
            told = f"{name} has {position:,} bytes, {len(original):,} were written"
        else:
            flipped = original[position] ^ (1 << draw.randrange(8))
            file.write_bytes(original[:position] + bytes([flipped]) + original[position + 1 :])
            told = f"{name} is not what was written: its SHA-256 is another"
        assert str(find_fault(checkpoint)) == ("manifest.json is damaged" if name == "manifest.json" else told)
        file.write_bytes(original)
    assert find_fault(checkpoint) is None


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """No byte of it can change without being seen, its blanks and the names in it included."""
    checkpoint = _saved(tmp_path)
    manifest = checkpoint / "manifest.json"
    original = manifest.read_bytes()
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 1
        manifest.write_bytes(changed)
        assert str(find_fault(checkpoint)) == "manifest.json is damaged", position


def _sign(manifest: Path, change: dict[str, object]) -> None:
    """Change a manifest as another version of the tool might have written it."""
    data = json.loads(manifest.read_text()) | change
    del data["sha256"]
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    signed = data | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    manifest.write_text(json.dumps(signed, indent=2, ensure_ascii=False) + "\n")


def test_faults_are_told(tmp_path: Path) -> None:
    """No manifest, a broken one, one that leads elsewhere, another version, a file too few."""
    checkpoint = _saved(tmp_path)
    manifest = checkpoint / "manifest.json"
    text = manifest.read_text()
    _sign(manifest, {"format_version": 9})
    other = "has format version {}, this is 2: another version of this tool wrote it"
    assert find_fault(checkpoint) == Fault(other.format(9), FaultKind.OTHER_VERSION)
    manifest.write_text('{"format_version": 1, "files": {}}')  # the first version's had no sum of their own
    assert find_fault(checkpoint) == Fault(other.format(1), FaultKind.OTHER_VERSION)
    for broken in (
        text[:40],
        "[]",
        '{"format_version": 2, "files": 7}',
        '{"format_version": 2}',
        '{"format_version": 2, "files": {"state.json": 7}}',
        '{"format_version": 2, "files": {"\\ud800": {"bytes": 1, "sha256": "x"}}}',
        "\ud800",
        "[" * 10**5,
    ):
        manifest.write_bytes(broken.encode("utf-8", "surrogatepass"))
        assert str(find_fault(checkpoint)) == "manifest.json is damaged"
    manifest.write_text(text)
    for name in ("../step-000003/state.json", str(checkpoint / "state.json"), "", "a\0b"):
        _sign(manifest, {"files": {name: {"bytes": 1, "sha256": "x"}}})
        assert str(find_fault(checkpoint)) == "manifest.json is damaged"
    manifest.unlink()
    assert str(find_fault(checkpoint)) == "has no manifest.json"
    manifest.write_text(text)
    (checkpoint / "state.json").unlink()
    assert str(find_fault(checkpoint)) == "state.json is missing"
    (checkpoint / "adapter").rename(checkpoint / "moved")
    (checkpoint / "adapter").write_text("")
    assert str(find_fault(checkpoint)) == "adapter/adapter_model.safetensors is missing"


def test_what_others_leave_in_a_checkpoint_is_no_fault(tmp_path: Path) -> None:
    """File browsers and file servers leave files where they have been, which may be gone in the next moment."""
    checkpoint = _saved(tmp_path)
    (checkpoint / ".DS_Store").write_bytes(b"x")
    (checkpoint / "adapter" / ".nfs0001").symlink_to("nowhere")
    (checkpoint / ".AppleDouble").mkdir()
    assert find_fault(checkpoint) is None


def test_what_cannot_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server that is away, a bad sector, a permission: of the manifest, of a file, of the folder."""
    checkpoint = _saved(tmp_path)
    manifest = checkpoint / "manifest.json"
    text = manifest.read_text()
    manifest.unlink()
    manifest.symlink_to(manifest)
    fault = find_fault(checkpoint)
    told = "has a file that cannot be read, manifest.json: Too many levels of symbolic links"
    assert fault == Fault(told, FaultKind.UNREADABLE)
    with pytest.raises(CheckpointError) as caught:
        check_readable(checkpoint, fault)
    assert str(caught.value) == (
        f"{checkpoint} {told}. It may be whole: see to it that it can be read and resume again, or move it somewhere "
        "else to go on without it"
    )
    manifest.unlink()
    manifest.write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "_sha256", _raise)
        told = "has a file that cannot be read, adapter/adapter_model.safetensors: Input/output error"
        assert find_fault(checkpoint) == Fault(told, FaultKind.UNREADABLE)
    monkeypatch.setattr(manifest_module, "_size", _raise)
    assert find_fault(checkpoint) == Fault(told, FaultKind.UNREADABLE)
    check_readable(checkpoint, Fault("is damaged"))
    check_readable(checkpoint, None)


def test_a_link_to_where_nothing_is_now(tmp_path: Path) -> None:
    """Checkpoints that were moved to another disk and linked: what is not mounted is not damaged, what is, is read."""
    checkpoint = _saved(tmp_path / "archive")
    link = tmp_path / "step-000003"
    link.symlink_to(checkpoint)
    assert find_fault(link) is None
    adapter = checkpoint / "adapter"
    adapter.rename(tmp_path / "adapter")
    adapter.symlink_to(tmp_path / "adapter")
    assert find_fault(link) is None
    for away, name in ((tmp_path / "adapter", "adapter"), (tmp_path / "archive", "manifest.json")):
        away.rename(tmp_path / "away")
        told = f"has a file that cannot be read, {name}: No such file or directory"
        assert find_fault(link) == Fault(told, FaultKind.UNREADABLE)
        (tmp_path / "away").rename(away)
    (checkpoint / "state.json").unlink()
    assert find_fault(link) == Fault("state.json is missing")


def _raise(_: Path) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text() | st.just("\ud800"), inner, max_size=2),
    max_leaves=4,
)


@example(version=2, files={"state.json": {"bytes": float("inf"), "sha256": "x"}})
@given(version=st.just(2) | _JSON, files=_JSON | st.dictionaries(st.text(), st.fixed_dictionaries({"bytes": _JSON})))
def test_any_manifest_is_judged(version: object, files: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever is in it, signed or not, it is a fault in words, and no crash."""
    folder = tmp_path_factory.mktemp("step")
    manifest = {"format_version": version, "files": files}
    for signature in ({}, {"sha256": "x"}):
        (folder / "manifest.json").write_text(json.dumps(manifest | signature))
        fault = find_fault(folder)
        assert fault is not None
        assert fault.text.startswith(("manifest.json is damaged", "has format version "))
