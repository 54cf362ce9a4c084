"""`qlora eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.benchmarking.request import EvalRequest
from qlora_cli.commands.eval_output import check_output, check_samples_names, samples_patterns
from qlora_cli.commands.invocation import as_written
from qlora_cli.commands.stopping import exit_code
from qlora_cli.errors import RequestError, RunError
from qlora_cli.recipe.data_files import near_name, shown_path
from qlora_cli.recipe.paths import expand_home

if TYPE_CHECKING:  # they bring along what shows it
    from qlora_cli.benchmarking.events import Event
    from qlora_cli.eval_view import EvalView

# What a list of names is made with, of the parameters of the command.
_TO_LIST = ("target", "listing", "task_paths")
# What is about tasks only, and about rows only.
_OF_TASKS = (
    "num_fewshot", "data_root", "task_paths", "allow_partial", "chat_template", "system_instruction", "log_samples",
    "seed", "no_keep", "run_unsafe_code",
)  # fmt: skip
_OF_ROWS = ("overrides",)


def evaluate(request: EvalRequest, *, given: Mapping[str, object]) -> int:
    """Score a model, showing how it goes and what came of it; returns the exit code.

    Args:
        given: all parameters of the command that somebody gave, by their names.
    """
    told: list[_Listener] = []

    def work() -> None:
        asked = _with_homes(request)
        _check(asked, given)  # before torch: what is wrong with these is told at once
        from qlora_cli.console import make_console

        console = make_console()
        _set_up(asked, progress=console.is_terminal)
        from qlora_cli.benchmarking.evaluate import evaluate as run
        from qlora_cli.eval_view import EvalView

        with EvalView(console, baseline=asked.baseline) as view:
            told.append(_Listener(view, asked))
            try:
                run(asked, listeners=told)
            except RunError as error:
                raise type(error)(f"{error}{told[0].how_to_go_on()}") from error

    return exit_code(work, lambda: told[0].how_it_stands() if told else "stopped; nothing was asked yet")


def list_tasks(pattern: str | None, task_paths: Sequence[Path], *, given: Mapping[str, object]) -> int:
    """List the names that `--tasks` takes; returns the exit code.

    Args:
        pattern: of names, as in `arc_*`; None lists all.
        task_paths: folders with tasks beside lm-eval's.
        given: all parameters of the command that somebody gave, by their names.
    """

    def work() -> None:
        if unused := [as_written(name, value) for name, value in given.items() if name not in _TO_LIST]:
            raise RequestError(f"{', '.join(unused)}: --list lists names, and has no use for this")
        folders = [Path(expand_home(str(path))) for path in task_paths]
        _raise_all([problem for folder in folders for problem in _no_folder("--task-path", folder)])
        from qlora_cli.console import make_console
        from qlora_cli.evaluation.tasks.index import load_index
        from qlora_cli.evaluation.tasks.names import listing
        from qlora_cli.task_list import show_tasks

        show_tasks(make_console(), listing(pattern, load_index(folders, waiting=_say_it_takes_long)))

    return exit_code(work, lambda: "stopped")


class _Listener:
    """Passes on what is told, and knows how the evaluation stands when it ends."""

    def __init__(self, view: EvalView, request: EvalRequest) -> None:
        self._view, self._request = view, request
        self._answered, self._done = False, False
        self._results: Path | None = None
        self._samples = False

    def __call__(self, event: Event) -> None:
        from qlora_cli.benchmarking.events import Evaluated, Written
        from qlora_cli.evaluation.events import Asking

        match event:
            case Asking():
                self._answered = self._answered or event.answered > 0
            case Evaluated():
                self._done = True
            case Written("results", (file,)):
                self._results = file
            case Written("samples"):
                self._samples = True
        self._view(event)

    def how_it_stands(self) -> str:
        """What there is when it was stopped."""
        if self._results is not None:
            lost = "" if self._samples or not self._request.log_samples else ", but not all samples are there"
            return f"stopped; {shown_path(self._results)} is whole{lost}"
        if self._done:
            return "stopped; all was scored"
        if not self._answered:
            return "stopped; no question was answered yet"
        if not self._request.keep_answers:
            return "stopped; as --no-keep says, no answers are kept"
        return "stopped; the answers so far are kept, and the same command goes on from them"

    def how_to_go_on(self) -> str:
        """The end of the message of a failure."""
        if not self._answered or not self._request.keep_answers:
            return ""
        return "\nThe answers so far are kept: the same command goes on from them"


def _with_homes(request: EvalRequest) -> EvalRequest:
    """With `~` as the home folder in what names files."""

    def expanded(path: Path) -> Path:
        return Path(expand_home(str(path)))

    return replace(
        request,
        data_root=None if request.data_root is None else expanded(request.data_root),
        task_paths=tuple(map(expanded, request.task_paths)),
        output=None if request.output is None else expanded(request.output),
    )


def _check(request: EvalRequest, given: Mapping[str, object]) -> None:
    """Refuse what can be seen to be wrong without the model and the data: all of it at once."""
    if not request.tasks and request.dataset is None:
        raise RequestError(
            "expected --tasks NAME,... for what to be scored on (qlora eval --list tells the names), or --dataset ROWS"
        )
    problems = [*_unused(request, given)]
    problems += _attempt(lambda: _look_at(request.target))
    if request.data_root is not None:
        problems += _no_folder("--data-root", request.data_root)
    absent = [problem for path in request.task_paths for problem in _no_folder("--task-path", path)]
    problems += absent
    if request.output is not None:
        output = request.output
        problems += _attempt(lambda: check_output(output, samples_patterns(request, output)))
    if (dataset := request.dataset) is not None:
        problems += _attempt(lambda: _look_for_rows(dataset))
        problems += _attempt(lambda: _look_at_overrides(request.overrides))
    if request.tasks and not absent:
        problems += _attempt(lambda: _look_at_names(request))
    _raise_all(problems)


def _unused(request: EvalRequest, given: Mapping[str, object]) -> Iterator[str]:
    """What was given, and would say nothing."""
    if not request.tasks and (unused := _named(given, _OF_TASKS)):
        yield f"{unused}: without --tasks, there is no use for this"
    if request.dataset is None and (unused := _named(given, _OF_ROWS)):
        yield f"{unused}: without --dataset, there is no use for this"
    if request.log_samples and request.output is None:
        yield "--log-samples: the answers are written beside the scores; say where, with --output FILE"


def _named(given: Mapping[str, object], names: Sequence[str]) -> str:
    return ", ".join(as_written(name, given[name]) for name in names if name in given)


def _look_at(target: str) -> None:
    from qlora_cli.benchmarking.looking import look_at

    look_at(target)


def _look_for_rows(dataset: str) -> None:
    from qlora_cli.benchmarking.named_rows import rows_path

    rows_path(dataset)


def _look_at_overrides(overrides: Sequence[str]) -> None:
    from qlora_cli.benchmarking.named_rows import check_overrides

    check_overrides(overrides)


def _look_at_names(request: EvalRequest) -> None:
    from qlora_cli.evaluation.tasks.index import load_index, task_names
    from qlora_cli.evaluation.tasks.names import choose

    index = load_index(request.task_paths, waiting=_say_it_takes_long)
    check_samples_names(request, [task for name in choose(request.tasks, index) for task in task_names(name, index)])


def _say_it_takes_long() -> None:
    """On stderr: what is on stdout is for others to read, too."""
    from qlora_cli.console import make_console, show_line

    show_line(make_console(stderr=True), "", "finding out which tasks lm-eval has; once, for some seconds …", "dim")


def _attempt(check: Callable[[], object]) -> list[str]:
    """What a check refuses, as a list of nothing or of its message."""
    try:
        check()
    except RequestError as error:
        return [str(error)]
    return []


def _raise_all(problems: Sequence[str]) -> None:
    if problems:
        raise RequestError("\n".join(problems))


def _no_folder(option: str, path: Path) -> Iterator[str]:
    """Why this is no folder to read, as a message or none."""
    try:
        if path.is_dir():
            return
        if path.exists():
            yield f"{option}: {shown_path(path)} is a file; expected a folder"
        else:
            yield f"{option}: {shown_path(path)}: there is no such folder{near_name(path.absolute())}"
    except OSError as error:
        yield f"{option}: {str(path)[:200]}: cannot be looked up: {error.strerror or error}"


def _set_up(request: EvalRequest, *, progress: bool) -> None:
    from qlora_cli.commands.libraries import DATA_OF_TASKS, set_up_libraries
    from qlora_cli.merging.adapters.peek import named_sources

    names = [request.target, *named_sources(Path(request.target))]
    names += [name for name in (request.base_model, request.dataset) if name is not None]
    if request.tasks and request.data_root is None:
        names.append(DATA_OF_TASKS)
    set_up_libraries(names, progress=progress, rows=True)
