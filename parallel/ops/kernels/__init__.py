"""Kernels that are written in Triton, for GPUs; beside each stands its reference in torch, and a function chooses."""
