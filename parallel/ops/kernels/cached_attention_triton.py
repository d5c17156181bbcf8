"""The kernel of `attend_fused`: one program for each text and query head or, for a long cache, several of them.

A program reads its keys and values in tiles. Each slot of a tile has a softmax of its own over the keys that come to
it, one from each tile: a maximum, a sum of weights, and a weighted sum of values, in fp32, which are rescaled when the
maximum grows (Milakov and Gimelshein 2018, arXiv 1805.02867). The slots are summed once, after the last tile, so no
tile waits for a sum over threads. The maxima begin with the score of the new key, which is finite: no slot divides 0
by 0.

The new key and value are taken from the inputs, never from the cache: no program waits for the one that writes them.
Where several programs share a query head, each takes every so many-th tile, and a second kernel adds up their sums.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634  # GPUs have an instruction for powers of 2

MOST_PROGRAMS, MOST_PARTS = 512, 16
"""A split cache has at most so many programs in all, and so many of a query head."""


@dataclass(frozen=True)
class Tiling:
    """A way to cut the work: keys of a tile, programs of a query head (both powers of 2), warps of a program."""

    keys: int
    parts: int
    warps: int


def tiling_for(q: Tensor, cache: Tensor) -> Tiling:
    """Return the tiling for q[B, heads, 1, D] and cache[2, B, kv_heads, L, D].

    Tiles are large, so that few reads bring in all keys. The tiling depends on L, not on the positions: a part takes
    every so many-th tile of those that a text has by then.
    """
    programs, length = q.shape[0] * q.shape[1], cache.shape[3]
    row = triton.next_power_of_2(q.shape[3]) * q.element_size()
    keys = min(2**15 // row, triton.next_power_of_2(length))
    parts = max(1, min(triton.cdiv(length, keys) // 4, MOST_PROGRAMS // programs, MOST_PARTS))
    return Tiling(keys, 1 << (parts.bit_length() - 1), warps=8)


def launch_attend(
    new: tuple[Tensor, Tensor, Tensor], cache: Tensor, positions: Tensor, *, window: int, tiling: Tiling
) -> Tensor:
    """Keep k and v of `new`, q, k and v, in the cache, and return y[B, heads · D]: see `attend_fused`."""
    q, k, v = new
    batch, heads, _, size = q.shape
    kv_heads = k.shape[1]
    assert q.dtype == k.dtype == v.dtype == cache.dtype, (q.dtype, k.dtype, v.dtype, cache.dtype)
    assert heads % kv_heads == 0, (heads, kv_heads)
    assert cache.stride(-1) == 1, cache.stride()
    assert positions.is_contiguous(), positions.stride()
    y = q.new_empty(batch, heads * size)
    parts, dims = tiling.parts, triton.next_power_of_2(size)
    # Of each part the weighted sum of values, the maximum and the sum of weights; without parts y takes their place.
    sums = y if parts == 1 else torch.empty(batch, heads, parts, size + 2, dtype=torch.float32, device=q.device)
    _attend[batch, heads, parts](
        *(q, k, v, cache, positions, sums),
        *(q.stride(0), q.stride(1), q.stride(3)),
        *(k.stride(0), k.stride(1), k.stride(3)),
        *(v.stride(0), v.stride(1), v.stride(3)),
        *cache.stride()[:4],
        window,
        size**-0.5 * LOG2_E,
        GROUP=heads // kv_heads,
        SIZE=size,
        DIMS=dims,
        KEYS=tiling.keys,
        PARTS=parts,
        num_warps=tiling.warps,
    )
    if parts > 1:
        _add_up[batch * heads,](sums, y, SIZE=size, DIMS=dims, PARTS=parts, num_warps=4)
    return y


@triton.jit
def _attend(
    q,
    k,
    v,
    cache,
    positions,
    sums,
    q_text,  # strides, in elements: of q's texts, heads and dims
    q_head,
    q_dim,
    k_text,
    k_head,
    k_dim,
    v_text,
    v_head,
    v_dim,
    values_from_keys,  # and of the cache, whose dims are side by side
    cache_text,
    cache_head,
    cache_key,
    window,
    scale,  # log2(e) / √D
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Attend for one text, query head and part."""
    text = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    kv_head = head // GROUP
    position = tl.load(positions + text).to(tl.int32)
    dims = tl.arange(0, DIMS)
    is_dim = dims < SIZE
    query = tl.load(q + text * q_text + head * q_head + dims * q_dim, mask=is_dim, other=0.0).to(tl.float32) * scale
    new_key = tl.load(k + text * k_text + kv_head * k_head + dims * k_dim, mask=is_dim, other=0.0)
    new_value = tl.load(v + text * v_text + kv_head * v_head + dims * v_dim, mask=is_dim, other=0.0)

    keys = cache + text * cache_text + kv_head * cache_head
    values = keys + values_from_keys
    if (part == 0) & (head == kv_head * GROUP):  # one program of each key head
        tl.store(keys + position * cache_key + dims, new_key, mask=is_dim)
        tl.store(values + position * cache_key + dims, new_value, mask=is_dim)

    new_score = tl.sum(query * new_key.to(tl.float32), 0)
    slots = tl.arange(0, KEYS)
    largest = tl.zeros((KEYS,), tl.float32) + new_score
    total = tl.zeros((KEYS,), tl.float32)
    weighted = tl.zeros((KEYS, DIMS), tl.float32)
    first = tl.maximum(position - window + 1, 0)
    for start in range(first + part * KEYS, position, KEYS * PARTS):
        rows = start + slots
        is_seen = rows < position
        at = rows[:, None] * cache_key + dims[None, :]
        mask = is_seen[:, None] & is_dim[None, :]
        tile_keys = tl.load(keys + at, mask=mask, other=0.0)
        tile_values = tl.load(values + at, mask=mask, other=0.0)
        scores = tl.sum(query[None, :] * tile_keys.to(tl.float32), 1)
        scores = tl.where(is_seen, scores, float("-inf"))
        larger = tl.maximum(largest, scores)
        kept = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger)
        total = total * kept + weights
        weighted = weighted * kept[:, None] + weights[:, None] * tile_values.to(tl.float32)
        largest = larger

    top = tl.max(largest, 0)
    kept = tl.exp2(largest - top)
    new_weight = tl.where(part == 0, tl.exp2(new_score - top), 0.0)
    all_weights = tl.sum(total * kept, 0) + new_weight
    row = tl.sum(weighted * kept[:, None], 0) + new_weight * new_value.to(tl.float32)
    number = (text * tl.num_programs(1) + head) * PARTS + part
    if PARTS == 1:
        tl.store(sums + number * SIZE + dims, (row / all_weights).to(sums.dtype.element_ty), mask=is_dim)
    else:
        at_part = sums + number * (SIZE + 2)
        tl.store(at_part + dims, row, mask=is_dim)
        tl.store(at_part + SIZE, top)
        tl.store(at_part + SIZE + 1, all_weights)


@triton.jit
def _add_up(sums, y, SIZE: tl.constexpr, DIMS: tl.constexpr, PARTS: tl.constexpr):
    """Add up the parts of one text and query head: sums[B · heads, PARTS, SIZE + 2] -> y[B · heads, SIZE]."""
    number = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIMS)
    is_dim = dims < SIZE
    of_parts = sums + (number * PARTS + tl.arange(0, PARTS)) * (SIZE + 2)
    rows = tl.load(of_parts[:, None] + dims[None, :], mask=is_dim[None, :], other=0.0)
    tops = tl.load(of_parts + SIZE)
    factors = tl.exp2(tops - tl.max(tops, 0))
    row = tl.sum(rows * factors[:, None], 0) / tl.sum(tl.load(of_parts + SIZE + 1) * factors, 0)
    tl.store(y + number * SIZE + dims, row.to(y.dtype.element_ty), mask=is_dim)
