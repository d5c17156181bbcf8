"""The kernel of `heads_of` and its backward: between qkv[B, S, F], row by row, and the heads of attention.

A program has one head of D columns of qkv, and the rows of one part, as in `column_sum_triton`. Rows are tokens, of all
texts. A head of q and k consists of R dims that are turned, in two halves, and of the others, which stay; that of v
has the same places. A turn is computed in fp32 and rounded once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.ops.kernels.column_sum_triton import add_parts, parts_of
from parallel.ops.kernels.launch import launch

TILE, WARPS = 2048, 4  # elements of a tile, warps of a program


def launch_heads(
    joint: Tensor, by_head: Sequence[Tensor], tables: Sequence[Tensor] | None, *, moves_v: bool = True
) -> None:
    """Turn the heads of joint[B, S, F] into `by_head`: q, k, v, or q alone; v stays unless `moves_v`."""
    _, kv_heads = _counts(by_head)
    slots = joint.shape[-1] // by_head[0].shape[-1] - (0 if moves_v else kv_heads)
    _launch(joint, by_head, tables, slots=slots, is_forward=True)


def launch_heads_backward(
    by_head: Sequence[Tensor], tables: Sequence[Tensor] | None, *, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of joint[B, S, F] and, with `sums`, its sum over all tokens, [F]."""
    by_head = [x if x.stride(-1) == 1 else x.contiguous() for x in by_head]
    heads, kv_heads = _counts(by_head)
    batch, _, length, size = by_head[0].shape
    joint = by_head[0].new_empty(batch, length, (heads + 2 * kv_heads) * size)
    partial = _launch(joint, by_head, tables, slots=heads + 2 * kv_heads, is_forward=False, sums=sums)
    return joint, add_parts(partial, joint.dtype) if sums else None


def _counts(by_head: Sequence[Tensor]) -> tuple[int, int]:
    """Return the numbers of heads of q, and of k and v."""
    return by_head[0].shape[1], by_head[1].shape[1] if len(by_head) > 1 else 0


