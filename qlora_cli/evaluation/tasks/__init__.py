"""Which tasks there are, and the data they ask about: lm-eval's definitions, rows from the hub or from a folder."""
