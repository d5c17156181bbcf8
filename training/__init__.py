"""A training run: checks before it, the loop, what is printed and drawn, what is left behind. `launch.py` drives it."""
