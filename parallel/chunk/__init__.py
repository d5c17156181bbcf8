"""Parameters in flat buffers: the unit that is communicated, updated and placed."""
