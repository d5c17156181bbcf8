"""Attention of some queries to some keys, forward and backward: the kernels with which a ring computes a block.

There may be fewer heads of keys and values than of queries (grouped-query attention, Ainslie et al. 2023, arXiv
2305.13245): query head h uses key head h // (heads // kv_heads). Keys are not repeated in memory.

A forward returns y[B, heads, R, D] and the logsumexp of each query's scores, [B, heads, R]. A backward is given y and
logsumexp over all keys, and returns what the keys of this block contribute to the gradients. It needs nothing else of
the other keys (Dao et al. 2022, "FlashAttention", arXiv 2205.14135, appendix B.4).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from parallel.ops.products import wide_batched_product
from parallel.sequence.blocks import Block, Masking, Pairs

UNSEEN = -1e30
"""The logsumexp of a query that sees no key: finite, so that the difference of two of them is a number."""

MOST_DOCUMENTS = 2**16
"""A GPU's grid has one block fewer in the direction in which flash takes documents, and there is one bound more."""

LARGEST_FLASH_HEAD = 256

HEAD_UNIT = 8
"""GPU kernels take head sizes that are multiples of this. torch pads others, but not for callers of its kernels."""


@dataclass(frozen=True)
class Kernel:
    """A forward and a backward of attention.

    forward   q[B, heads, R, D], k, v[B, kv_heads, C, D], block -> y[B, heads, R, D], logsumexp[B, heads, R]
    backward  dy, (q, k, v, y, logsumexp), block -> dq, dk, dv
    """

    forward: Callable[[Tensor, Tensor, Tensor, Block], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, tuple[Tensor, ...], Block], tuple[Tensor, ...]]


