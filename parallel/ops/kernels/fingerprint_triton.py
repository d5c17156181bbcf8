"""The kernel of `fingerprints`: all buffers in one launch, each read once.

A program adds up some columns of the rows of one buffer, as `added_up` does, weights the sums as `weighted` does, and
adds them to the buffer's fingerprint. All of it is arithmetic of integers modulo 2**64, so the order does not matter:
the numbers are those of the reference, to the last bit. Rows begin at odd words, so a thread reads 8 bytes at a time;
the rows of a tile are side by side in a warp's registers, so that enough reads are in flight.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.ops.kernels.launch import launch
from parallel.ops.kernels.pointers import table_of

WORDS, ROWS, WARPS = 64, 32, 4
"""The columns of a program, the rows that it reads at a time, and its warps: one buffer has four programs for each
multiprocessor of an H200, which keep enough reads in flight."""


def launch_fingerprints(flats: Sequence[Tensor], weights: Tensor, columns: int, mixers: tuple[int, int]) -> Tensor:
    """Return the fingerprint of each buffer, int64 [len(flats)], with weights [2, words that are weighted]."""
    device, few = weights.device, weights.shape[1]
    places = _places(tuple((flat.data_ptr(), flat.nbytes // 8) for flat in flats), device)
    found = torch.zeros(len(flats), dtype=torch.int64, device=device)
    constants = {"COLUMNS": columns, "FEW": few, "FIRST": mixers[0], "SECOND": mixers[1], "WORDS": WORDS, "ROWS": ROWS}
    grid = triton.cdiv(few, WORDS), len(flats)
    launch(_add_up, grid, (places, weights, found), (), constants=constants, num_warps=WARPS)
    return found


@lru_cache(maxsize=4)
def _places(buffers: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return the address and the number of words of each buffer, int64 [n, 2] on the device."""
    return table_of(buffers, device)


@triton.jit
def _add_up(
    places,
    weights,
    found,
    COLUMNS: tl.constexpr,
    FEW: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the columns of a program to the fingerprint of its buffer."""
    buffer = tl.program_id(1)
    words = tl.load(places + 2 * buffer).to(tl.pointer_type(tl.int64))
    num_words = tl.load(places + 2 * buffer + 1)
    columns = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    if num_words <= FEW:
        total = tl.load(words + columns, mask=columns < num_words, other=0)
    else:
        is_column = columns < COLUMNS
        num_rows = (num_words // COLUMNS - 1) // 2 * 2 + 1
        sums = tl.zeros((ROWS, WORDS), dtype=tl.int64)
        for first in range(0, num_rows, ROWS):
            rows = first + tl.arange(0, ROWS).to(tl.int64)
            is_here = (rows < num_rows)[:, None] & is_column[None, :]
            sums += tl.load(words + rows[:, None] * COLUMNS + columns[None, :], mask=is_here, other=0)
        total = tl.sum(sums, 0)
        rest = words + num_rows * COLUMNS
        num_rest = num_words - num_rows * COLUMNS
        total += tl.load(rest + columns, mask=is_column & (columns < num_rest), other=0) * FIRST
        rest += COLUMNS
        total += tl.load(rest + columns, mask=is_column & (columns < num_rest - COLUMNS), other=0) * SECOND
    is_weight = columns < FEW
    low = tl.load(weights + columns, mask=is_weight, other=0)
    high = tl.load(weights + FEW + columns, mask=is_weight, other=0)
    tl.atomic_add(found + buffer, tl.sum((total & 0xFFFFFFFF) * low + (total >> 32) * high, 0))
