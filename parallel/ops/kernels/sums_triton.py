"""The kernels of `sums`.

A sum of squares takes two launches, for one tensor as for many. In the first, `PARTS` programs share a tensor: each
reads every so many-th block, adds the squares of each lane in fp32 for a few blocks, and these sums in fp64. The second
adds up the partial sums of each tensor.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.ops.kernels.launch import launch
from parallel.ops.kernels.pointers import are_aligned, table_of

PARTS = 512  # programs of a tensor
BLOCK, BLOCKS = 4096, 2  # elements that a program reads at once, and the blocks of which a lane is added in fp32
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def launch_sums_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of each tensor: see `sums_of_squares`."""
    device = tensors[0].device
    partial = torch.empty(len(tensors), PARTS, dtype=torch.float64, device=device)
    _launch(tensors, partial)
    found = torch.empty(len(tensors), dtype=torch.float64, device=device)
    launch(_add_up, (len(tensors),), (partial, found), (), constants=dict(PARTS=PARTS), num_warps=4)
    return found


def _launch(tensors: Sequence[Tensor], partial: Tensor) -> None:
    """Launch one kernel for the tensors of each dtype and alignment, the largest first: the last programs are short.

    One tensor takes the same kernel as many: a compiler adds in another order where it knows more of a size.
    """
    rows: dict[tuple[torch.dtype, bool], list[int]] = {}
    for i in sorted(range(len(tensors)), key=lambda i: -tensors[i].numel()):
        rows.setdefault((tensors[i].dtype, are_aligned([tensors[i]])), []).append(i)
    table = table_of(
        [(tensors[i].data_ptr(), tensors[i].numel(), i) for indices in rows.values() for i in indices], partial.device
    )
    first = 0
    for (dtype, is_aligned), indices in rows.items():
        constants = dict(DTYPE=DTYPES[dtype], ALIGNED=is_aligned, BLOCK=BLOCK, BLOCKS=BLOCKS)
        launch(_squares, (PARTS, len(indices)), (table[first:], partial), (), constants=constants, num_warps=8)
        first += len(indices)


@triton.jit
def _squares(
    table,  # of each tensor its address, its size, and its row in `partial`
    partial,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write the partial sum of a program of one of many tensors."""
    part = tl.program_id(0)
    row = table + tl.program_id(1) * 3
    x = tl.load(row).to(tl.pointer_type(DTYPE))
    size = tl.load(row + 1)
    out = tl.load(row + 2)
    if ALIGNED:
        x = tl.multiple_of(x, 16)
        size = tl.multiple_of(size, 16)
    parts = tl.num_programs(0)
    tl.store(partial + out * parts + part, _partial_squares(x, size, part, parts, BLOCK, BLOCKS))


@triton.jit
def _partial_squares(x, size, part, parts, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Return the sum of squares, in fp64, of the blocks of x that belong to program `part` of `parts`."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    step = BLOCK * BLOCKS
    for start in range(part.to(tl.int64) * step, size, parts.to(tl.int64) * step):
        sums = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(BLOCKS):
            first = start + k * BLOCK
            values = tl.load(x + first + lanes, mask=lanes < size - first, other=0.0).to(tl.float32)
            sums += values * values
        total += sums.to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _add_up(partial, found, PARTS: tl.constexpr):
    """Add up the partial sums of a tensor."""
    row = tl.program_id(0)
    sums = tl.load(partial + row * PARTS + tl.arange(0, PARTS))
    tl.store(found + row, tl.sum(sums, 0))
