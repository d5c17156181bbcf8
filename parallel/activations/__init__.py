"""What is kept for backward: recomputation, and activations offloaded to the host."""
