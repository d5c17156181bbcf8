"""Fingerprints of flat buffers, by which an engine notices that somebody else has written into one."""

from functools import cache

import torch
from torch import Tensor

FEW = 2**16  # words that are weighted one by one
ROWS, COLUMNS = 127, 61  # primes: no row of a matrix is as long as a multiple of a block's columns
MIXERS = (-7046029254386353131, -4658895280553007687)  # 64-bit odd constants of splitmix64


def fingerprint(flat: Tensor) -> Tensor:
    """Return an int64 scalar, on the device of flat[n], that other bits in any place change; the host does not wait.

    It is a sum of 32-bit words, modulo 2**64, with a pseudorandom weight of 64 bits for each. A long buffer is read
    once: words are added up in blocks of 127 × 61 before they are weighted, so that words which change places within a
    block, 61 · k places apart, are not noticed. n · itemsize is a multiple of 4, as in the buffers of chunks.
    """
    words = flat.detach().view(torch.int32)
    if len(words) <= FEW:
        return (words * _weights(words.device)[: len(words)]).sum()
    num_blocks = len(words) // (ROWS * COLUMNS)
    blocks, rest = words.tensor_split([num_blocks * ROWS * COLUMNS])
    sums = blocks.view(num_blocks, ROWS, COLUMNS).sum(1).flatten()
    return fingerprint(sums) * MIXERS[0] + fingerprint(rest)


@cache
def _weights(device: torch.device) -> Tensor:
    """Return pseudorandom odd int64 numbers [FEW], the same on every rank."""
    first, second = MIXERS
    x = torch.arange(1, FEW + 1, device=device) * first
    x = (x ^ (x >> 30)) * second
    return (x ^ (x >> 27)) | 1
