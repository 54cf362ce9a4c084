"""`python -m qlora_cli`, the form that `accelerate launch` and `torchrun` start."""

from __future__ import annotations

from qlora_cli.cli import app
from qlora_cli.training.interrupt import ignore_to_the_end


def main() -> None:
    """The command, to the end of its process."""
    try:
        app()
    finally:
        ignore_to_the_end()


if __name__ == "__main__":
    main()
