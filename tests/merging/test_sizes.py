"""Sizes as a person writes them."""

from __future__ import annotations

import pytest

from qlora_cli.errors import RequestError
from qlora_cli.merging.tensors.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("500 MB", 500_000_000),
        ("2GiB", 2 * 1024**3),
        ("64mib", 64 * 1024**2),
        ("1.5kB", 1500),
        ("3KiB", 3072),
        ("1TB", 10**12),
        ("123", 123),
        ("7B", 7),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    """Thousands and 1024s, as the unit says."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5G", "-1GB", "0", "0.1B", "5 giga", "1e9", "five GB", "\uff15GB", "9" * 400]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    """With examples of what is one."""
    with pytest.raises(RequestError) as told:
        parse_size(text)
    assert str(told.value) == f"size: expected a size such as 5GB, 500MB or 2GiB, got {text!r}"
