"""How near a model is to the one that was trained."""
