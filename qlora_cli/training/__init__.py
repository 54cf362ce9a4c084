"""One training run: loss, optimizer, loop, checkpoints, and the folder that records it."""
