"""Chunks: parameters in flat buffers, the unit that is communicated, updated and moved between tiers."""
