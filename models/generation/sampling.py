"""The choice of the next token: the most likely one, or one that is drawn by the seed, the sample and the position."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.layout.rng import gumbel, seed_of

PARTS_OF_A_ROW = 64


@dataclass(frozen=True)
class Sampling:
    """The options of a draw, which are applied in the order of Hugging Face's processors: temperature, top_k, top_p.

    `temperature`: logits are divided by it; 0 takes the most likely token, whatever the others say. `top_k`: only the k
    most likely tokens can be drawn; None: all. `top_p`: only the most likely tokens whose probabilities together reach
    p (nucleus sampling; Holtzman et al. 2019, arXiv 1904.09751); 1: all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0


class Sampler:
    """Draws tokens from logits[B, V]. A draw depends on the seed, the sample and the position of the new token alone.

    So one seed gives one text in every layout, and with every batch size.
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.key = torch.tensor(seed_of(sampling.seed, "tokens"), device=device)

    def __call__(self, logits: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
        """Return the tokens int64 [B] of logits[B, V], for samples[B] and the positions[B] that they will have."""
        if self.sampling.temperature == 0:
            return index_of_largest(logits)
        scores = filtered(logits, self.sampling)
        tokens = torch.arange(scores.shape[1], device=scores.device)
        return index_of_largest(scores + gumbel(self.key, (samples << 32) + positions, tokens))


def index_of_largest(scores: Tensor) -> Tensor:
    """Return the index of the largest of each row of scores[B, V], the first one among equals, int64 [B].

    Compiled code searches each of some equal parts of a row, and then among their maxima: of one long row a compiler
    makes a loop of a single multiprocessor.
    """
    if not torch.compiler.is_compiling():
        return scores.argmax(-1)
    padded = F.pad(scores, (0, -scores.shape[1] % PARTS_OF_A_ROW), value=-torch.inf)
    parts = padded.unflatten(1, (PARTS_OF_A_ROW, -1))
    part = parts.amax(-1).argmax(-1, keepdim=True)
    found: Tensor = part * parts.shape[2] + parts.argmax(-1).gather(1, part)
    return found.squeeze(1)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return logits[B, V] divided by the temperature, in fp32 at least, −inf where a token cannot be drawn.

    The largest of each row is 0: with a temperature near 0 others become −inf, and no NaN comes of it. Tokens that are
    as likely as the last one that is kept are kept, too.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = (wide - wide.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[1]:
        least = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        ordered = scores.sort(descending=False).values
        is_kept = ordered.softmax(-1).cumsum(-1) > 1 - sampling.top_p
        is_kept[:, -1] = True
        least = ordered.masked_fill(~is_kept, torch.inf).amin(-1, keepdim=True)
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores
