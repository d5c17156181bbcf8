"""Attention of some queries to some keys, forward and backward: what the whole is put together from.

A forward returns, beside y[B, heads, R, D], the logsumexp of each query's scores, [B, heads, R]. A backward is given
those of all keys, y too, and returns what these keys contribute to the gradients (Dao et al. 2022, "FlashAttention",
appendix B.4: nothing else of the other keys is needed).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from parallel.layout.rng import dropped
from parallel.ops.products import wide_batched_product

UNSEEN = -1e30  # the logsumexp of no score at all: finite, so that differences of two are numbers
HEAD_UNIT = 8  # of which a kernel for GPUs takes multiples; their public face pads others


@dataclass(frozen=True)
class Dropping:
    """Dropout of attention's probabilities, the same in every layout. lines[B, heads]: the number of a sample's head
    among all of the run; with a query's and a key's position it tells an element.
    """

    p: float
    key: Tensor
    lines: Tensor


@dataclass(frozen=True)
class Masking:
    """What else than causality keeps a query from a key. tokens[B, S]: the positions of the whole sequence that hold a
    token, bool; None where all do.
    """

    tokens: Tensor | None = None
    dropping: Dropping | None = None


@dataclass(frozen=True)
class Pairs:
    """Queries at positions rows[R] of a sequence of `length` tokens, and keys at columns[C], int64 and in order.
    `is_causal`: a query sees the keys up to its own position; else all of these.
    """

    rows: Tensor
    columns: Tensor
    length: int
    is_causal: bool
    masking: Masking

    def hidden(self) -> Tensor | None:
        """[B or 1, 1, R or 1, C]: whether a query does not see a key; None where it sees all."""
        hidden = None
        if self.is_causal:
            hidden = (self.rows.unsqueeze(1) < self.columns)[None, None]
        if self.masking.tokens is not None:
            empty = ~self.masking.tokens[:, self.columns][:, None, None]
            hidden = empty if hidden is None else hidden | empty
        return hidden

    def dropout(self) -> Callable[[Tensor], Tensor]:
        """Of an x[B, heads, R, C], in place: the same for all that this is called with."""
        drop = self.masking.dropping
        if drop is None:
            return lambda x: x
        rows = drop.lines.unsqueeze(-1) * self.length + self.rows
        lost, made_up = dropped(drop.p, drop.key, rows, self.columns), 1 / (1 - drop.p)
        return lambda x: x.masked_fill_(lost, 0).mul_(made_up)


@dataclass(frozen=True)
class Block:
    """`Pairs` by ranges of positions: most kernels need to know no more than whether they are causal."""

    rows: tuple[range, ...]
    columns: tuple[range, ...]
    length: int
    is_causal: bool
    masking: Masking = field(default_factory=Masking)

    def pairs(self, device: torch.device) -> Pairs:
        rows, columns = (index(parts, device) for parts in (self.rows, self.columns))
        return Pairs(rows, columns, self.length, self.is_causal, self.masking)


def index(parts: tuple[range, ...], device: torch.device) -> Tensor:
    """All numbers of these ranges, int64."""
    return torch.cat([torch.arange(part.start, part.stop, device=device) for part in parts])


@dataclass(frozen=True)
class Kernel:
    """forward(q, k, v, block) -> (y, logsumexp); backward(dy, (q, k, v, y, logsumexp), block) -> (dq, dk, dv)"""

    forward: Callable[[Tensor, Tensor, Tensor, Block], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, tuple[Tensor, ...], Block], tuple[Tensor, ...]]


def kernel_for(q: Tensor, masking: Masking, *, compiles: bool = False) -> Kernel:
    """What `scaled_dot_product_attention` would call on this device; but where it has no kernel with a logsumexp, or
    there is dropout, which is ours, or on a GPU a mask, the one that is written out, and holds a block's scores,
    [B, heads, R, C].
    """
    if masking.dropping is None and not q.is_cuda:
        return FLASH_ON_CPU
    if masking == Masking() and q.is_cuda and q.shape[-1] % HEAD_UNIT == 0:
        part = q[..., : max(1, q.shape[-2] // 2), :]  # no block is shorter
        chosen = SDPBackend(torch._fused_sdp_choice(part, part, part, is_causal=True))
        if chosen in ON_GPU:
            return ON_GPU[chosen]
    return written_out(compiles)


# -- any dtype, any mask


def _scores(q: Tensor, k: Tensor, pairs: Pairs) -> Tensor:
    """q[B, heads, R, D], k[B, heads, C, D] -> [B, heads, R, C], in fp32 at least, −inf where nothing is seen"""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores: Tensor = wide_batched_product(q, k.mT, wide).mul_(q.shape[-1] ** -0.5)
    hidden = pairs.hidden()
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, pairs)
    logsumexp = scores.logsumexp(-1).clamp_min(UNSEEN)
    weights = scores.sub_(logsumexp.unsqueeze(-1)).exp_()
    return pairs.dropout()(weights).to(q.dtype) @ v, logsumexp


def _backward(dy: Tensor, saved: tuple[Tensor, ...], pairs: Pairs) -> tuple[Tensor, ...]:
    q, k, v, y, logsumexp = saved
    weights, dropout = _scores(q, k, pairs).sub_(logsumexp.unsqueeze(-1)).exp_(), pairs.dropout()
    dweights = dropout(wide_batched_product(dy, v.mT, weights.dtype))
    inner = (dy.to(weights.dtype) * y).sum(-1, keepdim=True)  # of all keys: Σ weights · dweights
    dscores = dweights.sub_(inner).mul_(weights).mul_(q.shape[-1] ** -0.5).to(q.dtype)
    dv = dropout(weights).to(dy.dtype).mT @ dy
    return dscores @ k, dscores.mT @ q, dv


@cache
def written_out(compiles: bool = False) -> Kernel:
    forward = torch.compile(_forward) if compiles else _forward
    backward = torch.compile(_backward) if compiles else _backward
    return Kernel(
        lambda q, k, v, block: forward(q, k, v, block.pairs(q.device)),
        lambda dy, saved, block: backward(dy, saved, block.pairs(dy.device)),
    )


# -- torch's. Their public face, `scaled_dot_product_attention`, keeps the logsumexp to itself.


def _cpu_mask(q: Tensor, block: Block) -> tuple[Tensor | None, Tensor | None]:
    """What is added to scores, and which rows see nothing; None where there is no mask but causality."""
    if block.masking.tokens is None:
        return None, None
    hidden = block.pairs(q.device).hidden()
    assert hidden is not None
    mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
    return mask.expand(-1, -1, q.shape[-2], -1), hidden.all(-1)


def _flash_on_cpu_forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    mask, blind = _cpu_mask(q, block)
    is_causal = block.is_causal and mask is None
    y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=mask)
    return y, logsumexp if blind is None else logsumexp.masked_fill(blind, UNSEEN)


def _flash_on_cpu_backward(dy: Tensor, saved: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    mask, _ = _cpu_mask(dy, block)
    is_causal = block.is_causal and mask is None
    grads: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dy, *saved, 0.0, is_causal, attn_mask=mask
    )
    return grads


FLASH_ON_CPU = Kernel(_flash_on_cpu_forward, _flash_on_cpu_backward)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    y, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, block.is_causal)
    return y, logsumexp


def _flash_backward(dy: Tensor, saved: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    q, k, v, y, logsumexp = saved
    of_all = q, k, v, y, logsumexp.contiguous()  # the kernel would read past the rows of a part
    no_random = torch.empty(2, dtype=torch.uint64, device=q.device)
    sizes = None, None, q.shape[-2], k.shape[-2]  # of sequences of one length
    grads: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        dy, *of_all, *sizes, 0.0, block.is_causal, no_random, no_random
    )
    return grads


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    y, logsumexp, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, block.is_causal)
    return y, logsumexp.view(y.shape[:-1])


def _cudnn_backward(dy: Tensor, saved: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    q, k, v, y, logsumexp = saved
    no_random = torch.empty((), dtype=torch.int64, device=q.device)
    of_all = q, k, v, y, logsumexp.unsqueeze(-1).contiguous(), no_random, no_random
    no_mask, sizes = None, (None, None, q.shape[-2], k.shape[-2])  # of sequences of one length
    grads: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dy, *of_all, no_mask, *sizes, 0.0, block.is_causal
    )
    return grads


ON_GPU = {
    SDPBackend.FLASH_ATTENTION: Kernel(_flash_forward, _flash_backward),
    SDPBackend.CUDNN_ATTENTION: Kernel(_cudnn_forward, _cudnn_backward),
}
