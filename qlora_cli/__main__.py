"""`python -m qlora_cli`, the form that `accelerate launch` and `torchrun` start."""

from qlora_cli.cli import app

app()
