"""What a person sees of a merge."""
