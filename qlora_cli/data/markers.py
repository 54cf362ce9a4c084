"""The tokens that a tokenizer has beside its vocabulary, such as an end of turn, as stretches of a text."""

from __future__ import annotations

from typing import Any


class Markers:
    """The texts of a tokenizer's added tokens, special or not; whitespace is none."""

    def __init__(self, tokenizer: Any) -> None:
        added = (token.content for token in tokenizer.added_tokens_decoder.values())
        self._texts = frozenset(text for text in (*added, *tokenizer.all_special_tokens) if text.strip())
        # By length: a tokenizer can have thousands of them, but of few lengths.
        self._lengths = sorted({len(text) for text in self._texts}, reverse=True)

    def begin(self, text: str, end: int) -> int:
        """Where the marker begins that ends at `end`; `end` if there is none."""
        fitting = (end - n for n in self._lengths if n <= end and text[end - n : end] in self._texts)
        return next(fitting, end)

    def end(self, text: str, begin: int) -> int:
        """Where the marker ends that begins at `begin`; `begin` if there is none."""
        return next((begin + n for n in self._lengths if self._stands(text, begin, n)), begin)

    def uncut(self, text: str, at: int) -> int:
        """`at`, or the beginning of the marker that a cut there would go through."""
        cut = (s for n in self._lengths for s in range(max(at - n + 1, 0), at) if self._stands(text, s, n))
        return min(cut, default=at)

    def _stands(self, text: str, begin: int, length: int) -> bool:
        return begin + length <= len(text) and text[begin : begin + length] in self._texts


def leading_bos(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before a text by itself, if it does."""
    opened = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None and opened[:1] == [bos] else None


def special_tokens(tokenizer: Any) -> list[int]:
    """Special tokens, without the one that stands for what is not in the vocabulary, unless it is eos as well."""
    return [t for t in tokenizer.all_special_ids if t == tokenizer.eos_token_id or t != tokenizer.unk_token_id]
