"""Heterogeneous memory: which chunks are on the device, on the host and on the disk."""
