"""Attention of one new token of each text to a cache of keys and values, in which its own are kept first.

`attend_in_torch` is the reference, for every device and dtype; `attend_fused` does the same in one kernel, which needs
no mask. `is_fused` says where the kernel can be had and is faster, so that a caller makes masks only for the other one.

Both write the cache in place, and are given

    q[B, heads, 1, D], k, v[B, kv_heads, 1, D]   of the new tokens, with any strides
    cache[2, B, kv_heads, L, D]                  keys and values of all tokens so far, at their positions
    positions[B]                                 int64, those of the new tokens, on the device

and return y[B, heads · D]. Query head h uses key head h // (heads // kv_heads).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.ops.kernels.table import can_be_given

MOST_ROWS = 256  # texts times query heads: torch's attention is faster with more (benchmarks.generate --kernels)


def is_fused(device: torch.device, dtype: torch.dtype, head_size: int, *, rows: int) -> bool:
    """Return whether `attend_fused` can be called, and is the faster one for `rows` texts times query heads of a rank.

    The table of kernels says where it can.
    """
    return device.type == "cuda" and rows <= MOST_ROWS and can_be_given("cached_attention", dtype, row=head_size)


def attend_in_torch(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Keep k and v, and attend with this mask[B, 1, 1, L], which is added to the scores.

    The queries that share a key head are its rows, so that no key is repeated. The compiler writes through indices in
    place, where `scatter_` would copy the cache.
    """
    texts = torch.arange(len(positions), device=positions.device)
    cache[:, texts, :, positions] = torch.stack((k.squeeze(2), v.squeeze(2)), 1)  # the texts are its first dim here
    keys, values = cache.unbind(0)
    rows = q.squeeze(2).unflatten(1, (k.shape[1], -1))
    y: Tensor = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    return y.flatten(1)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Keep k and v, and attend to the last `window` keys, the new one among them; None: to all."""
    window = cache.shape[3] if window is None else window
    if torch.compiler.is_compiling():
        y: Tensor = _attend_in_compiled_code(q, k, v, cache, positions, window)
        return y
    return _launch(q, k, v, cache, positions, window)


def _launch(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, positions: Tensor, window: int) -> Tensor:
    from parallel.ops.kernels.cached_attention_triton import launch_attend, tiling_for  # imports Triton

    return launch_attend((q, k, v), cache, positions, window=window, tiling=tiling_for(q, cache))


@torch.library.custom_op("colonnade::attend_to_cache", mutates_args={"cache"})
def _attend_in_compiled_code(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, positions: Tensor, window: int) -> Tensor:
    """Do as `_launch`; the compiler calls this as it is, with the cache itself and not with a copy.

    torch's registry of operators has it from the import on: code that is being compiled cannot register one.
    """
    return _launch(q, k, v, cache, positions, window)


@_attend_in_compiled_code.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, positions: Tensor, window: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[3])
