"""What lm-eval wants to know of a model, whatever it asks: its tokenizer, its limits, its processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jinja2
import torch
from accelerate import Accelerator
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedModel

from qlora_cli.evaluation.encoding import Encoder
from qlora_cli.evaluation.events import Asking, Remark, Report
from qlora_cli.evaluation.hush import Hush


class Backend(TemplateLM):  # type: ignore[misc]  # lm-eval ships no types
    """A causal language model and its tokenizer, on one process or on each of several."""

    backend = "causal"

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, encoder: Encoder, report: Report, accelerator: Accelerator | None
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self._encoder = encoder
        self._accelerator = accelerator
        self._report_to = report
        self._hush: Hush | None = None
        self._told: set[str] = set()

    @contextmanager
    def aloud(self, hush: Hush) -> Iterator[None]:
        """A block in which what this model tells is heard although all else is silent."""
        self._hush = hush
        try:
            yield
        finally:
            self._hush = None

    def remark_once(self, text: str) -> None:
        """Tell something, unless it was told before."""
        if text not in self._told:
            self._told.add(text)
            self._report(Remark(text))

    def _report(self, event: Asking | Remark) -> None:
        with self._hush.lifted() if self._hush else nullcontext():
            self._report_to(event)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int | None:
        return self._encoder.prefix_token

    @property
    def max_length(self) -> int:
        return self._encoder.max_length

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def rank(self) -> int:
        return 0 if self._accelerator is None else int(self._accelerator.process_index)

    @property
    def world_size(self) -> int:
        return 1 if self._accelerator is None else int(self._accelerator.num_processes)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._accelerator is None else self._accelerator.gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if self.world_size == 1:
            return [obj]
        gathered: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._encoder.encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. Templates that refuse a system message get the conversation without it."""
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except jinja2.exceptions.TemplateError as error:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            text = self._rendered(without, add_generation_prompt)
            self.remark_once(f"the chat template refuses a system message, which was left out: {error}")
            return text

    def _rendered(self, chat_history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )
