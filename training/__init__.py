"""A training run: the checks before it, the loop, what it prints, and the files it leaves."""
