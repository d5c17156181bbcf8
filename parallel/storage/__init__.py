"""The tiers of memory: device, host and disk, and the copies between them."""
