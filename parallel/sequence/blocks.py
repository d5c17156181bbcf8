"""Attention of some queries to some keys, forward and backward: what the whole is put together from.

A forward returns, beside y[B, heads, R, D], the logsumexp of each query's scores, [B, heads, R]. A backward is given
those of all keys, y too, and returns what these keys contribute to the gradients (Dao et al. 2022, "FlashAttention",
appendix B.4: nothing else of the other keys is needed).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.rng import dropout

UNSEEN = -1e30  # the logsumexp of no score at all: finite, so that differences of two are numbers


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

    @property
    def is_empty(self) -> bool:
        return self.tokens is None and self.dropping is None


@dataclass(frozen=True)
class Block:
    """Queries at the positions `rows` of a sequence of `length` tokens, R of them, and keys at `columns`, C, in order.
    `is_causal`: a query sees the keys up to its own position; else all of these.
    """

    rows: tuple[range, ...]
    columns: tuple[range, ...]
    length: int
    is_causal: bool
    masking: Masking = field(default_factory=Masking)

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """rows[R] and columns[C], int64"""
        rows, columns = (
            torch.cat([torch.arange(part.start, part.stop, device=device) for part in parts])
            for parts in (self.rows, self.columns)
        )
        return rows, columns

    def hidden(self, device: torch.device) -> Tensor | None:
        """[B or 1, 1, R or 1, C]: whether a query does not see a key; None where it sees all."""
        tokens, hidden = self.masking.tokens, None
        rows, columns = self.places(device)
        if self.is_causal:
            hidden = (rows.unsqueeze(1) < columns)[None, None]
        if tokens is not None:
            empty = ~tokens[:, columns][:, None, None]
            hidden = empty if hidden is None else hidden | empty
        return hidden

    def dropped(self, like: Tensor) -> Tensor | None:
        """like's shape, [B, heads, R, C]: 0, or what makes up for it; None without dropout."""
        drop = self.masking.dropping
        if drop is None:
            return None
        rows, columns = self.places(like.device)
        return dropout(torch.ones_like(like), drop.p, drop.key, drop.lines.unsqueeze(-1) * self.length + rows, columns)


@dataclass(frozen=True)
class Kernel:
    """forward(q, k, v, block) -> (y, logsumexp); backward(dy, (q, k, v, y, logsumexp), block) -> (dq, dk, dv)"""

    forward: Callable[[Tensor, Tensor, Tensor, Block], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, tuple[Tensor, ...], Block], tuple[Tensor, ...]]


def kernel_for(q: Tensor, masking: Masking) -> Kernel:
    """torch's own where there is one that does it; the other holds a block's scores, [B, heads, R, C]."""
    if not masking.is_empty:
        return WRITTEN_OUT
    if not q.is_cuda:
        return FLASH_ON_CPU
    return FLASH if q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 else WRITTEN_OUT


# -- any dtype, any mask


def _scores(q: Tensor, k: Tensor, block: Block) -> Tensor:
    """q[B, heads, R, D], k[B, heads, C, D] -> [B, heads, R, C], in fp32 at least, −inf where nothing is seen"""
    scores: Tensor = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    hidden = block.hidden(q.device)
    return scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)


def _forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, block)
    logsumexp = scores.logsumexp(-1).clamp_min(UNSEEN)
    weights = scores.sub_(logsumexp.unsqueeze(-1)).exp_()
    dropped = block.dropped(weights)
    return (weights if dropped is None else weights * dropped).to(q.dtype) @ v, logsumexp


def _backward(dy: Tensor, saved: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    q, k, v, y, logsumexp = saved
    weights = _scores(q, k, block).sub_(logsumexp.unsqueeze(-1)).exp_()
    dropped, dweights = block.dropped(weights), (dy @ v.mT).to(weights.dtype)
    if dropped is not None:
        dweights *= dropped
    dv = (weights if dropped is None else weights * dropped).to(dy.dtype).mT @ dy
    inner = (dy.to(weights.dtype) * y).sum(-1, keepdim=True)  # of all keys: Σ weights · dweights
    dscores = ((dweights - inner) * weights * q.shape[-1] ** -0.5).to(q.dtype)
    return dscores @ k, dscores.mT @ q, dv


WRITTEN_OUT = Kernel(_forward, _backward)


# -- torch's: no mask, no dropout. Their public face, `scaled_dot_product_attention`, keeps the logsumexp to itself.


def _flash_on_cpu_forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, block.is_causal)
    return y, logsumexp


def _flash_on_cpu_backward(dy: Tensor, saved: tuple[Tensor, ...], block: Block) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dy, *saved, 0.0, block.is_causal
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


FLASH = Kernel(_flash_forward, _flash_backward)
