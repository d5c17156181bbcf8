"""The kernels of `cross_entropy`: a program has one token, and reads its row of logits in tiles.

Every four columns of a tile have one slot, with a maximum and a sum of exponentials over the columns that come to it,
in fp32, which are rescaled when the maximum grows (Milakov and Gimelshein 2018, arXiv 1805.02867). The slots are
summed once, after the last tile, so no tile waits for a sum over threads. A row of a large vocabulary does not fit into
the registers of a multiprocessor, so the gradient reads it again. Most of that is a read from the L2 cache: one large
program at a time has a multiprocessor, and the second read begins with the tile that was read last.

A gradient in half the bytes is written to the second half of its own row: column j at the bytes 2V + 2j, which are not
before the bytes 4j of its logit. So with the last tile first, a tile overwrites logits that have been read: by a whole
program, after a barrier. The logits need no second buffer, and what is written is in the cache already.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.ops.kernels.launch import launch

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

TILE, WARPS = 8192, 32
"""Columns of a tile and warps of a program that reads a row twice."""

TILE_READ_ONCE, WARPS_READ_ONCE = 2048, 8
"""The same of a program that reads a row once: many small programs keep the most reads in flight."""

MOST_PROGRAMS = 1024  # of a product with a number that is nearly always 1: then all they do is begin and end


def gradient_memory(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the logits' shape in `dtype`, in the memory of the logits: see the module's docstring."""
    columns = logits.shape[-1]
    assert logits.is_contiguous(), logits.stride()
    assert dtype.itemsize in (2, 4), dtype
    return logits.view(dtype)[..., -columns:] if columns else logits.to(dtype)


def launch_loss_and_gradient(
    logits: Tensor, labels: Tensor, entries: range, *, scale: float | None, out: Tensor | None
) -> Tensor:
    """Return the loss of each token, and write its gradient to `out`: logits[B, S, V], labels[B, S] -> [B, S].

    `out` is the `gradient_memory` of the logits; with None there is no gradient.
    """
    losses = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    if losses.numel():
        launch(
            _loss_and_gradient,
            (losses.numel(),),
            (logits, labels.contiguous(), losses, logits if out is None else out),
            (logits.shape[-1], _row_stride(out), entries.start, len(entries), float(scale or 0)),
            constants=dict(WITH_GRADIENT=out is not None, TILE=_tile(logits, TILE, WARPS)),
            num_warps=WARPS,
        )
    return losses


def launch_statistics(logits: Tensor, labels: Tensor, entries: range) -> Tensor:
    """Return the largest logit, Σ exp(logit − largest) and the label's logit of each token, [3, B, S].

    The third is 0 where the label is no entry of this rank.
    """
    found = torch.empty(3, *labels.shape, dtype=torch.float32, device=logits.device)
    if labels.numel():
        launch(
            _statistics,
            (labels.numel(),),
            (logits, labels.contiguous(), found),
            (labels.numel(), logits.shape[-1], entries.start, len(entries)),
            constants=dict(TILE=_tile(logits, TILE_READ_ONCE, WARPS_READ_ONCE)),
            num_warps=WARPS_READ_ONCE,
        )
    return found


def launch_gradient(
    logits: Tensor, labels: Tensor, entries: range, *, of_all: tuple[Tensor, Tensor], scale: float, out: Tensor
) -> None:
    """Write the gradient to `out`, the `gradient_memory` of the logits.

    `of_all`: the largest logit and Σ exp(logit − largest) over all ranks, [B, S] both.
    """
    top, total = of_all
    if labels.numel():
        launch(
            _gradient,
            (labels.numel(),),
            (logits, labels.contiguous(), top.contiguous(), total.contiguous(), out),
            (logits.shape[-1], _row_stride(out), entries.start, len(entries), float(scale)),
            constants=dict(TILE=_tile(logits, TILE_READ_ONCE, WARPS_READ_ONCE)),
            num_warps=WARPS_READ_ONCE,
        )


def launch_multiply(x: Tensor, factor: Tensor) -> None:
    """Multiply x in place by factor[], which is on the device; if that is 1, x is neither read nor written."""
    if x.numel():
        programs = min(MOST_PROGRAMS, triton.cdiv(x.numel(), TILE))
        launch(_multiply, (programs,), (x, factor), (x.numel(),), constants=dict(TILE=TILE), num_warps=8)


def _row_stride(out: Tensor | None) -> int:
    return 0 if out is None else out.stride(-2)


def _tile(logits: Tensor, tile: int, warps: int) -> int:
    whole_row: int = triton.next_power_of_2(logits.shape[-1])
    return min(tile, max(32 * warps, whole_row))


