"""The activations that are kept for backward: recomputed, or offloaded to the host."""
