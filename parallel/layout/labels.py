"""The labels of language modelling."""

import torch
from torch import Tensor

IGNORED = -100
"""A label that is not counted in the loss, as in torch and Hugging Face."""


def shift(labels: Tensor) -> Tensor:
    """Return the label of each position, labels[B, S] -> [B, S]: the next token's, and IGNORED at the last position."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
