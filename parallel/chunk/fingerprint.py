"""Fingerprints of flat buffers, by which an engine notices that somebody else has written into one."""

from functools import cache

import torch
from torch import Tensor

FEW = 2**16  # words that are weighted one by one
BYTES = 4096  # of a block on a GPU
ROWS, COLUMNS = 61, 127  # primes: no row of a matrix is as long as a multiple of a block's columns
MIXERS = (-7046029254386353131, -4658895280553007687)  # 64-bit odd constants of splitmix64
HALF = 2**32 - 1


def fingerprint(flat: Tensor) -> Tensor:
    """Return an int64 scalar, on the device of flat[n], that other bits in any place change; the host does not wait.

    It is a sum of 32-bit words, modulo 2**64, with a pseudorandom weight of 64 bits for each. Of a long buffer the
    fingerprint is that of sums over its blocks, for which it is read once. On a GPU these are products of bytes with
    pseudorandom bytes, on tensor cores; on a CPU they are plain sums of columns in blocks of 61 × 127 words, so that
    words which change places within a block, 127 · k places apart, are not noticed. n · itemsize is a multiple of 8, as
    in the buffers of chunks.
    """
    words = flat.detach().view(torch.int64)
    if len(words) <= FEW:
        low, high = _weights(words.device)[:, : len(words)]
        total: Tensor = ((words & HALF) * low + (words >> 32) * high).sum()
        return total
    size, sums_of = (BYTES // 8, products) if words.is_cuda else (ROWS * COLUMNS, sums)
    blocks, rest = words.tensor_split([len(words) // size * size])
    return fingerprint(sums_of(blocks)) * MIXERS[0] + fingerprint(rest)


def sums(words: Tensor) -> Tensor:
    """Return the sums of the columns of all blocks of 61 × 127 words, int64."""
    return words.view(-1, ROWS, COLUMNS).sum(1).flatten()


def products(words: Tensor) -> Tensor:
    """Return eight int32 sums, in four int64 words, of each block of bytes: with other weights of each byte."""
    weights = _weights(words.device).flatten()[: BYTES * 8]
    small = (weights >> 32).remainder(127).to(torch.int8) + 1  # from 1 to 127: no byte may change unnoticed
    found = torch._int_mm(words.view(torch.int8).view(-1, BYTES), small.view(8, BYTES).t())
    return found.view(torch.int64).flatten()


@cache
def _weights(device: torch.device) -> Tensor:
    """Return pseudorandom odd int64 numbers [2, FEW], the same on every rank."""
    first, second = MIXERS
    x = torch.arange(1, 2 * FEW + 1, device=device) * first
    x = (x ^ (x >> 30)) * second
    return ((x ^ (x >> 27)) | 1).view(2, FEW)
