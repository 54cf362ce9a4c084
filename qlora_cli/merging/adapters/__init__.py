"""An adapter on disk: where it is, what it is of, and what it changes."""
