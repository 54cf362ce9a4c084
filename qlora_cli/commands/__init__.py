"""One thin file per command: parse, call one function below, show the result, pick the exit code."""
