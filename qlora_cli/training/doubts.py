"""What may be meant so of rows, but is more often a mistake: told before a run, and by a check."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from qlora_cli.data.encoded import EncodedRows
from qlora_cli.data.end_of_turn import doubts_about_the_end
from qlora_cli.data.templates import is_plain, unknown_markers
from qlora_cli.recipe.schema import DatasetSection
from qlora_cli.training.preparation import Split, only_answer


def doubts(
    train: Split, validation: Split | None, section: DatasetSection, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """What may be meant so, but is more often a mistake."""
    kept = train.kept
    for split in (train, validation):
        if split is not None:
            yield from _left_out(split)
    yield from _about_the_template(kept, section, tokenizer)
    if number := train.whole.split:
        rows = f"{number:,} row{'s' * (number != 1)}"
        yield (
            f"the chat template renders earlier turns differently once others follow: {rows} of several answers became "
            f"a sequence for each, as the model sees it when it gives that answer"
        )
    if len(silent := train.silent_rows):
        rows, verb = ("row has", "teaches") if kept.count(silent) == 1 else ("rows have", "teach")
        number = kept.count(silent)
        yield f"{number:,} training {rows} an empty answer and {verb} only to stop ({kept.named(silent)})"
    if kept.dropped > kept.rows:
        yield f"dataset.overlong: drop leaves {kept.rows:,} of {train.whole.rows:,} training rows"
    if train.whole.format != "classification" and (answer := only_answer(train.whole, tokenizer)):
        yield f"all {train.whole.rows:,} training rows have the same answer ({answer!r}), whatever the prompt"
    yield from doubts_about_the_end(train.end, kept, section.max_length)
    if validation is not None and section.validation is not None and _same_rows(train, validation):
        yield "validation has the rows of train: its loss says nothing about rows the model has not seen"


def _about_the_template(
    kept: EncodedRows, section: DatasetSection, tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    if section.chat_template is None:
        if is_plain(tokenizer.chat_template):
            yield (
                "the base model has no chat template: conversations are written with the plain one, which is saved "
                "with the adapter; set dataset.chat_template for another"
            )
    elif not kept.is_text.all() and (unknown := unknown_markers(str(tokenizer.chat_template), tokenizer)):
        verb = "is no token" if len(unknown) == 1 else "are no tokens"
        yield (
            f"dataset.chat_template writes {', '.join(unknown)}, which {verb} of this tokenizer: the model learns "
            f"them letter by letter, and whatever generates with it has to be told to stop there"
        )


def _left_out(split: Split) -> Iterator[str]:
    """What of these rows is not learned, or not seen."""
    kept = split.kept
    if kept.skipped:
        yield _skipped(kept)
    if number := kept.unwritten_tools:
        yield (
            f"{number:,} row{'s' * (number != 1)} of {kept.source} {'has' if number == 1 else 'have'} tools, which the "
            f"chat template does not write: the model does not see what it may call. Set dataset.chat_template to a "
            f"template that writes them"
        )
    if number := split.rows.rows_losing_sequences:
        yield (
            f"dataset.overlong: drop leaves out some answers of {number:,} {split.called} row{'s' * (number != 1)}: "
            f"each is a sequence by itself, and those are longer than dataset.max_length"
        )
    yield from _cut_answers(split)


def _skipped(kept: EncodedRows) -> str:
    rows = f"{kept.skipped:,} row{'s' * (kept.skipped != 1)}"
    if len(kept.parts) == 1:  # else the problems name their files
        rows += f" of {kept.source}"
    shown = "".join(f"\n  {problem}" for problem in kept.problems)
    more = "\n  …" if kept.skipped > len(kept.problems) else ""
    return f"{rows} could not be read and {'was' if kept.skipped == 1 else 'were'} skipped:{shown}{more}"


def _cut_answers(split: Split) -> Iterator[str]:
    if not (cut := split.rows.rows_losing_labels):
        return
    whole = split.rows.rows_losing_answers
    lost = f", {whole:,} of them whole answers" if whole else ""
    yield f"{cut:,} of {split.kept.rows:,} {split.called} rows lose part of their answer at dataset.max_length{lost}"


def _same_rows(train: Split, validation: Split) -> bool:
    # By what is in them: a copy of a file has another name.
    return train.whole.fingerprint == validation.whole.fingerprint
