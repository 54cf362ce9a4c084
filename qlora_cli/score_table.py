"""Scores as a person reads them: a table where it fits, else a line or two for each score; and what they come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.text import Text

from qlora_cli.benchmarking.events import LossRow, ScoreRow
from qlora_cli.console import plural, visible
from qlora_cli.evaluation.statistics import Comparison

_GAP = 2  # blanks between columns
_INDENT = 2  # and before the members of a group, for each group
# So many intervals at 95 %, and one or more of them leaves out 0 by luck alone.
_MANY = 20
_LEVEL = 0.05
_MOST_NAMES = 5  # that the verdict tells one by one


@dataclass(frozen=True)
class _Column:
    """A column of the table; one without a name, that belongs to the column before it, has a smaller gap."""

    name: str
    cells: list[str]
    left: bool = False
    gap: int = _GAP

    @property
    def width(self) -> int:
        return max(map(len, [self.name, *self.cells]))

    def cell(self, text: str) -> str:
        return " " * self.gap + (text.ljust(self.width) if self.left else text.rjust(self.width))


def shown_scores(scores: Sequence[ScoreRow], width: int | None) -> list[Text]:
    """The lines that show these scores, none of them cut.

    Args:
        scores: the rows of one task one after the other.
        width: letters in a line, if there is a limit: a table that is wider becomes a list.
    """
    return _shown(scores, ("task", "n"), width)


def shown_losses(losses: Sequence[LossRow], width: int | None) -> list[Text]:
    """The same of losses."""
    return _shown([row for loss in losses for row in as_scores(loss)], ("dataset", "rows"), width)


def as_scores(loss: LossRow) -> list[ScoreRow]:
    """A loss as scores: the metrics of one dataset."""
    first = ScoreRow(
        task=loss.dataset, label=loss.dataset, depth=0, is_group=False, documents=loss.rows, metric=_LOSS,
        filter="none", value=loss.loss, error=loss.error, higher_is_better=False, num_fewshot=None,
        partial=plural(loss.tokens, "token"), base=loss.base, base_error=loss.base_error, comparison=loss.comparison,
    )  # fmt: skip
    others = (
        (_PERPLEXITY, loss.perplexity, loss.base_perplexity),
        (_BITS, loss.bits_per_byte, loss.base_bits_per_byte),
    )
    bare = replace(first, error=None, partial=None, base_error=None, comparison=None)
    return [
        first,
        *(replace(bare, metric=metric, value=value, base=base) for metric, value, base in others if value is not None),
    ]


def legend(rows: Sequence[ScoreRow]) -> Iterator[str]:
    """What the words and numbers mean, where they are not plain."""
    worse = dict.fromkeys(_metric(row) for row in rows if row.higher_is_better is False)
    if worse:
        yield f"lower is better: {', '.join(worse)}"
    compared = [one for row in rows if (one := row.comparison) is not None and one.low is not None]
    if not compared:
        return
    each = "row" if all(row.metric in _OF_ROWS for row in rows) else "document"
    told = f"difference: target minus base, {each} by {each}; the interval is a paired bootstrap's"
    yield told + ("; p is McNemar's exact test" if any(one.p is not None for one in compared) else "")
    if len(compared) >= _MANY:
        about = round(len(compared) / 20)
        yield f"of {len(compared)} intervals at 95 %, about {about} {'leaves' if about == 1 else 'leave'} out 0 by luck"


def verdict(rows: Sequence[ScoreRow]) -> str | None:
    """What the comparisons on top say together, in a sentence; None without any."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row.comparison is not None and row.depth == 0:
            tasks = found.setdefault(_outcome(row, row.comparison), {})
            tasks.setdefault(_name(row), []).append(_metric(row))
    parts: list[str] = []
    for outcome, (word, base) in _OUTCOMES.items():
        if outcome in found:
            parts.append(f"{word}{'' if parts else base} on {_some(found[outcome])}")
    return "; ".join(parts) or None


def _some(metrics: Mapping[str, Sequence[str]]) -> str:
    """Tasks with their metrics, in words."""
    names = [f"{task} ({', '.join(of)})" for task, of in metrics.items()]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES + 1 else ""
    return ", ".join(names[:_MOST_NAMES] if more else names) + more


# What is said of one, and what the first to be said has besides.
_OUTCOMES = {
    "better": ("better", " than the base"),
    "worse": ("worse", " than the base"),
    "other": ("another score", " than the base's"),
    "same": ("no certain difference", " from the base"),
}
_OF_ROWS = _LOSS, _PERPLEXITY, _BITS = "loss per token", "perplexity", "bits per byte"


def _outcome(row: ScoreRow, comparison: Comparison) -> str:
    """Whether the interval leaves out 0, and on which side; of few documents it is too narrow, which the test tells."""
    low, high, p = comparison.low, comparison.high, comparison.p
    if low is None or high is None or not (low > 0 or high < 0) or (p is not None and p >= _LEVEL):
        return "same"
    if row.higher_is_better is None:
        return "other"
    return "better" if (low > 0) == row.higher_is_better else "worse"


