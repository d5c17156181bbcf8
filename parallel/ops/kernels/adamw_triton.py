"""The kernel of `adamw`: each program updates one block of elements.

Large tensors have a launch each. The many small ones, biases and norms, have one together: their addresses are in a
table on the device, as in torch's multi-tensor kernels. Both are launched in Triton's own way, which takes the option
of its compiler that the next lines need.

Products are rounded before sums, except where the code says `fma`: so an element's result does not depend on which of
the compiled variants has computed it. What is small is added to what is large last, so that an update has about one
rounding.
"""

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from parallel.config import OptimizerConfig
from parallel.ops.kernels.elements import Elements, Step
from parallel.ops.kernels.pointers import table_of

BLOCK, WARPS = 1024, 8  # 4 elements of a thread: with 8 of them an H200 moves 3.6 TB/s instead of 4.1
SMALLEST_BLOCK = 256  # of elements with noise in short rows: an element's place is cheap if a block has no whole row
LARGE = 2**20  # elements: a launch of their own takes longer than the host needs for it
FIELDS = 14  # numbers of a row of the table
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def launch_update(many: Sequence[Elements], step: Step, config: OptimizerConfig) -> None:
    """Update all of these elements: see `update_fused`."""
    groups: dict[object, list[Elements]] = {}
    for elements in many:
        tensors = (elements.gradient, *elements.states, elements.own)
        key = tuple(None if x is None else x.dtype for x in tensors), elements.noise is None
        groups.setdefault(key, []).append(elements)
    for group in groups.values():
        small = [elements for elements in group if len(elements.gradient) < LARGE]
        if len(small) > 1:
            _launch_for_many(small, step, config)
        for elements in group if len(small) == 1 else [one for one in group if len(one.gradient) >= LARGE]:
            _launch(elements, step, config)


