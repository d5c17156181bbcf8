"""Which chunks are at home on the device, and which on the host."""
