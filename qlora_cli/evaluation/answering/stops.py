"""Where an answer ends, and which of its text counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What an incomplete character decodes to.
_INCOMPLETE = "\ufffd"

# Tokens that are looked at beyond those that can hold a stop text: some decode to nothing.
_MARGIN = 8


class Stops:
    """What ends an answer: a token, or a text.

    The rules are those of lm-eval's `hf` backend for a batch of one. A stop text is looked for in all that was
    written, special tokens spelled out; the answer is decoded without them and cut at the stop texts one after the
    other, in the order in which they were given.

    Args:
        tokenizer: decodes what was written.
        until: stop texts; empty ones are ignored.
        tokens: ids of tokens that end an answer.

    Attributes:
        window: of what was written, so many of the last tokens tell whether it is complete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, until: Sequence[str], tokens: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._until = tuple(text for text in until if text)
        self._tokens = frozenset(tokens)
        self._last_characters = frozenset(text[-1] for text in self._until)
        # Every token holds at least a byte, whatever it was that cut the text into tokens.
        self.window = max((len(text.encode()) for text in self._until), default=0) + _MARGIN
        self._completing: dict[int, bool] = {}

    def reached(self, written: Sequence[int]) -> bool:
        """Whether the last of these tokens, which were written one by one, ends the answer."""
        if not written:
            return False
        return written[-1] in self._tokens or (self._may_complete(written[-1]) and self._holds_stop(written))

    def first_end(self, written: Sequence[int], limit: int) -> int:
        """How many of these tokens belong to the answer: up to the first that ends it, and at most `limit`."""
        for count in range(1, min(limit, len(written)) + 1):
            if self.reached(written[max(0, count - self.window) : count]):
                return count
        return min(limit, len(written))

    def text(self, written: Sequence[int]) -> str:
        """The answer: what these tokens say, without special tokens, before the first stop text."""
        text = self._decoded(written, skip_special_tokens=True)
        for stop in self._until:
            text = text.split(stop)[0]
        return text

    def _may_complete(self, token: int) -> bool:
        """Whether a stop text can end in this token: most have no such character, and spare us a decoding."""
        known = self._completing.get(token)
        if known is None:
            known = self._completing[token] = self._looks_completing(self._decoded([token], skip_special_tokens=False))
        return known

    def _looks_completing(self, piece: str) -> bool:
        if not self._until:
            return False
        # On its own, a token may lose the spaces at its edges, and its share of a character that has several bytes.
        if not piece or _INCOMPLETE in piece or " " in self._last_characters:
            return True
        return not self._last_characters.isdisjoint(piece)

    def _holds_stop(self, written: Sequence[int]) -> bool:
        text = self._decoded(written[-self.window :], skip_special_tokens=False)
        return any(stop in text for stop in self._until)

    def _decoded(self, written: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(list(written), skip_special_tokens=skip_special_tokens))


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens at which the model's own generation configuration ends an answer."""
    ids = None if model.generation_config is None else model.generation_config.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
