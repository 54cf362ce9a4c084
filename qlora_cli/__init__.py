"""Fine-tune language models in 4 bits from a YAML recipe."""

__version__ = "0.1.0"
