"""A training step, composed: the engines, and how a user's program reaches them."""
