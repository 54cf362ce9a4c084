"""Whether rows may be written with a loop and a cache of our own: a trial on the model itself."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.evaluation.answering.decoding import GreedyRows
from qlora_cli.evaluation.answering.likeness import difference, fault_in, logits_alone, made_up_rows, rounding
from qlora_cli.evaluation.answering.prefill import PromptReader
from qlora_cli.evaluation.answering.questions import Prompt
from qlora_cli.evaluation.answering.rows import Row
from qlora_cli.evaluation.answering.stops import Stops

_STEPS = 2


def fault_in_decoding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why not: logits after a few tokens that were written beside others, set beside those of all tokens alone.

    Args:
        model: one whose prompts can be read as a tree, in eval mode.

    Returns:
        The reason, to follow upon a colon; None if they may.
    """
    never = Stops(tokenizer, (), ())
    rows = [Row(Prompt(tuple(tokens), (), _STEPS + 1), never, []) for tokens in made_up_rows(model)[::2]]

    def trial() -> tuple[float, float]:
        reader = PromptReader(model, rows)
        writing = GreedyRows(model, reader.rows, *reader.read(reader.rows), repetition_penalty=1)
        for _ in range(_STEPS):
            writing.advance()
        read = [[*row.prompt.tokens, *row.written] for row in reader.rows]
        alone = [logits_alone(model, tokens) for tokens in read]
        return difference([writing.logits], [each[-1:] for each in alone]), rounding(model, read, alone)

    return fault_in(trial)
