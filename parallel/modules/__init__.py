"""A user's own `nn.Module` under ZeRO: its layers, parameters and buffers, its sharded construction, and its passes."""
