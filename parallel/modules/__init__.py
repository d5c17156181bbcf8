"""A user's own `nn.Module` under ZeRO: its layers, its construction in slices, agreement between ranks."""
