"""The model that an adapter is for, without its weights, and its weights as training rounded them."""
