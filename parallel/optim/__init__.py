"""From a gradient to updated weights: sums over ranks, the norm, the optimizers, their states on every tier."""
