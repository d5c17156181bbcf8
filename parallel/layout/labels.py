"""Labels of language modelling."""

import torch
from torch import Tensor

IGNORED = -100  # a label that is not counted, as in torch and Hugging Face


def shift(labels: Tensor) -> Tensor:
    """labels[B, S] -> the label of each position: the next token, and for the last position none."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
