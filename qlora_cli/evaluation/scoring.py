"""The model that answers lm-eval's questions: what the `hf` backend would answer, without asking anything twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from transformers import PreTrainedModel

from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.answering.generation import Generator
from qlora_cli.evaluation.answering.questions import Continuation, Progress
from qlora_cli.evaluation.answering.scorer import Scorer, choose_scorer
from qlora_cli.evaluation.asking import (
    check_continuations,
    contradictions,
    cut_remark,
    prompts_of,
    room_for_prompts,
)
from qlora_cli.evaluation.backend import Backend
from qlora_cli.evaluation.decoding_terms import decoding_terms
from qlora_cli.evaluation.encoding import Encoded, Encoder
from qlora_cli.evaluation.events import Kind, Report
from qlora_cli.evaluation.randomness import other_seed
from qlora_cli.evaluation.store import AnswerStore, likelihood_key, text_key
from qlora_cli.evaluation.tally import Tally

Q = TypeVar("Q")


class AnsweringModel(Backend):
    """A causal language model as lm-eval asks it: log-likelihoods, whole texts, generation.

    Texts become tokens exactly as in lm-eval's `hf` backend. Equal questions are asked once; answers in the store are
    not asked again, and new ones are put there as they come. The model is in eval mode while it is asked, and as it
    was afterwards.

    Attributes:
        max_length: the most tokens that the model reads at a time.
        cut: questions that lost their beginning to that, by task; `cut_tokens` is the most that one of them lost.
        asked, kept: questions that were answered, and how many of them the store had answers to.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        batch_size: int | None = None,
        store: AnswerStore | None = None,
        report: Report,
        accelerator: Accelerator | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        seed: int | None = None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            model: on its device, not wrapped by Accelerate.
            tokenizer: its tokenizer, with the chat template to use if one is asked for.
            batch_size: at most so many sequences share a forward pass; None: as many as the device takes.
            store: where answers are kept; None keeps none.
            report: is told how far it is, and what should be known beside the answers.
            accelerator: of several processes that share the documents between them.
            max_length, add_bos_token: as the `hf` backend's; None: as model and tokenizer say.
            seed: of answers that are drawn at random; None: lm-eval's.
        """
        encoder = Encoder(tokenizer, model.config, max_length=max_length, add_bos_token=add_bos_token)
        super().__init__(model, tokenizer, encoder, report, accelerator)
        self.batch_size = batch_size
        self._seed = seed
        self.cut: Counter[str] = Counter()
        self.cut_tokens = 0
        self.asked = self.kept = 0
        self._store = AnswerStore(None, "") if store is None else store

    @property
    def way(self) -> str | None:
        """How log-likelihoods are computed, in words; None as long as none was asked for."""
        return self._scorer.name if "_scorer" in self.__dict__ else None

    def facts(self) -> dict[str, Any]:
        """What lm-eval's results say of a model and its tokenizer."""
        tokens = {kind: getattr(self.tokenizer, f"{kind}_token") for kind in ("pad", "eos", "bos")}
        ids = {kind: str(getattr(self.tokenizer, f"{kind}_token_id")) for kind in tokens}
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_sha": "",
            "batch_size": "auto" if self.batch_size is None else self.batch_size,
            "batch_sizes": [],
            "device": str(self.device),
            **{f"tokenizer_{kind}_token": [token, ids[kind]] for kind, token in tokens.items()},
            "eot_token_id": self.tokenizer.eos_token_id,
            "max_length": self.max_length,
        }

    # What lm-eval asks.

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation after its context, and whether greedy decoding would write it.

        Raises:
            EvaluationError: for a continuation that is empty or longer than the model's context, or if the model gives
                no numbers.
        """
        encoded = list(self._encoder.pairs(request.args for request in requests))
        check_continuations(requests, encoded, self.max_length)
        self._count_cut(requests, encoded)
        return self._likelihoods("loglikelihood", encoded, range(len(encoded)), requests)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in pieces no longer than the model's context; 0.0 for an empty text."""
        windows = [self._encoder.windows(request.args[0]) for request in requests]
        pieces = [piece for text in windows for piece in text]
        owners = [number for number, text in enumerate(windows) for _ in text]
        answers = iter(self._likelihoods("loglikelihood_rolling", pieces, owners, requests))
        return [float(sum(next(answers)[0] for _ in text)) for text in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each text, up to the first text that ends it.

        Raises:
            EvaluationError: if a task wants longer answers than the model's context has room for.
        """
        terms = [decoding_terms(request.args[1], self._end) for request in requests]
        for text in contradictions(requests, terms):
            self.remark_once(text)
        encoded = list(self._encoder.prompts(room_for_prompts(requests, terms, self.max_length)))
        self._count_cut(requests, encoded)
        prompts = prompts_of(requests, terms, encoded)
        # What is drawn is drawn as often as it is asked for, and never kept.
        keys = [
            None if one.drawn else text_key(prompt, self._habits) for prompt, one in zip(prompts, terms, strict=True)
        ]
        tally = Tally("generate_until", range(len(prompts)), len(prompts), self._report)
        found = self._answers(prompts, keys, lambda some: self._generator.generate(some, self._progress(tally)), tally)
        return [str(text) for text in found]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        encoded = [self._encoder.fitted(context, continuation) for _, context, continuation in requests]
        return self._likelihoods("loglikelihood", encoded, range(len(encoded)), ())

    # How it is answered.

    def _likelihoods(
        self, kind: Kind, encoded: Sequence[Encoded], owners: Sequence[int], requests: Sequence[Instance]
    ) -> list[tuple[float, bool]]:
        """One for each of `encoded`, which belong to the questions `owners`."""
        tally = Tally(kind, owners, len(requests) or len(encoded), self._report)
        questions = [Continuation(tokens, scored) for tokens, scored, _ in encoded]

        keys = [likelihood_key(question) for question in questions]
        found = self._answers(questions, keys, lambda some: self._scorer.score(some, self._progress(tally)), tally)
        return [(float(log_probability), bool(greedy)) for log_probability, greedy in found]

    def _answers(
        self,
        questions: Sequence[Q],
        keys: Sequence[str | None],
        ask: Callable[[Sequence[Q]], Iterator[tuple[int, Any]]],
        tally: Tally,
    ) -> list[Any]:
        """An answer to each question; those of equal keys are asked once, those with None by themselves."""
        answers: list[Any] = [None] * len(questions)
        places: dict[str, list[int]] = {}
        for number, key in enumerate(keys):
            places.setdefault(key or f"question {number}", []).append(number)

        def give(same: list[int], answer: Any, *, kept: bool = False) -> None:
            for place in same:
                answers[place] = answer
            tally.answered(same, kept=kept)

        wanted: list[list[int]] = []
        for key, same in places.items():
            found = self._store.get(key)
            if found is None:
                wanted.append(same)
            else:
                give(same, found, kept=True)
        tally.tell()
        with self._asked() if wanted else nullcontext():
            for at, answer in ask([questions[same[0]] for same in wanted]) if wanted else ():
                if (key := keys[wanted[at][0]]) is not None:
                    self._store.put(key, answer)
                give(wanted[at], answer)
        tally.tell()
        self.asked += tally.questions
        self.kept += tally.kept
        if None in answers:
            raise EvaluationError(f"{answers.count(None):,} of {len(answers):,} questions have no answer")
        return answers

    def _progress(self, tally: Tally) -> Progress:
        """What is called as tokens are computed: answers that came together would wait for the next of them."""

        def computed(tokens: int, all_tokens: int) -> None:
            self._store.keep_up()
            tally.computed(tokens, all_tokens)

        return computed

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """While the model is asked: in eval mode, without gradients, and its answers safe whatever happens."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True
            self._store.flush()
            if self._store.trouble:
                self.remark_once(self._store.trouble)

    @cached_property
    def _scorer(self) -> Scorer:
        return choose_scorer(self.model, batch_size=self.batch_size, remark=self.remark_once)

    @cached_property
    def _generator(self) -> Generator:
        return Generator(
            self.model,
            self.tokenizer,
            batch_size=self.batch_size,
            stop_ids=self._stops,
            seed=other_seed(self._seed),
            remark=self.remark_once,
        )

    @cached_property
    def _end(self) -> str | None:
        """The text of the token that ends texts."""
        end = self.tokenizer.eos_token_id
        return None if end is None else str(self.tokenizer.decode(end))

    @cached_property
    def _stops(self) -> tuple[int, ...]:
        """The tokens that end an answer: the model's own, and the tokenizer's."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        ends = {*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id}
        return tuple(sorted(ends - {None}))

    @cached_property
    def _habits(self) -> str:
        """What decides how this model goes on, and how that is read, beside its weights and the vocabulary."""
        own, words = self.model.generation_config, self.tokenizer
        read = sorted(words.all_special_ids), getattr(words, "clean_up_tokenization_spaces", None)
        return repr((self._stops, sorted(own.to_diff_dict().items(), key=str) if own else (), read))

    def _count_cut(self, requests: Sequence[Instance], encoded: Sequence[Encoded]) -> None:
        # A request comes several times where it is repeated, or where another process has more of them.
        lengths = {id(request): (request, found.cut) for request, found in zip(requests, encoded, strict=True)}
        cut = Counter(str(request.task_name) for request, tokens in lengths.values() if tokens)
        if cut:
            most = max(tokens for _, tokens in lengths.values())
            self.cut += cut
            self.cut_tokens = max(self.cut_tokens, most)
            if self.world_size == 1:  # or there would be a remark of each process
                self.remark_once(cut_remark(cut, self.max_length, most))
