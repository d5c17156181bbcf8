"""Randomness that belongs to the model, not to the layout.

A weight is drawn from its name and the seed; a dropout mask is a function of the element's global coordinates. So one
seed gives one model, and one training run, in every layout: nothing here has a state that a rank could be ahead of or
behind in.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from parallel.layout.layout import Box, box_shape, slices

ROWS_A_BLOCK = 64


def seed_of(*parts: object) -> int:
    """A 63-bit seed from the parts' text, by SHA-256."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_normal(shape: tuple[int, ...], box: Box, std: float, *key: object) -> Tensor:
    """Box `box` of a normal tensor of `shape` whose every element follows from the key: fp32, on the host.

    Rows are drawn in blocks, each from a generator of its own: a rank draws whole rows, but little more than those it
    keeps a part of, and as many blocks at once as torch has threads.
    """
    drawn = torch.empty(box_shape(box))
    start, stop = box[0]

    def draw(block: int) -> None:
        first = block * ROWS_A_BLOCK
        last = min(first + ROWS_A_BLOCK, shape[0])
        generator = torch.Generator().manual_seed(seed_of(*key, block))
        rows = torch.empty(last - first, *shape[1:]).normal_(0, std, generator=generator)
        mine = (max(start, first), min(stop, last))
        drawn[mine[0] - start : mine[1] - start] = rows[slices(((mine[0] - first, mine[1] - first), *box[1:]))]

    blocks = range(start // ROWS_A_BLOCK, -(-stop // ROWS_A_BLOCK))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, blocks))
    return drawn


def dropout(x: Tensor, p: float, key: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Zero each element of x[..., R, C] with probability p and scale the others by 1/(1 − p)."""
    return x.masked_fill(dropped(p, key, rows, columns), 0) * (1 / (1 - p))


def dropped(p: float, key: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """bool [..., R, C], true with probability p.

    rows[..., R] and columns[C] are the elements' global coordinates, key is a scalar made by `seed_of`, all int64: an
    element meets the same fate on whatever rank it lies. The two are hashed apart and combined at full size by a
    handful of 32-bit operations.
    """
    bits = mix64(rows + key).to(torch.int32).unsqueeze(-1) ^ mix64(columns ^ key).to(torch.int32)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        high = bits >> shift
        high &= 2 ** (32 - shift) - 1
        bits ^= high
        bits *= factor
    return bits < min(round(p * 2**32) - 2**31, 2**31 - 1)


def mix64(z: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", fig. 16)."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & (2**33 - 1))