def _launch(
    joint: Tensor,
    by_head: Sequence[Tensor],
    tables: Sequence[Tensor] | None,
    *,
    slots: int,
    is_forward: bool,
    sums: bool = False,
) -> Tensor:
    """Launch the kernel for the first `slots` heads of joint, and return the sums of the parts, [parts, F]."""
    heads, kv_heads = _counts(by_head)
    batch, length, width = joint.shape
    size, num_rows = by_head[0].shape[-1], batch * length
    rows = max(4, TILE // triton.next_power_of_2(size))
    parts, rows_of_part = parts_of(num_rows, max(1, slots), rows, sums=sums)
    partial = torch.empty(parts if sums else 0, width, dtype=torch.float32, device=joint.device)
    q, k, v = by_head if kv_heads else (by_head[0],) * 3
    cos, sin = (None, None) if tables is None else [x.contiguous() for x in tables]
    num_turned = 0 if cos is None else cos.shape[-1]
    text_of_tables = 0 if cos is None or cos.shape[0] == 1 else length * num_turned
    if num_rows and slots:
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        constants = dict(WIDTH=width, HEADS=heads, KV_HEADS=kv_heads, SIZE=size, TURNED=num_turned)
        constants |= dict(HALF=_power_of_2(num_turned // 2), REST=_power_of_2(size - num_turned))
        launch(
            _move,
            (slots, parts),
            (joint, q, k, v, cos, sin, partial if sums else None),
            (*strides, text_of_tables, length, num_rows, rows_of_part),
            constants=constants | dict(IS_FORWARD=is_forward, ROWS=rows),
            num_warps=WARPS,
        )
    elif sums:
        partial.zero_()
    return partial


def _power_of_2(size: int) -> int:
    """Return the number of lanes for `size` elements: 1 if there are none."""
    found: int = triton.next_power_of_2(max(1, size))
    return found


@triton.jit
def _move(
    joint, q, k, v, cos, sin, sums,
    q_text, q_head, q_row, k_text, k_head, k_row, v_text, v_head, v_row,  # strides
    table_text, length, num_rows, rows_of_part,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, TURNED: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, IS_FORWARD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Move one head of some rows between qkv and q, k or v, and turn it."""
    slot = tl.program_id(0)
    part = tl.program_id(1)
    kind, head = _kind_and_head(slot, HEADS, KV_HEADS)
    is_q, is_k = kind == 0, kind == 1
    heads = tl.where(is_q, q, tl.where(is_k, k, v))
    text_stride = tl.where(is_q, q_text, tl.where(is_k, k_text, v_text)).to(tl.int64)
    head_stride = tl.where(is_q, q_head, tl.where(is_k, k_head, v_head)).to(tl.int64)
    row_stride = tl.where(is_q, q_row, tl.where(is_k, k_row, v_row)).to(tl.int64)
    heads += head * head_stride
    joint += slot * SIZE

    halves = tl.arange(0, HALF)
    rests = TURNED + tl.arange(0, REST)
    sum_first = tl.zeros((ROWS, HALF), tl.float32)
    sum_second = tl.zeros((ROWS, HALF), tl.float32)
    sum_rest = tl.zeros((ROWS, REST), tl.float32)
    first_row = part * rows_of_part
    last_row = tl.minimum(first_row + rows_of_part, num_rows)
    for start in range(first_row, last_row, ROWS):
        rows = start + tl.arange(0, ROWS)
        texts = (rows // length).to(tl.int64)
        positions = (rows % length).to(tl.int64)
        is_row = (rows < last_row)[:, None]
        at_joint = (rows.to(tl.int64) * WIDTH)[:, None]
        at_heads = (texts * text_stride + positions * row_stride)[:, None]
        if IS_FORWARD:
            source, target, at_source, at_target = joint, heads, at_joint, at_heads
        else:
            source, target, at_source, at_target = heads, joint, at_heads, at_joint
        if TURNED > 0:
            mask = is_row & (halves < TURNED // 2)[None, :]
            at = source + at_source + halves[None, :]
            first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(at + TURNED // 2, mask=mask, other=0.0).to(tl.float32)
            if kind < 2:
                at_table = (texts * table_text + positions * TURNED)[:, None] + halves[None, :]
                first, second = _turned(first, second, cos + at_table, sin + at_table, mask, IS_FORWARD)
            at = target + at_target + halves[None, :]
            tl.store(at, first.to(target.dtype.element_ty), mask=mask)
            tl.store(at + TURNED // 2, second.to(target.dtype.element_ty), mask=mask)
            sum_first += first
            sum_second += second
        if TURNED < SIZE:
            mask = is_row & (rests < SIZE)[None, :]
            rest = tl.load(source + at_source + rests[None, :], mask=mask, other=0.0)
            tl.store(target + at_target + rests[None, :], rest, mask=mask)
            sum_rest += rest.to(tl.float32)
    if sums is not None:
        sums += part * WIDTH + slot * SIZE
        if TURNED > 0:
            mask = halves < TURNED // 2
            tl.store(sums + halves, tl.sum(sum_first, 0), mask=mask)
            tl.store(sums + TURNED // 2 + halves, tl.sum(sum_second, 0), mask=mask)
        if TURNED < SIZE:
            tl.store(sums + rests, tl.sum(sum_rest, 0), mask=rests < SIZE)


@triton.jit
def _kind_and_head(slot, HEADS: tl.constexpr, KV_HEADS: tl.constexpr):
    """Return 0, 1 or 2 for a head of q, k or v, and its number among those, of head `slot` of the joint output."""
    if KV_HEADS == HEADS or KV_HEADS == 0:
        kind = slot // HEADS
        head = slot % HEADS
    else:
        GROUP: tl.constexpr = HEADS // KV_HEADS
        group = slot // (GROUP + 2)
        place = slot % (GROUP + 2)
        kind = tl.maximum(place - GROUP + 1, 0)
        head = tl.where(kind == 0, group * GROUP + place, group)
    return kind, head


@triton.jit
def _turned(first, second, cos, sin, mask, IS_FORWARD: tl.constexpr):
    """Return both halves of pairs, turned by their angles, or back."""
    c = tl.load(cos, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin, mask=mask, other=0.0).to(tl.float32)
    if not IS_FORWARD:
        s = -s
    return first * c - second * s, second * c + first * s
