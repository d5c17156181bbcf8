"""Which chunks are at home on the device, and which on the host; and inputs that wait there for their backward."""