def _shown(rows: Sequence[ScoreRow], heads: tuple[str, str], width: int | None) -> list[Text]:
    if not rows:
        return []
    columns = _columns(rows, heads)
    lines = [_line(columns, [column.name for column in columns], "dim")]
    for index, row in enumerate(rows):
        cells = [column.cells[index] for column in columns]
        lines.append(_line(columns, cells, "bold" if row.is_group else ""))
    if width is None or all(len(line) <= width for line in lines):
        return lines
    return list(_listed(rows, heads[1]))


def _columns(rows: Sequence[ScoreRow], heads: tuple[str, str]) -> list[_Column]:
    """The columns that have something in them; `heads` are the names of the first two."""
    starts = [index == 0 or _key(row) != _key(rows[index - 1]) for index, row in enumerate(rows)]
    shots = {row.num_fewshot for row in rows}
    compared = [row.comparison for row in rows]
    has_base = any(row.base is not None for row in rows)
    columns = [
        _Column(
            heads[0],
            [
                " " * (_INDENT * row.depth) + _name(row) if start else ""
                for row, start in zip(rows, starts, strict=True)
            ],
            True,
            0,
        ),
        _Column(heads[1], [f"{row.documents:,}" if start else "" for row, start in zip(rows, starts, strict=True)]),
        _Column("shots", ["" if row.num_fewshot is None or len(shots) == 1 else str(row.num_fewshot) for row in rows]),
        _Column("metric", [_metric(row) for row in rows], True),
        _Column("base", [_number(row.base) for row in rows]),
        _Column("", [_error(row.base_error) for row in rows], True, 1),
        _Column("target" if has_base else "value", [_number(row.value) for row in rows]),
        _Column("", [_error(row.error) for row in rows], True, 1),
        _Column("difference", ["" if one is None else _signed(one.difference) for one in compared]),
        _Column("95 % interval", ["" if one is None else _interval(one) for one in compared]),
        _Column("McNemar p", ["" if one is None or one.p is None else _p(one.p) for one in compared]),
        _Column("won:lost", ["" if one is None else _won(one) for one in compared]),
        _Column("", [row.partial or "" for row in rows], True),
    ]
    return [column for column in columns if any(column.cells)]


def _key(row: ScoreRow) -> tuple[str, int, int]:
    return row.task, row.depth, row.documents


def _line(columns: Sequence[_Column], cells: Sequence[str], style: str) -> Text:
    return Text("".join(map(_Column.cell, columns, cells)).rstrip(), style=style)


def _listed(rows: Sequence[ScoreRow], counted: str) -> Iterator[Text]:
    """For a narrow terminal: the task, and below it what was measured."""
    shots = {row.num_fewshot for row in rows}
    metrics = max(len(_metric(row)) for row in rows)
    before = None
    for row in rows:
        indent = " " * (_INDENT * row.depth)
        if _key(row) != before:
            before = _key(row)
            asked = f", {row.num_fewshot}-shot" if row.num_fewshot is not None and len(shots) > 1 else ""
            yield Text(
                f"{indent}{_name(row)}  ({counted} {row.documents:,}{asked})",
                style="bold" if row.is_group else "",
            )
        partial = f"  {row.partial}" if row.partial else ""
        base = "" if row.base is None else f"  base {_with_error(row.base, row.base_error)}"
        yield Text(f"{indent}  {_metric(row):<{metrics}}  {_with_error(row.value, row.error)}{base}{partial}")
        if (one := row.comparison) is not None:
            interval = f"  ({told})" if (told := _interval(one)) else ""
            p = "" if one.p is None else f"  p {_p(one.p)}"
            won = f"  won:lost {told}" if (told := _won(one)) else ""
            yield Text(f"{indent}    {_signed(one.difference)}{interval}{p}{won}")


def _name(row: ScoreRow) -> str:
    """On top the name that it is asked for by; in a group, `anatomy` is enough of `mmlu_anatomy`."""
    return visible(row.label if row.depth else row.task)


def _metric(row: ScoreRow) -> str:
    return visible(row.metric if row.filter == "none" else f"{row.metric} ({row.filter})")


def _number(value: float | None) -> str:
    """As lm-eval prints scores."""
    return "" if value is None else f"{value:.4f}"


def _error(value: float | None) -> str:
    return "" if value is None else f"± {value:.4f}"


def _with_error(value: float, error: float | None) -> str:
    return f"{_number(value)} {_error(error)}".rstrip()


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-0.0000", "+0.0000").replace("+nan", "nan")


def _interval(one: Comparison) -> str:
    """Of a single document there is none."""
    return "" if one.low is None or one.high is None else f"{_signed(one.low)} to {_signed(one.high)}"


def _won(one: Comparison) -> str:
    return "" if one.wins is None or one.losses is None else f"{one.wins:,}:{one.losses:,}"


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"
