"""The kernels of `cross_entropy`: a program has one token, and reads its row of logits in tiles.

Every four columns of a tile have one slot, with a maximum and a sum of exponentials over the columns that come to it,
in fp32, which are rescaled when the maximum grows (Milakov and Gimelshein 2018, arXiv 1805.02867). The slots are
summed once, after the last tile, so no tile waits for a sum over threads. The gradient needs this sum, and then every
exponential: those of the row's last tiles stay in registers. A row of 50,000 logits stays there as a whole. Of a longer
row, the tiles before them are read again. Most of that is a read from the L2 cache: one large program at a time has a
multiprocessor, and the second read begins with the tile that was read last.

A gradient in half the bytes is written to the second half of its own row: column j at the bytes 2V + 2j, which are not
before the bytes 4j of its logit. So a tile overwrites logits of its own columns and of later ones, and the tiles are
written from the last to the first. All logits of the tiles in registers have been read when the first of them is
written, and those of a tile that is read again before it is written: by a whole program, after a barrier. A gradient
in fp32 overwrites the logits of its own columns only. The logits need no second buffer, and what is written is in the
cache already.

The label's column is written a second time, after a last barrier, so no other column is compared with the label.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.ops.kernels.launch import launch

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
LOG2E = tl.constexpr(math.log2(math.e))

WARPS = 16
"""Warps of a program that computes the loss and its gradient: a long row takes all registers of a multiprocessor."""

TILE_KEPT, MOST_KEPT = 2048, 25
"""Columns of a tile, and the most tiles, of a row that stays in registers as a whole."""

TILE, KEPT = 8192, 5
"""Columns of a tile, and the tiles that stay in registers, of a longer row: a larger tile has more reads in flight."""

TILE_READ_ONCE, WARPS_READ_ONCE = 2048, 8
"""Columns and warps of a program that reads a row once: many small programs keep the most reads in flight."""

TILE_OF_PRODUCT = 8192

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
        columns = logits.shape[-1]
        tile, kept, warps = (TILE_READ_ONCE, 0, WARPS_READ_ONCE) if out is None else _kept_tiles(columns)
        launch(
            _loss_and_gradient,
            (losses.numel(),),
            (logits, labels.contiguous(), losses, logits if out is None else out),
            (columns, _row_stride(out), entries.start, len(entries), float(scale or 0)),
            constants=dict(
                WITH_GRADIENT=out is not None,
                TILES=triton.cdiv(columns, tile),
                WHOLE=len(entries) // tile,
                KEPT=kept,
                TILE=tile,
            ),
            num_warps=warps,
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
            constants=dict(TILE=_tile(logits.shape[-1], TILE_READ_ONCE, WARPS_READ_ONCE)),
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
            constants=dict(TILE=_tile(logits.shape[-1], TILE_READ_ONCE, WARPS_READ_ONCE)),
            num_warps=WARPS_READ_ONCE,
        )


def launch_multiply(x: Tensor, factor: Tensor) -> None:
    """Multiply x in place by factor[], which is on the device; if that is 1, x is neither read nor written."""
    if x.numel():
        programs = min(MOST_PROGRAMS, triton.cdiv(x.numel(), TILE_OF_PRODUCT))
        launch(_multiply, (programs,), (x, factor), (x.numel(),), constants=dict(TILE=TILE_OF_PRODUCT), num_warps=8)


def _row_stride(out: Tensor | None) -> int:
    return 0 if out is None else out.stride(-2)


def _tile(columns: int, tile: int, warps: int) -> int:
    whole_row: int = triton.next_power_of_2(columns)
    return min(tile, max(32 * warps, whole_row))


def _kept_tiles(columns: int) -> tuple[int, int, int]:
    """Return the size of the tiles of a row, how many of them stay in registers, and the warps of its program."""
    if columns > MOST_KEPT * TILE_KEPT:
        return TILE, KEPT, WARPS
    tile = _tile(columns, TILE_KEPT, WARPS)
    return tile, triton.cdiv(columns, tile), WARPS


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
    TILES: tl.constexpr,  # all tiles of a row
    WHOLE: tl.constexpr,  # the first tiles, whose columns are all entries
    KEPT: tl.constexpr,  # the last tiles, which stay in registers
    TILE: tl.constexpr,
):
    """Compute one token's loss, and its gradient."""
    BEFORE: tl.constexpr = TILES - KEPT
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * columns
    label = tl.load(labels + token)
    column = _column_of(label, first, entries)
    at_label = tl.load(row + column, mask=column >= 0, other=0.0)

    kept = ()
    for i in tl.static_range(BEFORE, TILES):
        tile = _load_tile(row, i * TILE, columns, entries, i < WHOLE, "evict_first", TILE)
        kept += (tile,)  # type: ignore[assignment]
    of_columns = tl.full((TILE // 4, 4), LOWEST, tl.float32)
    for i in tl.static_range(KEPT):
        of_columns = tl.maximum(of_columns, kept[i])
    largest_kept = tl.max(of_columns, 1)
    powers = ()
    sums = tl.zeros((TILE // 4, 4), tl.float32)
    for i in tl.static_range(KEPT):
        powers += (_exp(kept[i] - largest_kept[:, None]),)  # type: ignore[assignment]
        sums += powers[i]
    total = tl.sum(sums, 1)
    largest, total = _add_tiles(row, BEFORE, columns, entries, largest_kept, total, BEFORE <= WHOLE, TILE)
    top, total = _of_slots(largest, total)

    target = tl.where(column >= 0, at_label - top, 0.0)
    counted = (label >= 0).to(tl.float32)
    tl.store(losses + token, (tl.log(total) - target) * counted)
    if WITH_GRADIENT:
        to = out + token * out_row
        weight = counted * scale
        factor = weight / total
        of_slot = (_exp(largest_kept - top) * factor)[:, None]
        tl.debug_barrier()  # all threads have read the tiles that are kept
        for i in tl.static_range(KEPT):
            _store_tile(to, (BEFORE + i) * TILE, powers[i] * of_slot, columns, BEFORE + i < WHOLE, TILE)
        _write_tiles(row, to, BEFORE, columns, entries, top, factor, BEFORE <= WHOLE, TILE)
        _write_at_label(to, column, at_label, top, total, weight)


@triton.jit
def _statistics(logits, labels, found, tokens, columns, first, entries, TILE: tl.constexpr):
    """Compute the three numbers of one token, found[3, tokens]."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * columns
    column = _column_of(tl.load(labels + token), first, entries)
    largest, total = tl.full((TILE // 4,), LOWEST, tl.float32), tl.zeros((TILE // 4,), tl.float32)
    largest, total = _add_tiles(row, tl.cdiv(columns, TILE), columns, entries, largest, total, False, TILE)
    top, total = _of_slots(largest, total)
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
    top, total = tl.load(tops + token), tl.load(totals + token)
    row = logits + token * columns
    to = out + token * out_row
    at_label = tl.load(row + column, mask=column >= 0, other=0.0)
    _write_tiles(row, to, tl.cdiv(columns, TILE), columns, entries, top, weight / total, False, TILE)
    _write_at_label(to, column, at_label, top, total, weight)


@triton.jit
def _column_of(label, first, entries):
    """Return the column of a label, or −1 if it is no entry of this rank."""
    column = label - first
    return tl.where((column >= 0) & (column < entries), column, -1)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _load_tile(row, start, columns, entries, WHOLE: tl.constexpr, EVICTION: tl.constexpr, TILE: tl.constexpr):
    """Return a tile of logits, [slots, 4], −∞ after the row and where there is padding: nowhere in a whole tile."""
    at = start + tl.arange(0, TILE)
    if WHOLE:
        tile = tl.load(row + at, eviction_policy=EVICTION)
    else:
        tile = tl.load(row + at, mask=at < columns, other=float("-inf"), eviction_policy=EVICTION)
        tile = tl.where(at < entries, tile, float("-inf"))
    return tl.reshape(tile, (TILE // 4, 4))


@triton.jit
def _store_tile(to, start, tile, columns, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """Write a tile, [slots, 4]. It is not read again."""
    at = start + tl.arange(0, TILE)
    values = tl.reshape(tile, (TILE,)).to(to.dtype.element_ty)
    if WHOLE:
        tl.store(to + at, values, eviction_policy="evict_first")
    else:
        tl.store(to + at, values, mask=at < columns, eviction_policy="evict_first")


@triton.jit
def _add_tiles(row, tiles, columns, entries, largest, total, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """Return the slots' maxima and sums of exponentials after the first tiles of a row have come to them.

    The maxima begin with a finite number: a slot whose logits are all −∞ subtracts no −∞ from −∞.
    """
    for i in range(tiles):
        tile = _load_tile(row, i * TILE, columns, entries, WHOLE, "evict_last", TILE)
        larger = tl.maximum(largest, tl.max(tile, 1))
        total = total * _exp(largest - larger) + tl.sum(_exp(tile - larger[:, None]), 1)
        largest = larger
    return largest, total


@triton.jit
def _of_slots(largest, total):
    """Return the largest logit of a row, and Σ exp(logit − largest), which is NaN if a logit is NaN or ∞."""
    top = tl.max(largest, 0)
    return top, tl.sum(total * _exp(largest - top), 0)


@triton.jit
def _write_tiles(row, to, tiles, columns, entries, top, factor, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """Write exp(logit − top) · factor of the first tiles of a row, the last of them first."""
    for back in range(1, tiles + 1):
        start = (tiles - back) * TILE
        gradient = _exp(_load_tile(row, start, columns, entries, WHOLE, "evict_first", TILE) - top) * factor
        tl.debug_barrier()  # all threads have read this tile, where others may write now
        _store_tile(to, start, gradient, columns, WHOLE, TILE)


@triton.jit
def _write_at_label(to, column, at_label, top, total, weight):
    """Write the gradient of the label's logit, if its column is one of these."""
    tl.debug_barrier()  # the tile of this column is written
    gradient = (_exp(at_label - top) / total - 1.0) * weight
    tl.store(to + column, gradient.to(to.dtype.element_ty), mask=column >= 0)


@triton.jit
def _multiply(x, factor, elements, TILE: tl.constexpr):
    """Multiply every so many-th tile of x[elements]."""
    by = tl.load(factor).to(tl.float32)
    if by != 1:
        for start in range(tl.program_id(0).to(tl.int64) * TILE, elements, tl.num_programs(0).to(tl.int64) * TILE):
            at = start + tl.arange(0, TILE)
            values = tl.load(x + at, mask=at < elements, other=0.0).to(tl.float32) * by
            tl.store(x + at, values.to(x.dtype.element_ty), mask=at < elements)
