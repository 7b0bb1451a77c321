"""The main example and the demo: a recurrent language model, and the loop that trains it."""
