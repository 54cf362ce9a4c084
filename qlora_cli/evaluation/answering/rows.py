"""One answer in the making."""

from __future__ import annotations

from dataclasses import dataclass, field

from qlora_cli.evaluation.answering.questions import Prompt
from qlora_cli.evaluation.answering.stops import Stops


@dataclass(eq=False)
class Row:
    """A prompt and what has been written after it.

    Attributes:
        prompt: what is read.
        stops: what ends the answer, before `prompt.max_new_tokens` does.
        questions: the indices of all questions that are this one.
        number: of answers that are drawn, its place among those with the same sampling arguments. It seeds what is
            drawn, whatever else is asked or was answered before.
        written: ids of the tokens that were written, those that ended the answer among them.
    """

    prompt: Prompt
    stops: Stops
    questions: list[int]
    number: int = 0
    written: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens that the model reads before it writes."""
        return len(self.prompt.tokens)

    @property
    def most(self) -> int:
        """The tokens of prompt and longest answer."""
        return self.length + self.prompt.max_new_tokens

    @property
    def complete(self) -> bool:
        """Whether the answer has come to its end."""
        return len(self.written) >= self.prompt.max_new_tokens or self.stops.reached(self.written)

    @property
    def text(self) -> str:
        """The answer."""
        return self.stops.text(self.written)
