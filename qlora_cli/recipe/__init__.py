"""The recipe: what a person asks for, checked before anything heavy is imported."""
