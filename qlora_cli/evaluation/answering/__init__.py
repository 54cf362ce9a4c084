"""How a model is asked: from token ids to log-likelihoods and texts. Knows nothing of tasks."""
