"""Folding an adapter into weights, and showing that the result is the model that was trained."""
