"""Random numbers that depend on the model and not on its layout.

A weight is drawn from its name and the seed; a dropout mask is a function of an element's global coordinates. So one
seed gives one model, and one training run, in every layout. No generator has a state that could differ between ranks.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.layout.layout import box_shape, slices
from parallel.layout.sources import Box
from parallel.ops.kernels.norm import Mask

ROWS_PER_BLOCK = 64
"""The number of rows of a weight that share one random generator. Another value gives other weights."""


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed: the first bits of the SHA-256 hash of the parts' text."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_normal(shape: tuple[int, ...], box: Box, std: float, *key: object) -> Tensor:
    """Return box `box` of a normal tensor of `shape` that is a function of the key alone: fp32, on the host.

    Rows are drawn in blocks of ROWS_PER_BLOCK, each from a generator whose seed is the hash of the key and the block's
    number. So a rank draws only the blocks that its box meets, always whole rows of them, and as many blocks at once as
    torch has threads.
    """
    drawn = torch.empty(box_shape(box))
    start, stop = box[0]

    def draw(block: int) -> None:
        first = block * ROWS_PER_BLOCK
        last = min(first + ROWS_PER_BLOCK, shape[0])
        generator = torch.Generator().manual_seed(seed_of(*key, block))
        rows = torch.empty(last - first, *shape[1:]).normal_(0, std, generator=generator)
        mine = (max(start, first), min(stop, last))
        drawn[mine[0] - start : mine[1] - start] = rows[slices(((mine[0] - first, mine[1] - first), *box[1:]))]

    blocks = range(start // ROWS_PER_BLOCK, -(-stop // ROWS_PER_BLOCK))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, blocks))
    return drawn


@dataclass(frozen=True)
class Dropout:
    """A dropout of x[..., R, C]: the probability p, a key, and the global coordinates rows[..., R] and columns[C]."""

    p: float
    key: Tensor
    rows: Tensor
    columns: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Return what `dropout` returns."""
        return dropout(x, self.p, self.key, self.rows, self.columns)

    def mask(self) -> Mask:
        """Return its mask for a kernel, which draws the same bits."""
        rows, columns = self.rows.flatten().contiguous(), self.columns.contiguous()
        return Mask(self.key, rows, columns, dropout_bound(self.p), 1 / (1 - self.p))


def dropout(x: Tensor, p: float, key: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return x[..., R, C] with each element zero with probability p, and the others multiplied by 1/(1 − p)."""
    return x.masked_fill(dropout_mask(p, key, rows, columns), 0) * (1 / (1 - p))


def dropout_mask(p: float, key: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return a bool tensor [..., R, C] whose elements are True, which means dropped, with probability p.

    rows[..., R] and columns[C] are the elements' global coordinates, key is a scalar made by `seed_of`, all int64. So
    an element's value does not depend on the rank that holds it.
    """
    return random_bits(key, rows, columns) < dropout_bound(p)


def dropout_bound(p: float) -> int:
    """Return the number below which random 32 bits are, as an int32, with probability p."""
    return min(round(p * 2**32) - 2**31, 2**31 - 1)


def gumbel(key: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return numbers of the standard Gumbel distribution, fp32 [..., R, C]: functions of key, row and column.

    An index at which logits plus these are largest is drawn from softmax(logits) (Gumbel 1954; Maddison et al. 2014,
    arXiv 1411.0030). It changes only where the two largest sums are as close as the logits are uncertain.
    """
    uniform = (random_bits(key, rows, columns).double() + (2**31 + 0.5)) * 2**-32
    return -(-uniform.log()).log().float()


def random_bits(key: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return random 32 bits for each element, int32 [..., R, C], as a function of key, rows[..., R] and columns[C].

    Rows and columns are hashed separately, and combined for each of the R·C elements by a few 32-bit operations.
    """
    bits = mix64(rows + key).to(torch.int32).unsqueeze(-1) ^ mix64(columns ^ key).to(torch.int32)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        high = bits >> shift
        high &= 2 ** (32 - shift) - 1
        bits ^= high
        bits *= factor
    return bits


def mix64(z: Tensor) -> Tensor:
    """Return the hash of each 64-bit element by SplitMix64's finalizer.

    It is in Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", fig. 16.
    """
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & (2**33 - 1))
