"""Whether the Hugging Face hub can be reached, and whether a failure says that it cannot.

Left to itself, the hub's client asks for a file six times, with growing pauses, before it looks into its cache: 23
seconds a file. One knock at the hub's door settles that for a whole command; with nobody there, the client is put into
its own offline mode, in which it looks into the cache at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from qlora_cli.recipe.paths import is_local

_ENDPOINT = "https://huggingface.co"
# The client's own words for "look into the cache only"; whatever they are set to, somebody has decided.
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

# Seconds for the hub to take a connection; three round trips around the world are less than one.
_PATIENCE = 3.0


def go_offline_if_unreachable(names: Iterable[str]) -> None:
    """Put the hub's client into offline mode for this process if one of `names` is on the hub and that is out of reach.

    The client reads its environment once, when it is first imported: call this before. `HF_HUB_OFFLINE`, if it is set,
    stands: 0 keeps the client asking.
    """
    if any(os.environ.get(name) for name in _OFFLINE) or all(map(is_local, names)):
        return
    if not is_reachable(os.environ.get("HF_ENDPOINT", _ENDPOINT)):
        os.environ["HF_HUB_OFFLINE"] = "1"


def is_reachable(endpoint: str, patience: float = _PATIENCE) -> bool:
    """Whether the endpoint's host takes a connection within `patience` seconds, not counting the name's look-up.

    Through a proxy that cannot be seen from here, so it is taken for granted.
    """
    try:
        url = urlsplit(endpoint)
        proxies = getproxies()
        if not url.hostname or (not proxy_bypass(url.hostname) and (url.scheme in proxies or "all" in proxies)):
            return True
        port = url.port or (80 if url.scheme == "http" else 443)
        addresses = socket.getaddrinfo(url.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError):  # no such name, no resolver; no such port
        return False
    return _any_answers(addresses, patience)


def is_unreachable(error: BaseException) -> bool:
    """Whether this failure to fetch something means that the hub gave no answer, rather than a negative one.

    A hub that is overloaded or broken (HTTP 429 and 5xx) gave none.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, HfHubHTTPError):
            status: int = link.response.status_code
            return status == 429 or status >= 500
    # Offline mode and refused connections are ConnectionErrors; a name without an address is a gaierror.
    silent = (LocalEntryNotFoundError, ConnectionError, TimeoutError, socket.gaierror)
    return any(isinstance(link, silent) for link in chain)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what caused it, and so on, also where a library hides it with `from None`."""
    seen = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _any_answers(addresses: Iterable[tuple[Any, ...]], patience: float) -> bool:
    """Whether one of the addresses takes a connection; all are tried at once, as any of them may be a black hole."""
    deadline = time.monotonic() + patience
    with contextlib.ExitStack() as opened:
        waiting = []
        for family, kind, protocol, _, address in addresses:
            with contextlib.suppress(OSError):  # no route, or no such family here
                door = opened.enter_context(socket.socket(family, kind, protocol))
                door.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    door.connect(address)
                waiting.append(door)
        while waiting and (left := deadline - time.monotonic()) > 0:
            # Windows tells a refusal as an exceptional condition, others as being ready.
            _, ready, failed = select.select([], waiting, waiting, left)
            if any(door.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0 for door in ready):
                return True
            waiting = [door for door in waiting if door not in (*ready, *failed)]
    return False