def _launch(elements: Elements, step: Step, config: OptimizerConfig) -> None:
    """Launch the kernel for elements of their own."""
    noise, size = elements.noise, len(elements.gradient)
    if not size:
        return
    block = BLOCK if noise is None else min(BLOCK, max(SMALLEST_BLOCK, triton.next_power_of_2(noise.width + 1) // 2))
    tables, width, offsets = (
        ((None, None), None, (None,) * 4) if noise is None else (noise.tables, noise.width, noise.offsets)
    )
    _update[triton.cdiv(size, block),](
        *(elements.gradient, *elements.states, elements.own),
        size,
        *(step.factor, step.found_inf, *elements.factors(step.lr, config.betas)),
        *(1 - config.betas[0], 1 - config.betas[1], config.eps),
        *(*tables, width, *offsets),
        IS_WIDE=noise is not None and noise.width >= block,
        TABLE=1 if noise is None else len(noise.tables[0]) // 2,
        BLOCK=block,
        num_warps=WARPS * block // BLOCK,
        enable_fp_fusion=False,
    )


def _launch_for_many(many: Sequence[Elements], step: Step, config: OptimizerConfig) -> None:
    """Launch one kernel for all of these elements, of the same dtypes."""
    one = many[0]
    tables = (None, None) if one.noise is None else one.noise.tables
    _update_many[triton.cdiv(max(len(elements.gradient) for elements in many), BLOCK), len(many)](
        table_of([_row(elements, step, config) for elements in many], one.gradient.device),
        *(step.factor, step.found_inf, 1 - config.betas[0], 1 - config.betas[1], config.eps),
        *tables,
        GRADIENT=DTYPES[one.gradient.dtype],
        MOMENT=DTYPES[one.states[1].dtype],
        OWN=None if one.own is None else DTYPES[one.own.dtype],
        FIELDS=FIELDS,
        TABLE=1 if one.noise is None else len(one.noise.tables[0]) // 2,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )


def _row(elements: Elements, step: Step, config: OptimizerConfig) -> list[int]:
    """Return a row of the table: addresses and the size, then factors, then where the noise is."""
    addresses = [x.data_ptr() for x in (elements.gradient, *elements.states)]
    addresses.append(0 if elements.own is None else elements.own.data_ptr())
    factors = struct.unpack("3q", struct.pack("3d", *elements.factors(step.lr, config.betas)))
    noise = (0,) * 5 if elements.noise is None else (elements.noise.width, *elements.noise.offsets)
    return [*addresses, len(elements.gradient), *factors, *noise]


@triton.jit(do_not_specialize=["width", "row_1", "column_1", "row_2", "column_2"])
def _update(
    gradient,
    master,
    first,
    second,
    own,
    size,
    factor,
    found_inf,
    decay,  # lr · decay
    rate,  # lr / (1 − β1^t)
    root,  # 1 / √(1 − β2^t)
    weight_1,  # 1 − β1
    weight_2,
    eps,
    permutation,  # what follows is None where moments are fp32
    numbers,
    width,
    row_1,
    column_1,
    row_2,
    column_2,
    IS_WIDE: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update the block of this program, of elements of their own or of a row of `_update_many`."""
    if tl.load(found_inf) != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        lanes = tl.arange(0, BLOCK)
        mask = lanes < size - start
        at = start + lanes
        g = tl.load(gradient + at, mask=mask, other=0.0).to(tl.float32) * tl.load(factor).to(tl.float32)
        w = tl.load(master + at, mask=mask, other=0.0)
        m = tl.load(first + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(second + at, mask=mask, other=0.0).to(tl.float32)

        m = tl.fma(weight_1, g - m, m)
        v += tl.fma(weight_2 * g, g, -(weight_2 * v))
        change = tl.div_rn(rate * m, tl.fma(tl.sqrt_rn(v), root, eps))
        w -= tl.fma(decay, w, change)

        tl.store(master + at, w, mask=mask)
        if own is not None:
            tl.store(own + at, w.to(own.dtype.element_ty), mask=mask)
        if permutation is not None:
            row = start // width  # of the block's first element
            columns = (start - row * width).to(tl.int32) + lanes
            if IS_WIDE:  # a block that is no longer than a row has elements of two rows at most
                below = (columns >= width).to(tl.int32)
            else:  # columns // width, in fp32: exact below 2²², since + 0.5 keeps away from multiples of the width
                below = ((columns.to(tl.float32) + 0.5) * tl.div_rn(1.0, width.to(tl.float32))).to(tl.int32)
            columns -= below * width
            row = row.to(tl.int32)
            m = _rounded(m, permutation, numbers, row + row_1, row_1 >= 0, below, columns + column_1, IS_WIDE, TABLE)
            v = _rounded(v, permutation, numbers, row + row_2, row_2 >= 0, below, columns + column_2, IS_WIDE, TABLE)
        tl.store(first + at, m.to(first.dtype.element_ty), mask=mask)
        tl.store(second + at, v.to(second.dtype.element_ty), mask=mask)


@triton.jit
def _update_many(
    table,
    factor,
    found_inf,
    weight_1,
    weight_2,
    eps,
    permutation,
    numbers,
    GRADIENT: tl.constexpr,
    MOMENT: tl.constexpr,
    OWN: tl.constexpr,
    FIELDS: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update a block of one row of the table."""
    row = table + tl.program_id(1) * FIELDS
    size = tl.load(row + 5)
    if tl.program_id(0) * BLOCK < size:
        own = None
        if OWN is not None:
            own = tl.load(row + 4).to(tl.pointer_type(OWN))
        _update(
            tl.load(row).to(tl.pointer_type(GRADIENT)),
            tl.load(row + 1).to(tl.pointer_type(tl.float32)),
            tl.load(row + 2).to(tl.pointer_type(MOMENT)),
            tl.load(row + 3).to(tl.pointer_type(MOMENT)),
            own,
            size,
            factor,
            found_inf,
            tl.load(row + 6).to(tl.float64, bitcast=True).to(tl.float32),
            tl.load(row + 7).to(tl.float64, bitcast=True).to(tl.float32),
            tl.load(row + 8).to(tl.float64, bitcast=True).to(tl.float32),
            weight_1,
            weight_2,
            eps,
            permutation,
            numbers,
            tl.load(row + 9).to(tl.int32),
            tl.load(row + 10).to(tl.int32),
            tl.load(row + 11).to(tl.int32),
            tl.load(row + 12).to(tl.int32),
            tl.load(row + 13).to(tl.int32),
            False,
            TABLE,
            BLOCK,
        )


@triton.jit
def _rounded(x, permutation, numbers, row, has_rows, below, columns, IS_WIDE: tl.constexpr, TABLE: tl.constexpr):
    """Return x rounded to bf16, in fp32, with the noise of these columns, `below` rows below `row`: see
    `optim.rounding`.
    """
    if IS_WIDE:
        here = tl.load(permutation + (row & (TABLE - 1)), mask=has_rows, other=0)
        next_one = tl.load(permutation + ((row + 1) & (TABLE - 1)), mask=has_rows, other=0)
        offsets = tl.where(below > 0, next_one, here)
    else:
        offsets = tl.load(permutation + ((row + below) & (TABLE - 1)), mask=(below >= 0) & has_rows, other=0)
    noise = tl.load(numbers + ((offsets + columns) & (TABLE - 1)))
    bits = (x.to(tl.int32, bitcast=True) + noise) & -65536
    return bits.to(tl.float32, bitcast=True)
