"""Fingerprints of flat buffers, by which an engine notices that somebody else has written into one."""

from functools import cache

import torch
from torch import Tensor

FEW = 2**18  # words that are weighted one by one
ROWS, COLUMNS = 61, 8191  # primes: no row of a matrix is as long as a multiple of a block's columns
MIXERS = (-7046029254386353131, -4658895280553007687)  # 64-bit odd constants of splitmix64
HALF = 2**32 - 1


def fingerprint(flat: Tensor) -> Tensor:
    """Return an int64 scalar, on the device of flat[n], that other bits in any place change; the host does not wait.

    It is a sum of 32-bit words, modulo 2**64, with a pseudorandom weight of 64 bits for each. A long buffer is read
    once: words of 64 bits are added up in blocks of 61 × 8191 before they are weighted, so that those which change
    places within a block, 8191 · k places apart, are not noticed. Long rows are what a GPU adds up at the speed of its
    memory. n · itemsize is a multiple of 8, as in the buffers of chunks.
    """
    words = flat.detach().view(torch.int64)
    if len(words) <= FEW:
        low, high = _weights(words.device)[:, : len(words)]
        total: Tensor = ((words & HALF) * low + (words >> 32) * high).sum()
        return total
    num_rows = len(words) // COLUMNS
    num_blocks = num_rows // ROWS
    blocks, rows, rest = words.tensor_split([num_blocks * ROWS * COLUMNS, num_rows * COLUMNS])
    sums = blocks.view(num_blocks, ROWS, COLUMNS).sum(1).flatten()
    first, second = MIXERS
    return fingerprint(sums) * first + fingerprint(rows.view(-1, COLUMNS).sum(0)) * second + fingerprint(rest)


@cache
def _weights(device: torch.device) -> Tensor:
    """Return pseudorandom odd int64 numbers [2, FEW], the same on every rank."""
    first, second = MIXERS
    x = torch.arange(1, 2 * FEW + 1, device=device) * first
    x = (x ^ (x >> 30)) * second
    return ((x ^ (x >> 27)) | 1).view(2, FEW)
