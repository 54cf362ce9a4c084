"""Sizes as a person writes them."""

from __future__ import annotations

import re

from qlora_cli.errors import RequestError

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{infix}b": base**power
    for power, letter in enumerate("kmgt", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}


def parse_size(text: str, what: str = "size") -> int:
    """Bytes of `5GB` (thousands), `2GiB` (1024s), `500MB`, `1.5GB` or a plain number of bytes; capitals do not matter.

    Args:
        what: whose size, for the message.

    Raises:
        RequestError: if it is no such size, or less than a byte.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-z]*)\s*", text, re.IGNORECASE | re.ASCII)
    unit = _UNITS.get(found[2].lower()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if size < 1:
        raise RequestError(f"{what}: expected a size such as 5GB, 500MB or 2GiB, got {text!r}")
    return size
