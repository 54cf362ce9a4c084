"""A model's tensors in files: read by rows, written as they are made."""
