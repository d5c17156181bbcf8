"""Optimization: the sums of gradients over ranks, their norm, the optimizers, and optimizer states on every tier."""
