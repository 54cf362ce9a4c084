"""What a model folder holds beside its weights."""
