"""A whole evaluation: what is scored, the base beside it, what is written."""
