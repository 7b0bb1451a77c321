"""Reproductions of published results; the loop that trains them is that of the language model."""