def kernel_for(q: Tensor, masking: Masking, *, compiles: bool = False) -> Kernel:
    """Return the kernel that torch's `scaled_dot_product_attention` would choose for q[B, heads, R, D] on its device.

    Where that one returns no logsumexp, with dropout (which torch would not draw by coordinates), or on a GPU with a
    padding mask, it is `unfused` instead, which holds a block's scores, [B, heads, R, C]; `compiles` is for that one.
    With a window or documents it is flash, the only one on a GPU that has both. All of torch's accept grouped heads.
    """
    if masking.dropout is None and not q.is_cuda:
        return FLASH_ON_CPU
    if masking.tokens is None and masking.dropout is None and q.is_cuda and q.shape[-1] % HEAD_UNIT == 0:
        half = q[..., : max(1, q.shape[-2] // 2), :]  # as long as the shortest block
        chosen = SDPBackend(torch._fused_sdp_choice(half, half, half, is_causal=True))
        if chosen in ON_GPU and masking.documents is not None:
            return FLASH_OF_DOCUMENTS
        if chosen in ON_GPU and masking.window is not None:
            return ON_GPU[SDPBackend.FLASH_ATTENTION]
        if chosen in ON_GPU:
            return ON_GPU[chosen]
    return unfused(compiles)


def needs_no_mask(q: Tensor, masking: Masking) -> bool:
    """Return whether `kernel_for` q[B, heads, R, D] applies this masking, a window or documents, without any mask.

    torch's own `scaled_dot_product_attention` would need one.
    """
    if masking.is_causal_alone or masking.tokens is not None or not q.is_cuda:
        return False
    if masking.documents is not None and masking.documents.bounds.numel() > MOST_DOCUMENTS:
        return False
    return q.dtype.itemsize == 2 and q.shape[-1] % HEAD_UNIT == 0 and q.shape[-1] <= LARGEST_FLASH_HEAD


# -- unfused attention: any dtype, any mask, dropout


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """Join the rows of all query heads that use the same key head: x[B, heads, R, N] -> [B, kv_heads, group · R, N]."""
    joined: Tensor = x.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    return joined


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Undo `_grouped`: x[B, kv_heads, group · R, N] -> [B, heads, R, N]."""
    cut: Tensor = x.unflatten(2, (heads // x.shape[1], -1)).flatten(1, 2)
    return cut


def _products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply each query head by its key head: a[B, heads, R, K] · b[B, kv_heads, K, N] -> [B, heads, R, N]."""
    return _by_head(wide_batched_product(_grouped(a, b.shape[1]), b, dtype), a.shape[1])


def _scores(q: Tensor, k: Tensor, pairs: Pairs) -> Tensor:
    """Return q[B, heads, R, D] · k[B, kv_heads, C, D]ᵀ / √D in at least fp32, with −inf where a query sees no key."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = _products(q, k.mT, wide).mul_(q.shape[-1] ** -0.5)
    hidden = pairs.hidden()
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, pairs)
    logsumexp = scores.logsumexp(-1).clamp_min(UNSEEN)
    weights = scores.sub_(logsumexp.unsqueeze(-1)).exp_()
    return _products(pairs.dropout()(weights).to(q.dtype), v, q.dtype), logsumexp


def _backward(dy: Tensor, saved: tuple[Tensor, ...], pairs: Pairs) -> tuple[Tensor, ...]:
    q, k, v, y, logsumexp = saved
    kv_heads = k.shape[1]
    weights, dropout = _scores(q, k, pairs).sub_(logsumexp.unsqueeze(-1)).exp_(), pairs.dropout()
    dweights = dropout(_products(dy, v.mT, weights.dtype))
    inner = (dy.to(weights.dtype) * y).sum(-1, keepdim=True)  # Σ weights · dweights over all keys
    dscores = dweights.sub_(inner).mul_(weights).mul_(q.shape[-1] ** -0.5).to(q.dtype)
    dv = _grouped(dropout(weights).to(dy.dtype), kv_heads).mT @ _grouped(dy, kv_heads)
    return _products(dscores, k, k.dtype), _grouped(dscores, kv_heads).mT @ _grouped(q, kv_heads), dv


@cache
def unfused(compiles: bool = False) -> Kernel:
    """Return attention in plain torch operations, which torch.compile may fuse."""
    forward = torch.compile(_forward) if compiles else _forward
    backward = torch.compile(_backward) if compiles else _backward
    return Kernel(
        lambda q, k, v, block: forward(q, k, v, block.pairs(q.device)),
        lambda dy, saved, block: backward(dy, saved, block.pairs(dy.device)),
    )


# -- torch's kernels, called directly, since `scaled_dot_product_attention` does not return the logsumexp


def _cpu_mask(q: Tensor, block: Block) -> tuple[Tensor | None, Tensor | None]:
    """Return what is added to the scores [B or 1, 1, R, C], and which queries [B or 1, 1, R] see nothing.

    Both are None where causality hides all that is hidden: the kernel knows it.
    """
    if block.masking.is_causal_alone:
        return None, None
    hidden = block.pairs(q.device).hidden()
    assert hidden is not None
    mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
    return mask.expand(-1, -1, q.shape[-2], -1), hidden.all(-1)


def _flash_on_cpu_forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    mask, sees_nothing = _cpu_mask(q, block)
    is_causal = block.is_causal and mask is None
    y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=mask)
    return y, logsumexp if sees_nothing is None else logsumexp.masked_fill(sees_nothing, UNSEEN)


def _flash_on_cpu_backward(dy: Tensor, saved: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    mask, _ = _cpu_mask(dy, block)
    is_causal = block.is_causal and mask is None
    grads: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dy, *saved, 0.0, is_causal, attn_mask=mask
    )
    return grads


FLASH_ON_CPU = Kernel(_flash_on_cpu_forward, _flash_on_cpu_backward)


def _flash_window(block: Block) -> dict[str, int | None]:
    """Return the arguments of flash that limit how far a query sees, for a block of consecutive queries and keys.

    Flash places the last query at the last key. Of R queries from position a and C keys from position b, its query i is
    therefore at key i + C − R, while it is at key i + a − b in the sequence:

        queries 4 5 6, keys 2 3 4 5, W = 4     query 4 is at key 3 for flash, and sees from key 1 on: 2 keys to its left
    """
    if (window := block.masking.window) is None:
        return {}
    (rows,), (columns,) = block.rows, block.columns
    left = len(columns) - len(rows) - (rows.start - columns.start) + window - 1
    assert left >= 0, f"some of the queries {rows} see none of the keys {columns}"  # flash would take it for no limit
    return dict(window_size_left=left, window_size_right=0 if block.is_causal else None)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    by_position = (x.transpose(1, 2) for x in (q, k, v))
    sizes = None, None, q.shape[-2], k.shape[-2]  # all sequences have one length
    y, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        *by_position, *sizes, 0.0, block.is_causal, False, **_flash_window(block)
    )
    return y.transpose(1, 2), logsumexp


def _flash_backward(dy: Tensor, saved: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    q, k, v, y, logsumexp = saved
    by_position = (x.transpose(1, 2) for x in (dy, q, k, v, y))
    no_random = torch.empty(2, dtype=torch.uint64, device=q.device)
    sizes = None, None, q.shape[-2], k.shape[-2]
    grads = torch.ops.aten._flash_attention_backward(
        *by_position,
        logsumexp.contiguous(),  # of a slice the kernel would read other rows
        *sizes,
        0.0,
        block.is_causal,
        no_random,
        no_random,
        **_flash_window(block),
    )
    return tuple(grad.transpose(1, 2) for grad in grads)


def _in_a_row(x: Tensor) -> Tensor:
    """Return x[B, heads, S, D] as [B · S, heads, D]: a view where the heads of a token lie beside each other."""
    row: Tensor = x.transpose(1, 2).flatten(0, 1)
    return row


def _by_sample(x: Tensor, samples: int) -> Tensor:
    """Undo `_in_a_row`: x[B · S, heads, D] -> [B, heads, S, D]."""
    samples_of: Tensor = x.unflatten(0, (samples, -1))
    return samples_of.transpose(1, 2)


def _of_documents(block: Block) -> tuple[Any, ...]:
    """Return flash's arguments for the documents of a block of whole samples: bounds and longest, of queries and keys.

    A longest of 1 is said to be 2, since flash takes queries of one token for those of a generation, without documents
    that are empty.
    """
    documents = block.masking.documents
    assert documents is not None
    assert block.rows == block.columns == (range(block.length),), "a document is in one block"
    bounds, longest = documents.cumulative(), max(2, documents.longest)
    return bounds, bounds, longest, longest


def _flash_of_documents_forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    in_a_row = (_in_a_row(x) for x in (q, k, v))
    y, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        *in_a_row, *_of_documents(block), 0.0, True, False, **_flash_window(block)
    )
    return _by_sample(y, len(q)), logsumexp.unflatten(1, (len(q), -1)).transpose(0, 1)


def _flash_of_documents_backward(dy: Tensor, saved: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    *tensors, logsumexp = saved
    in_a_row = (_in_a_row(x) for x in (dy, *tensors))
    no_random = torch.empty(2, dtype=torch.uint64, device=dy.device)
    grads = torch.ops.aten._flash_attention_backward(
        *in_a_row,
        logsumexp.transpose(0, 1).flatten(1),
        *_of_documents(block),
        0.0,
        True,
        no_random,
        no_random,
        **_flash_window(block),
    )
    return tuple(_by_sample(grad, len(dy)) for grad in grads)


FLASH_OF_DOCUMENTS = Kernel(_flash_of_documents_forward, _flash_of_documents_backward)
"""Flash with a sequence for each document, of the lengths that they have: what no query sees is not computed."""


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    y, logsumexp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, block.is_causal)
    return y, logsumexp.view(y.shape[:-1])


def _cudnn_backward(dy: Tensor, saved: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    q, k, v, y, logsumexp = saved
    no_random = torch.empty((), dtype=torch.int64, device=q.device)
    tensors = q, k, v, y, logsumexp.unsqueeze(-1).contiguous(), no_random, no_random
    no_mask, sizes = None, (None, None, q.shape[-2], k.shape[-2])  # all sequences have one length
    grads: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dy, *tensors, no_mask, *sizes, 0.0, block.is_causal
    )
    return grads


ON_GPU: Mapping[SDPBackend, Kernel] = MappingProxyType(
    {
        SDPBackend.FLASH_ATTENTION: Kernel(_flash_forward, _flash_backward),
        SDPBackend.CUDNN_ATTENTION: Kernel(_cudnn_forward, _cudnn_backward),
    }
)