@triton.jit
def _loss_and_gradient(
    logits,
    labels,
    losses,
    out,
    columns,  # V
    out_row,  # elements from a row of `out` to the next
    first,  # the vocabulary's entry of column 0
    entries,  # columns that are entries; the others are padding
    scale,
    WITH_GRADIENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Compute one token's loss, and its gradient."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * columns
    label = tl.load(labels + token)
    column = _column_of(label, first, entries)
    at_label = tl.load(row + column, mask=column >= 0, other=0.0)
    top, total = _of_row(row, columns, entries, TILE)
    target = tl.where(column >= 0, at_label - top, 0.0)
    counted = (label >= 0).to(tl.float32)
    tl.store(losses + token, (tl.log(total) - target) * counted)
    if WITH_GRADIENT:
        _write_row(row, out + token * out_row, columns, entries, column, top, 1.0 / total, counted * scale, TILE)


@triton.jit
def _statistics(logits, labels, found, tokens, columns, first, entries, TILE: tl.constexpr):
    """Compute the three numbers of one token, found[3, tokens]."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * columns
    column = _column_of(tl.load(labels + token), first, entries)
    top, total = _of_row(row, columns, entries, TILE)
    tl.store(found + token, top)
    tl.store(found + tokens + token, total)
    tl.store(found + 2 * tokens + token, tl.load(row + column, mask=column >= 0, other=0.0))


@triton.jit
def _gradient(logits, labels, tops, totals, out, columns, out_row, first, entries, scale, TILE: tl.constexpr):
    """Write the gradient of one token, given the numbers of all ranks."""
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token)
    column = _column_of(label, first, entries)
    weight = (label >= 0).to(tl.float32) * scale
    top, inverse = tl.load(tops + token), 1.0 / tl.load(totals + token)
    row = logits + token * columns
    _write_row(row, out + token * out_row, columns, entries, column, top, inverse, weight, TILE)


@triton.jit
def _column_of(label, first, entries):
    """Return the column of a label, or −1 if it is no entry of this rank."""
    column = label - first
    return tl.where((column >= 0) & (column < entries), column, -1)


@triton.jit
def _load_tile(row, start, columns, entries, EVICTION: tl.constexpr, TILE: tl.constexpr):
    """Return a tile of logits, −∞ after the row and where there is padding."""
    at = start + tl.arange(0, TILE)
    tile = tl.load(row + at, mask=at < columns, other=float("-inf"), eviction_policy=EVICTION)
    return tl.where(at < entries, tile, float("-inf"))


@triton.jit
def _of_row(row, columns, entries, TILE: tl.constexpr):
    """Return the largest logit of a row, and Σ exp(logit − largest), which is NaN if a logit is NaN or ∞.

    The maxima begin with a finite number: a slot whose logits are all −∞ subtracts no −∞ from −∞.
    """
    largest = tl.full((TILE // 4,), LOWEST, tl.float32)
    total = tl.zeros((TILE // 4,), tl.float32)
    for start in range(0, columns, TILE):
        tile = tl.reshape(_load_tile(row, start, columns, entries, "evict_last", TILE), (TILE // 4, 4))
        larger = tl.maximum(largest, tl.max(tile, 1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(tile - larger[:, None]), 1)
        largest = larger
    top = tl.max(largest, 0)
    return top, tl.sum(total * tl.exp(largest - top), 0)


@triton.jit
def _write_row(row, out, columns, entries, column, top, inverse, weight, TILE: tl.constexpr):
    """Write (exp(logit − top) · inverse − [its column is the label's]) · weight, the last tile first."""
    last = (columns - 1) // TILE * TILE
    for back in range(0, columns, TILE):
        tile = _load_tile(row, last - back, columns, entries, "evict_first", TILE)
        at = last - back + tl.arange(0, TILE)
        probability = tl.exp(tile - top) * inverse
        gradient = (probability - tl.where(at == column, 1.0, 0.0)) * weight
        tl.debug_barrier()  # all threads have read this tile, where others may write now
        tl.store(out + at, gradient.to(out.dtype.element_ty), mask=at < columns, eviction_policy="evict_first")


@triton.jit
def _multiply(x, factor, elements, TILE: tl.constexpr):
    """Multiply every so many-th tile of x[elements]."""
    by = tl.load(factor).to(tl.float32)
    if by != 1:
        for start in range(tl.program_id(0).to(tl.int64) * TILE, elements, tl.num_programs(0).to(tl.int64) * TILE):
            at = start + tl.arange(0, TILE)
            values = tl.load(x + at, mask=at < elements, other=0.0).to(tl.float32) * by
            tl.store(x + at, values.to(x.dtype.element_ty), mask=at < elements)
