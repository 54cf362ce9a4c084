"""Where an answer ends, for tokenizers of every kind."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_cli.evaluation.answering.stops import Stops, end_tokens
from tests.support.models import tiny_model
from tests.support.tokenizers import END, tiny_tokenizer

_CORPUS = [
    "Question: what is 12 + 30? Answer: 42.",
    "The answer, he said, is: don't know. ",
    "a b c d e é 世界 🙂\n",
] * 4


@functools.lru_cache
def _byte_level() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@functools.lru_cache
def _byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: words open with ▁, the first space of a text is stripped, unknown characters are bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["▁" + line.replace(" ", "▁") for line in _CORPUS[:2]], trainer)
    # Training made the bytes special; on disk, Llama's are ordinary.
    state = backend.to_str().replace('"special":true', '"special":false')
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(state), eos_token="</s>", unk_token="<unk>", bos_token="<s>"
    )
    made.clean_up_tokenization_spaces = False
    return made


@functools.lru_cache
def _word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: pieces within a word open with ##, and spaces before punctuation are cleaned away."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]")


_KINDS = {"byte level": _byte_level, "byte fallback": _byte_fallback, "word piece": _word_piece}


def _read_in_full(tokenizer: PreTrainedTokenizerFast, until: list[str], written: list[int], end: set[int]) -> int:
    """How many tokens there are at the first that ends the answer, by decoding everything at every token."""
    for count in range(1, len(written) + 1):
        text = tokenizer.decode(written[:count])
        if written[count - 1] in end or any(stop and stop in text for stop in until):
            return count
    return len(written)


@pytest.mark.parametrize("kind", _KINDS)
def test_an_answer_ends_where_a_look_at_all_of_it_would_end_it(kind: str) -> None:
    """Looking at the last tokens alone, and only where a stop text may end, misses no stop text."""
    tokenizer = _KINDS[kind]()
    ids = st.integers(0, len(tokenizer) - 1)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(ids, max_size=24), st.data())
    def check(written: list[int], data: st.DataObject) -> None:
        text = tokenizer.decode(written)
        cut = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 9)).map(lambda at: text[at[0] :][: at[1]])
        stop_texts = st.one_of(cut, st.sampled_from(["\n\n", ".", " ", "é", "Q:", "n", ""]))
        until = data.draw(st.lists(stop_texts, max_size=3))
        until = [stop for stop in until if "\ufffd" not in stop]  # decodes from many bytes, in as many ways
        end = data.draw(st.sets(ids, max_size=3))
        stops = Stops(tokenizer, until, end)
        expected = _read_in_full(tokenizer, until, written, end)
        if kind == "word piece":
            # Cleaning takes spaces out of text that was there before: an end may be seen late, never early.
            assert stops.first_end(written, len(written)) >= expected
        else:
            assert stops.first_end(written, len(written)) == expected
        expected_text = tokenizer.decode(written[:expected], skip_special_tokens=True)
        for stop in filter(None, until):
            expected_text = expected_text.split(stop)[0]
        assert stops.text(written[:expected]) == expected_text

    check()


def test_a_stop_text_may_be_of_several_tokens_and_end_within_one() -> None:
    """`er: is` ends in the middle of what the last token says; the answer ends with that token and before the text."""
    tokenizer = tiny_tokenizer()
    written = tokenizer.encode("The answer: is four", add_special_tokens=False)
    stops = Stops(tokenizer, ["swer: i"], ())
    count = stops.first_end(written, 99)
    assert "swer: i" not in tokenizer.decode(written[: count - 1])
    assert "swer: i" in tokenizer.decode(written[:count])
    assert stops.text(written[:count]) == "The an"


def test_a_character_of_several_bytes_ends_an_answer_when_its_last_byte_is_there() -> None:
    """Until then it decodes to the replacement character, which is no stop text."""
    tokenizer = tiny_tokenizer()
    written = tokenizer.encode("four 🙂 apples", add_special_tokens=False)
    stops = Stops(tokenizer, ["🙂"], ())
    count = stops.first_end(written, 99)
    assert tokenizer.decode(written[:count]) == "four 🙂"
    assert tokenizer.decode(written[: count - 1]).endswith("\ufffd")
    assert stops.text(written[:count]) == "four "


def test_special_tokens_end_an_answer_as_text_too_and_are_no_part_of_it() -> None:
    """A special token's name among the stop texts ends the answer, though the answer is decoded without it."""
    tokenizer = tiny_tokenizer()
    written = [*tokenizer.encode("four", add_special_tokens=False), tokenizer.convert_tokens_to_ids(END)]
    rest = tokenizer.encode(" apples", add_special_tokens=False)
    stops = Stops(tokenizer, [END], ())
    assert stops.first_end(written + rest, 99) == len(written)
    assert stops.text(written) == "four"


def test_stop_texts_cut_one_after_the_other() -> None:
    """As lm-eval cuts: `bc` first, after which there is no `ab` left."""
    tokenizer = tiny_tokenizer()
    written = tokenizer.encode("xabc", add_special_tokens=False)
    assert Stops(tokenizer, ["bc", "ab"], ()).text(written) == "xa"
    assert Stops(tokenizer, ["ab", "bc"], ()).text(written) == "x"


def test_empty_stop_texts_and_none_end_nothing() -> None:
    """lm-eval gives an empty text where a tokenizer has no word for the end."""
    tokenizer = tiny_tokenizer()
    written = tokenizer.encode("four apples.", add_special_tokens=False)
    for until in ([], [""]):
        stops = Stops(tokenizer, until, ())
        assert stops.first_end(written, 99) == len(written)
        assert stops.first_end(written, 2) == 2
        assert stops.text(written) == "four apples."
    assert not Stops(tokenizer, ["x"], ()).reached([])


@pytest.mark.parametrize(("given_ids", "expected"), [(None, set()), (7, {7}), ([7, 9], {7, 9})])
def test_the_end_is_what_the_generation_configuration_says(given_ids: object, expected: set[int]) -> None:
    """None, one, or several tokens."""
    model = tiny_model("llama")
    model.generation_config.eos_token_id = given_ids
    assert end_tokens(model) == expected
