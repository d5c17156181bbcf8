"""The kernels of `activation`: elementwise in fp32 registers, each tensor read once and written once.

The backward of `activated` has the programs of a column sum: see `column_sum_triton`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from parallel.ops.fp8 import E4M3
from parallel.ops.kernels.cast import EightBits
from parallel.ops.kernels.column_sum_triton import add_parts, parts_of
from parallel.ops.kernels.eight_bits_triton import NO_CAST, constants_of, store
from parallel.ops.kernels.launch import launch

ROWS, COLUMNS, WARPS = 2, 1024, 4  # a tile of a kernel that sums nothing
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 32, 128, 4  # a tile of one that sums columns
IS_INTERPRETED = tl.constexpr(isinstance(store, InterpretedFunction))


def launch_activated(u: Tensor, bias: Tensor | None, name: str, cast: EightBits | None = None) -> Tensor:
    """Return act(u + bias) of a contiguous u[..., F] and bias[F], in 8 bits if it is to be cast."""
    f = torch.empty_like(u, dtype=u.dtype if cast is None else E4M3)
    _launch_forward(_activate, (u, bias, f), name, cast)
    return f


def launch_activated_backward(
    df: Tensor, kept: Tensor, bias: Tensor | None, name: str, *, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """Return du[..., F] and, with `sums`, the bias's gradient [F].

    `kept` is u. For relu it may be f, without a bias.
    """
    du = torch.empty_like(df)
    num_rows, num_columns = _rows_and_columns(df)
    rows, columns = (SUM_ROWS, SUM_COLUMNS)
    blocks = triton.cdiv(num_columns, columns)
    parts, rows_of_part = parts_of(num_rows, blocks, rows) if blocks else (1, rows)
    partial = torch.empty(parts if sums else 0, num_columns, dtype=torch.float32, device=df.device)
    if blocks:
        tensors, numbers = (df, kept, bias, du, partial if sums else None), (num_rows, num_columns, rows_of_part)
        constants = dict(KIND=name, ROWS=rows, COLUMNS=columns)
        launch(_activate_backward, (blocks, parts), tensors, numbers, constants=constants, num_warps=SUM_WARPS)
    return du, add_parts(partial, df.dtype) if sums else None


def launch_gated(x: Tensor, name: str, cast: EightBits | None = None) -> Tensor:
    """Return act(gate) · up of a contiguous x[..., 2F], in 8 bits if it is to be cast."""
    f = x.new_empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype if cast is None else E4M3)
    _launch_forward(_gate, (x, f), name, cast)
    return f


def launch_gated_backward(df: Tensor, x: Tensor, name: str) -> Tensor:
    """Return dx[..., 2F] of contiguous df[..., F] and x[..., 2F]."""
    dx = torch.empty_like(x)
    num_rows, num_columns = _rows_and_columns(df)
    if df.numel():
        constants = dict(KIND=name, ROWS=ROWS, COLUMNS=COLUMNS)
        grid, numbers = _tiles(num_rows, num_columns), (num_rows, num_columns)
        launch(_gate_backward, grid, (df, x, dx), numbers, constants=constants, num_warps=WARPS)
    return dx


def _launch_forward(kernel: Any, tensors: tuple[Tensor | None, ...], name: str, cast: EightBits | None) -> None:
    """Launch a kernel that computes f, the last of these tensors."""
    f = tensors[-1]
    assert f is not None
    num_rows, num_columns = _rows_and_columns(f)
    if f.numel():
        constants = dict(KIND=name, ROWS=ROWS, COLUMNS=COLUMNS) | constants_of(E4M3)
        grid, numbers = _tiles(num_rows, num_columns), (num_rows, num_columns)
        launch(kernel, grid, (*tensors, *(cast or NO_CAST)), numbers, constants=constants, num_warps=WARPS)


def _rows_and_columns(x: Tensor) -> tuple[int, int]:
    columns = x.shape[-1]
    return x.numel() // max(1, columns), columns


def _tiles(num_rows: int, num_columns: int) -> tuple[int, int]:
    """Return the grid. Rows come first: there may be more than 65,535 of their tiles."""
    return triton.cdiv(num_rows, ROWS), triton.cdiv(num_columns, COLUMNS)


@triton.jit
def _activate(
    u, bias, f, scale, amax, num_rows, num_columns,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of f = act(u + bias)."""
    rows, columns, mask = _tile(num_rows, num_columns, ROWS, COLUMNS)
    at = rows[:, None] * num_columns + columns[None, :]
    x = tl.load(u + at, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    store(f + at, _value(x, KIND).to(u.dtype.element_ty), mask, scale, amax, ROUNDS)


@triton.jit
def _activate_backward(
    df,
    kept,
    bias,
    du,
    sums,
    num_rows,
    num_columns,
    rows_of_part,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute du = df · act'(u + bias) of some columns and the rows of a part, and sum its columns."""
    part = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < num_columns
    first = part * rows_of_part
    last = tl.minimum(first + rows_of_part, num_rows)
    added = tl.zeros((COLUMNS,), tl.float32)
    if bias is not None:
        added = tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (rows < last)[:, None] & is_column[None, :]
        at = rows[:, None] * num_columns + columns[None, :]
        dy = tl.load(df + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(kept + at, mask=mask, other=0.0).to(tl.float32) + added[None, :]
        # Outside the tile dy is 0, and dx, too, unless the bias makes all of its column NaN.
        dx = tl.where(x <= 0.0, 0.0, dy) if KIND == "relu" else dy * _slope(x, KIND)
        tl.store(du + at, dx.to(du.dtype.element_ty), mask=mask)
        if sums is not None:
            total += dx
    if sums is not None:
        tl.store(sums + part * num_columns + columns, tl.sum(total, 0), mask=is_column)


@triton.jit
def _gate(
    x, f, scale, amax, num_rows, num_columns,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of f = act(gate) · up."""
    rows, columns, mask = _tile(num_rows, num_columns, ROWS, COLUMNS)
    gates = x + rows[:, None] * (2 * num_columns) + columns[None, :]
    gate = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gates + num_columns, mask=mask, other=0.0).to(tl.float32)
    at = rows[:, None] * num_columns + columns[None, :]
    product = _value(gate, KIND) * up
    store(f + at, product.to(x.dtype.element_ty), mask, scale, amax, ROUNDS)


@triton.jit
def _gate_backward(df, x, dx, num_rows, num_columns, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute a tile of dgate = df · up · act'(gate), and one of dup = df · act(gate)."""
    rows, columns, mask = _tile(num_rows, num_columns, ROWS, COLUMNS)
    at_gate = rows[:, None] * (2 * num_columns) + columns[None, :]
    dy = tl.load(df + rows[:, None] * num_columns + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x + at_gate, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + at_gate + num_columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + at_gate, (dy * up * _slope(gate, KIND)).to(dx.dtype.element_ty), mask=mask)
    tl.store(dx + at_gate + num_columns, (dy * _value(gate, KIND)).to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _tile(num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the rows and columns of this program's tile, and which of its elements exist."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return rows, columns, mask


@triton.jit
def _value(x, KIND: tl.constexpr):
    """Return act(x)."""
    if KIND == "relu":
        y = tl.where(x <= 0.0, 0.0, x)  # NaN stays
    elif KIND == "gelu":
        y = x * _normal(x, _density(x))
    elif KIND == "gelu_tanh":
        y = x * _sigmoid(2.0 * _inner(x))  # (1 + tanh(z)) / 2 is the sigmoid of 2z
    elif KIND == "silu":
        y = x * _sigmoid(x)
    else:
        tl.static_assert(KIND == "tanh")
        y = _tanh(x)
    return y


@triton.jit
def _slope(x, KIND: tl.constexpr):
    """Return act'(x)."""
    if KIND == "relu":
        y = tl.where(x <= 0.0, 0.0, 1.0)
    elif KIND == "gelu":
        density = _density(x)
        y = _normal(x, density) + x * density
    elif KIND == "gelu_tanh":
        s = _sigmoid(2.0 * _inner(x))
        near = tl.minimum(tl.maximum(x, -16.0), 16.0)  # beyond, s · (1 − s) is 0, and x² must not be infinite
        y = s + near * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * near * near)
    elif KIND == "silu":
        s = _sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    else:
        tl.static_assert(KIND == "tanh")
        t = _tanh(x)
        y = 1.0 - t * t
    return y


@triton.jit
def _density(x):
    """Return the density function of a normal number, exp(−x²/2) / √(2π), from a power of 2."""
    return tl.exp2(-0.7213475204444817 * x * x - 1.3257480647361593)


@triton.jit
def _normal(x, density):
    """Return the distribution function of a normal number, (1 + erf(x / √2)) / 2; `density` is that of x.

    The error is at most 7.5e-8 (Abramowitz and Stegun 1964, formula 7.1.26). An exact erf takes longer than the bytes.
    The formula multiplies exp(−x²/2) by a polynomial of 1 / (1 + p · |x| / √2). Here the density is multiplied by one
    of 1 / (√2 / p + |x|), which takes two instructions less; the coefficients are changed accordingly.
    """
    t = _reciprocal(4.317008497 + tl.abs(x))  # p = 0.3275911
    tail = 143.3273788 + t * (-632.56128 + t * 1994.599752)
    tail = density * (t * (1.37877278 + t * (-6.645123147 + t * tail)))
    return tl.where(x < 0.0, tail, 1.0 - tail)


@triton.jit
def _sigmoid(x):
    """Return 1 / (1 + exp(−x))."""
    return _reciprocal(1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def _reciprocal(x):
    """Return 1 / x for x ≥ 1, by the GPU's own instruction, whose error is at most one unit in the last place.

    A division is compiled to eight instructions, most of which scale numbers that are very large or very small.
    """
    if IS_INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _inner(x):
    """Return √(2/π) · (x + 0.044715 x³)."""
    return 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)


@triton.jit
def _tanh(x):
    """Return tanh(x), from a power of e that cannot be infinite."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)
