"""The base model in 4 bits, the LoRA layers on it, and the adapter on disk."""
