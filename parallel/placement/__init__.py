"""Heterogeneous memory: which chunks are on the device, which on the host and which on the disk."""
