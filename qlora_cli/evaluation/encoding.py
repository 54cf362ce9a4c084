"""Texts to token ids exactly as lm-eval's `hf` backend makes them: a score depends on every one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qlora_cli.errors import EvaluationError

_AT_ONCE = 256  # requests whose texts are encoded together: enough for the tokenizer's threads, little in memory


class Encoded(NamedTuple):
    """A question as the model reads it.

    Attributes:
        tokens: context and continuation, or a prompt.
        scored: how many of the last are the continuation; 0 for a prompt.
        cut: how many tokens were left out at the beginning, because the model's context is shorter.
    """

    tokens: tuple[int, ...]
    scored: int
    cut: int


class Encoder:
    """A tokenizer, used as lm-eval's `hf` backend uses it.

    Attributes:
        max_length: the most tokens that the model reads: as its configuration says, else the tokenizer, else 2048.
        prefix_token: what stands before a text without a context: the beginning of a text, else its end; None if the
            tokenizer has neither.
    """

    def __init__(
        self, tokenizer: Any, config: Any, *, max_length: int | None = None, add_bos_token: bool | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length: int = max_length or resolve_max_length(config, tokenizer)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.prefix_token: int | None = eos if bos is None else bos
        self._add_bos_token = add_bos_token
        self._prefix_text = None if self.prefix_token is None else tokenizer.decode(self.prefix_token)
        # One object for each id: lists of tokens have an object of 28 bytes for every token otherwise.
        self._ids = list(range(len(tokenizer)))

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """The ids of one text; with None, begun as the tokenizer begins texts, unless the text does so itself."""
        return self._encode_all([(text, add_special_tokens)])[text, add_special_tokens]

    def pairs(self, pairs: Iterable[tuple[str, str]]) -> Iterator[Encoded]:
        """Contexts with their continuations, in order.

        The context is encoded by itself to know where the continuation begins in the two together; its trailing
        spaces belong to the continuation. An empty context is the prefix token.
        """
        rest = iter(pairs)
        while some := list(islice(rest, _AT_ONCE)):
            split = [_split(context, continuation) for context, continuation in some]
            wanted = dict.fromkeys(text for begun, continuation in split for text in _texts(begun, continuation))
            ids = self._encode_all(list(wanted))
            for begun, continuation in split:
                yield self.fitted(*self._divided(begun, continuation, ids))

    def windows(self, text: str) -> list[Encoded]:
        """A text in pieces that the model can read, each of its tokens scored once.

        Raises:
            EvaluationError: if the tokenizer has no token to begin with; so does `pairs`, for an empty context.
        """
        windows = get_rolling_token_windows(
            token_list=self.encode(text),
            prefix_token=self._prefix(),
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [self.fitted(*make_disjoint_window(window)) for window in windows]

    def prompts(self, prompts: Sequence[tuple[str, int]]) -> Iterator[Encoded]:
        """Texts to go on from, each with the number of tokens that its last part may have at most."""
        bos = self.tokenizer.bos_token
        for at in range(0, len(prompts), _AT_ONCE):
            some = prompts[at : at + _AT_ONCE]
            wanted = [(text, False if has_bos_prefix(text, bos) else self._add_bos_token) for text, _ in some]
            ids = self._tokenized(list(dict.fromkeys(wanted)))
            for key, (_, most) in zip(wanted, some, strict=True):
                tokens = ids[key]
                yield Encoded(self._shared(tokens[-most:]), 0, max(0, len(tokens) - most))

    def fitted(self, context: Sequence[int], continuation: Sequence[int]) -> Encoded:
        """Both in one, without what the model cannot read at the beginning; the last token is never read."""
        tokens = [*context, *continuation]
        most = self.max_length + 1
        return Encoded(self._shared(tokens[-most:]), len(continuation), max(0, len(tokens) - most))

    def _divided(
        self, context: str | None, continuation: str, ids: dict[tuple[str, bool | None], list[int]]
    ) -> tuple[list[int], list[int]]:
        if context is None:
            before, after = [], ids[continuation, False]
        else:
            before = ids[context, None]
            after = ids[context + continuation, None][len(before) :]
        if before:
            return before, after
        # The hf backend gives up on a context of spaces for which the tokenizer has no token; it is an empty one.
        prefix = self._prefix()
        return (after[:1], after[1:]) if after[:1] == [prefix] else ([prefix], after)

    def _prefix(self) -> int:
        if self.prefix_token is None:
            raise EvaluationError(
                "a text without a context is scored after the token that begins or ends texts, and the tokenizer has "
                "neither: give it a bos_token or an eos_token, or leave out tasks that ask such questions"
            )
        return self.prefix_token

    def _encode_all(self, texts: list[tuple[str, bool | None]]) -> dict[tuple[str, bool | None], list[int]]:
        """As `_tokenized`, by what was asked: whether to add special tokens, or None for what is usual."""
        usual = {key: self._usual(key[0]) if key[1] is None else key[1] for key in texts}
        ids = self._tokenized(list(dict.fromkeys((text, added) for (text, _), added in usual.items())))
        return {key: ids[key[0], added] for key, added in usual.items()}

    def _usual(self, text: str) -> bool | None:
        return False if has_bos_prefix(text, self._prefix_text) else self._add_bos_token

    def _tokenized(self, texts: list[tuple[str, bool | None]]) -> dict[tuple[str, bool | None], list[int]]:
        """Ids by text and whether special tokens are added, None for the tokenizer's own way."""
        found: dict[tuple[str, bool | None], list[int]] = {}
        for added in dict.fromkeys(kind for _, kind in texts):
            same = [text for text, kind in texts if kind is added]
            given = {} if added is None else {"add_special_tokens": added}
            # A long text is no mistake here: it is cut, and that is told.
            ids = self.tokenizer(same, verbose=False, **given)["input_ids"]
            found |= {(text, added): tokens for text, tokens in zip(same, ids, strict=True)}
        return found

    def _shared(self, tokens: Sequence[int]) -> tuple[int, ...]:
        if (highest := max(tokens, default=0)) >= len(self._ids):
            self._ids += range(len(self._ids), highest + 1)
        return tuple(map(self._ids.__getitem__, tokens))


def _split(context: str, continuation: str) -> tuple[str | None, str]:
    """Spaces at the end of the context go to the continuation, so that a word begins with its space; None is none."""
    bare = context.rstrip()
    return (bare, context[len(bare) :] + continuation) if context else (None, continuation)


def _texts(context: str | None, continuation: str) -> Iterator[tuple[str, bool | None]]:
    if context is None:
        yield continuation, False
    else:
        yield context, None
        yield context + continuation, None
