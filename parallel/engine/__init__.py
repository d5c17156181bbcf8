"""The engines, which compose a training step of all parts, and the functions by which a program makes them."""
