"""The model that answers lm-eval's questions: what the `hf` backend would answer, without asking anything twice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from transformers import PreTrainedModel

from qlora_cli.errors import EvaluationError
from qlora_cli.evaluation.answering.questions import Continuation, Likelihood
from qlora_cli.evaluation.asking import (
    check_continuations,
    contradictions,
    cut_remark,
    no_number,
    prompts_of,
    room_for_prompts,
)
from qlora_cli.evaluation.backend import Backend
from qlora_cli.evaluation.decoding_terms import decoding_terms
from qlora_cli.evaluation.encoding import Encoded, Encoder
from qlora_cli.evaluation.events import Kind, Report
from qlora_cli.evaluation.store import AnswerStore
from qlora_cli.evaluation.tally import Tally


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
        """
        encoder = Encoder(tokenizer, model.config, max_length=max_length, add_bos_token=add_bos_token)
        super().__init__(model, tokenizer, encoder, report, accelerator)
        self.batch_size = batch_size
        self.cut: Counter[str] = Counter()
        self.cut_tokens = 0
        self.asked = self.kept = 0
        self._store = AnswerStore(None, "") if store is None else store

    @property
    def way(self) -> str | None:
        """How log-likelihoods are computed, in words; None as long as none was asked for."""
        return self._scorer.name if "_scorer" in self.__dict__ else None

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
        return [
            (p, greedy) for p, greedy in self._likelihoods("loglikelihood", requests, encoded, range(len(requests)))
        ]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in pieces no longer than the model's context; 0.0 for an empty text."""
        windows = [self._encoder.windows(request.args[0]) for request in requests]
        pieces = [piece for text in windows for piece in text]
        owners = [number for number, text in enumerate(windows) for _ in text]
        answers = iter(self._likelihoods("loglikelihood_rolling", requests, pieces, owners))
        return [float(sum(next(answers).log_probability for _ in text)) for text in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each text.

        Raises:
            EvaluationError: if a task wants longer answers than the model's context has room for.
        """
        own = self.model.generation_config
        terms = [decoding_terms(request.args[1], self._end, own) for request in requests]
        for text in contradictions(requests, terms):
            self.remark_once(text)
        encoded = list(self._encoder.prompts(room_for_prompts(requests, terms, self.max_length)))
        self._count_cut(requests, encoded)
        prompts = prompts_of(requests, terms, encoded)
        drawn = [one.drawn for one in terms]
        answers: list[str | None] = [None] * len(prompts)
        tally = Tally("generate_until", range(len(prompts)), len(prompts), self._report)
        # What is drawn is drawn as often as it is asked for.
        places: dict[Any, list[int]] = {}
        for number, prompt in enumerate(prompts):
            told = prompt.tokens, prompt.until, prompt.max_new_tokens, repr(prompt.sampling)
            key = number if drawn[number] else told
            places.setdefault(key, []).append(number)
        wanted: list[list[int]] = []
        for same in places.values():
            found = None if drawn[same[0]] else self._store.text(prompts[same[0]], self._stops)
            if found is None:
                wanted.append(same)
            else:
                self._give(answers, same, found, tally, kept=True)
        tally.tell()
        with self._asking(tally):
            questions = [prompts[same[0]] for same in wanted]
            for at, text in self._generator.generate(questions, tally.computed) if questions else ():
                if not drawn[wanted[at][0]]:
                    self._store.keep_text(questions[at], self._stops, text)
                self._give(answers, wanted[at], text, tally)
        return _complete(answers)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        encoded = [self._encoder.fitted(context, continuation) for _, context, continuation in requests]
        answers = self._likelihoods("loglikelihood", (), encoded, range(len(encoded)))
        return [(answer.log_probability, answer.greedy) for answer in answers]

    # How it is answered.

    def _likelihoods(
        self, kind: Kind, requests: Sequence[Instance], encoded: Sequence[Encoded], owners: Sequence[int]
    ) -> list[Likelihood]:
        """One for each of `encoded`, which belong to the questions `owners`."""
        places: dict[Continuation, list[int]] = {}
        for number, (tokens, scored, _) in enumerate(encoded):
            places.setdefault(Continuation(tokens, scored), []).append(number)
        tally = Tally(kind, owners, len(requests) or len(encoded), self._report)
        answers: list[Likelihood | None] = [None] * len(encoded)
        wanted: list[Continuation] = []
        for question, same in places.items():
            found = self._store.likelihood(question)
            if found is None:
                wanted.append(question)
            else:
                self._give(answers, same, found, tally, kept=True)
        tally.tell()
        with self._asking(tally):
            for at, answer in self._scorer.score(wanted, tally.computed) if wanted else ():
                same = places[wanted[at]]
                if math.isnan(answer.log_probability):
                    raise EvaluationError(no_number(requests[owners[same[0]]] if requests else None))
                self._store.keep_likelihood(wanted[at], answer)
                self._give(answers, same, answer, tally)
        return _complete(answers)

    def _give(
        self, answers: list[Any], places: Sequence[int], answer: Any, tally: Tally, *, kept: bool = False
    ) -> None:
        for place in places:
            answers[place] = answer
        self.asked += len(places)
        self.kept += len(places) * kept
        tally.answered(places, kept=kept)

    @contextmanager
    def _asking(self, tally: Tally) -> Iterator[None]:
        """While the model is asked: in eval mode, its answers safe whatever happens."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
            tally.tell()
        finally:
            for module in training:
                module.training = True
            self._store.flush()
            if self._store.trouble:
                self.remark_once(self._store.trouble)

    @cached_property
    def _scorer(self) -> Any:
        from qlora_cli.evaluation.answering.scorer import choose_scorer

        return choose_scorer(self.model, batch_size=self.batch_size, remark=self.remark_once)

    @cached_property
    def _generator(self) -> Any:
        from qlora_cli.evaluation.answering.generation import Generator

        return Generator(self.model, self.tokenizer, batch_size=self.batch_size, stop_ids=self._stops)

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

    def _count_cut(self, requests: Sequence[Instance], encoded: Sequence[Encoded]) -> None:
        cut = Counter(str(request.task_name) for request, found in zip(requests, encoded, strict=True) if found.cut)
        if cut:
            most = max(found.cut for found in encoded)
            self.cut += cut
            self.cut_tokens = max(self.cut_tokens, most)
            self.remark_once(cut_remark(cut, len(requests), self.max_length, most))


def _complete(answers: list[Any]) -> list[Any]:
    missing = sum(answer is None for answer in answers)
    if missing:
        raise EvaluationError(f"{missing:,} of {len(answers):,} questions have no answer")
    return answers
