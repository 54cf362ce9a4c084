"""Setting up the libraries that a command is about to import."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from qlora_cli.hub import go_offline_if_unreachable
from qlora_cli.recipe.schema import Recipe

# Stands for what tasks fetch from the hub, which their own names do not say: `mmlu_*` has the look of a path.
DATA_OF_TASKS = "hub/data-of-tasks"


def names_in(recipe: Recipe) -> list[str]:
    """The models and the data that a recipe names: paths, and names on the hub."""
    sources = (*recipe.dataset.train_sources, *recipe.dataset.validation_sources)
    benchmarks = recipe.evaluation.names and recipe.evaluation.data_root is None
    return [recipe.base_model, *(source.path for source in sources), *([DATA_OF_TASKS] if benchmarks else [])]


def set_up_libraries(names: Iterable[str], *, progress: bool, rows: bool = True) -> None:
    """Send the hub's client offline if one of `names` needs it in vain, and quiet the libraries' chatter.

    To be called before they are imported. Ours says what matters, in one voice; their errors still come through, and
    with `progress` the bars of long loads and downloads. Without `rows`, what reads them is left alone: it takes 90 MB.
    """
    go_offline_if_unreachable(names)

    import transformers

    transformers.utils.logging.set_verbosity_error()
    if not progress:
        transformers.utils.logging.disable_progress_bar()
    if rows:
        import datasets

        datasets.utils.logging.set_verbosity_error()
        if not progress:
            datasets.disable_progress_bars()
    for name in ("accelerate", "huggingface_hub"):  # the hub's client logs every retry
        logging.getLogger(name).setLevel(logging.ERROR)
