"""Ranks: where each one stands, the axes they communicate along, and the collectives over an axis."""
