"""Fingerprints of flat buffers, by which an engine notices that somebody else has written into one.

`fingerprints_in_torch` is the reference; the kernel in Triton, which needs one launch for all buffers, gives the same
numbers.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from parallel.ops.kernels.table import is_fused

COLUMNS = 32_749  # a prime: no row of a matrix is as long as a multiple of it
FEW = 2**15  # words that are weighted one by one
MIXERS = (-7046029254386353131, -4658895280553007687)  # 64-bit odd constants of splitmix64
HALF = 2**32 - 1


def fingerprint(flat: Tensor) -> Tensor:
    """Return the fingerprint of one buffer, an int64 scalar."""
    return fingerprints([flat])[0]


def fingerprints(flats: Sequence[Tensor]) -> Tensor:
    """Return the fingerprint of each buffer flat[n], int64 [len(flats)] on their device; the host does not wait.

    It changes where any bits of the buffer change. A fingerprint is a sum of 32-bit words, modulo 2**64, each of them
    multiplied by a pseudorandom weight of 64 bits. A long buffer is read once: the rows of its 64-bit words
    [rows, COLUMNS] are added up, and the sums weighted. So two words that change places, COLUMNS · k apart, are
    not noticed. The bytes of a buffer, n · itemsize, are a multiple of 8, as in chunks.
    """
    if not flats:
        return torch.empty(0, dtype=torch.int64)
    if is_fused("fingerprint", flats[0]):
        from parallel.ops.kernels.fingerprint_triton import launch_fingerprints  # imports Triton

        return launch_fingerprints(flats, weights(flats[0].device), COLUMNS, MIXERS)
    return fingerprints_in_torch(flats)


def fingerprints_in_torch(flats: Sequence[Tensor]) -> Tensor:
    """Return what `fingerprints` does, for at least one buffer.

    A long buffer is added up by one kernel. All buffers are weighted together: a GPU takes longer to start kernels than
    to read the sums.
    """
    sums = [added_up(flat) for flat in flats]
    by_length: dict[int, list[Tensor]] = {}
    for x in sums:
        by_length.setdefault(len(x), []).append(x)
    # No list of places: as an index it would be copied to the device, for which the host waits.
    found = {length: iter(weighted(torch.stack(same)).unbind()) for length, same in by_length.items()}
    return torch.stack([next(found[len(x)]) for x in sums])


def added_up(flat: Tensor) -> Tensor:
    """Return the words of a short buffer, and the sums of a long one's, int64 [at most FEW].

    The number of rows is odd, so that the sum changes if the sign bits of all words do. The rest is added with weights.
    """
    words = flat.detach().view(torch.int64)
    if len(words) <= FEW:
        return words
    num_rows = (len(words) // COLUMNS - 1) // 2 * 2 + 1
    total: Tensor = words[: num_rows * COLUMNS].view(num_rows, COLUMNS).sum(0)
    for part, mixer in zip(words[num_rows * COLUMNS :].split(COLUMNS), MIXERS, strict=False):
        total[: len(part)].add_(part, alpha=mixer)
    return total


def weighted(words: Tensor) -> Tensor:
    """Return the weighted sum of each row, words[n, at most FEW] -> [n]. The words are overwritten."""
    low, high = weights(words.device)[:, : words.shape[1]]
    upper = (words >> 32).mul_(high)
    return words.bitwise_and_(HALF).mul_(low).add_(upper).sum(1)


@cache
def weights(device: torch.device) -> Tensor:
    """Return pseudorandom odd int64 numbers [2, FEW], the same on every rank."""
    first, second = MIXERS
    x = torch.arange(1, 2 * FEW + 1, device=device) * first
    x = (x ^ (x >> 30)) * second
    return ((x ^ (x >> 27)) | 1).view(2, FEW)
