"""Knocking at the hub's door: who is there, in how long, and what is done if nobody is."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from qlora_cli.commands.libraries import names_in
from qlora_cli.hub import go_offline_if_unreachable, is_reachable, is_unreachable
from qlora_cli.recipe.paths import is_local
from qlora_cli.recipe.schema import EvaluationSection
from tests.support.runs import tiny_recipe

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", *_PROXIES, *map(str.upper, _PROXIES)):
        # Set first: what is deleted here is put back as it was, and what the code sets is taken away.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def open_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def test_a_host_that_answers_and_one_that_does_not(open_port: int, closed_port: int) -> None:
    """An open port is reachable, a closed one or a name without an address is not; each is known in no time."""
    started = time.monotonic()
    assert is_reachable(f"http://127.0.0.1:{open_port}")
    assert not is_reachable(f"http://127.0.0.1:{closed_port}")
    assert not is_reachable("http://127.0.0.1:99999")
    assert time.monotonic() - started < 1


def test_one_address_that_answers_is_enough(open_port: int, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a host's addresses is refused: the second is knocked at all the same."""

    def addresses(*_: object, **__: object) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)) for port in (closed_port, open_port)]

    monkeypatch.setattr(socket, "getaddrinfo", addresses)
    assert is_reachable("https://hub.example")


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert not is_reachable("https://hub.example")


def test_behind_a_proxy_the_hub_is_taken_for_granted(closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the proxy can see the hub; a host that goes past the proxy is knocked at."""
    endpoint = f"http://127.0.0.1:{closed_port}"
    for name in ("http_proxy", "all_proxy"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "http://proxy.example:3128")
            assert is_reachable(endpoint)
            patch.setenv("no_proxy", "127.0.0.1")
            assert not is_reachable(endpoint)
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert not is_reachable(endpoint)


def test_the_client_is_put_offline_only_where_that_helps(
    open_port: int, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something is on the hub, the hub is out of reach, and nobody has decided otherwise."""
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{open_port}")
    go_offline_if_unreachable(["org/model"])
    assert "HF_HUB_OFFLINE" not in os.environ

    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed_port}")
    go_offline_if_unreachable(["/a/folder", "./rows.jsonl", "*.csv"])
    assert "HF_HUB_OFFLINE" not in os.environ
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    go_offline_if_unreachable(["org/model"])
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    go_offline_if_unreachable(["/a/folder", "org/model"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_what_is_a_hub_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a path by its look, nor something that is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    names = ("org/model", "gpt2", "./gpt2", "/gpt2", "a/b/c", "rows.jsonl", "rows")
    assert [name for name in names if not is_local(name)] == ["org/model", "gpt2"]


def caused(*chain: Exception, hidden: bool = False) -> Exception:
    """The first error, raised because of the second, and so on; `hidden` as by `from None`."""
    for outer, inner in itertools.pairwise(chain):
        outer.__context__ = inner
        outer.__suppress_context__ = hidden
        outer.__cause__ = None if hidden else inner
    return chain[0]


def missing() -> Exception:
    return LocalEntryNotFoundError("not in the cache")


def answered(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return kind("no", response=SimpleNamespace(status_code=status, headers={}, request=None))  # type: ignore[arg-type]


@pytest.mark.parametrize("hidden", [False, True])
def test_silence_is_told_from_a_refusal(hidden: bool) -> None:
    """What transformers and datasets raise, down to what the hub's client met with."""
    silences: list[list[Exception]] = [
        [OSError("We couldn't connect"), missing()],
        [
            OSError("We couldn't connect"),
            missing(),
            RuntimeError("ConnectError"),
            ConnectionRefusedError(111, "refused"),
        ],
        [OSError("We couldn't connect"), missing(), socket.gaierror(-2, "Name or service not known")],
        [OSError("We couldn't connect"), missing(), answered(HfHubHTTPError, 503)],
        [ConnectionError("Couldn't reach 'o/d' on the Hub"), FileNotFoundError("not cached")],
        [RuntimeError("ReadTimeout"), TimeoutError("timed out")],
    ]
    refusals: list[list[Exception]] = [
        [OSError("not a valid model identifier"), answered(RepositoryNotFoundError, 401)],
        [OSError("a gated repo"), answered(GatedRepoError, 403)],
        [OSError("We couldn't connect"), missing(), answered(HfHubHTTPError, 403)],
        [OSError("does not appear to have a file named config.json")],
        [ValueError("Unknown split")],
    ]
    assert all(is_unreachable(caused(*chain, hidden=hidden)) for chain in silences)
    assert not any(is_unreachable(caused(*chain, hidden=hidden)) for chain in refusals)


def test_tasks_without_data_of_their_own_are_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are called: a pattern has the look of a path, and a folder here may have a task's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "piqa").mkdir()
    recipe = tiny_recipe(tmp_path)
    assert all(map(is_local, names_in(recipe)))
    for tasks, root, local in (("mmlu_*", None, False), ("piqa", None, False), ("piqa", str(tmp_path), True)):
        section = EvaluationSection(tasks=tasks, data_root=root)
        assert all(map(is_local, names_in(recipe.model_copy(update={"evaluation": section})))) is local
