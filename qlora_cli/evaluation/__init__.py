"""Scoring a model: lm-evaluation-harness's tasks, prompts and metrics; answers that are ours."""
