"""One paper or one classic in each file."""
