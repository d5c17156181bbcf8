"""The heads of attention are cut out of the joint output of q's, k's and v's linear, and turned by their positions.

Rotary positions (Su et al. 2021, arXiv 2104.09864): the pair (x[i], x[i + D/2]) of a head is turned by an angle of its
token's position. `rotated` is the reference. `heads_of` turns q and k and puts each head where attention reads it, in
one pass; its backward joins the gradients of q, k and v, turned back, and sums the bias's gradient, in one pass.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor

Tables: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines [B or 1, 1, S, R] of the first R dims of each head; both halves of them are the same."""


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x[B, heads, S, D], each pair (x[i], x[i + D/2]) turned by its angle; the tables are [B or 1, 1, S, D].

    If the tables are narrower than a head, its first elements are turned and the others stay, as in GPT-NeoX.
    """
    if (size := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rotated(x[..., :size], cos, sin), x[..., size:]), -1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def parts_of(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return q[B, S, kv heads, group, D] and k, v[B, S, kv heads, D], views of the joint linear's output qkv[B, S, F].

    With as many k, v heads as q heads the features are all of q, of k and of v; else q's, k's and v's of each group
    follow one another. The output is cut along its last dim, so that in backward the gradients are joined by one copy.
    """
    group, size = heads // kv_heads, qkv.shape[-1] // (heads + 2 * kv_heads)
    if group == 1:
        q, k, v = (part.unflatten(-1, (-1, size)) for part in qkv.chunk(3, -1))
    else:
        q, k, v = qkv.unflatten(-1, (kv_heads, -1)).split([group * size, size, size], -1)
    return q.unflatten(-1, (group, size)) if group > 1 else q.unsqueeze(3), k, v


def by_head(x: Tensor) -> Tensor:
    """Return x[B, S, ..., D] as [B, heads, S, D]: a view, but for q's part of grouped q, k and v."""
    return x.flatten(2, -2).transpose(1, 2)


def heads_of(
    qkv: Tensor, heads: int, kv_heads: int, *, bias: Tensor | None, tables: Tables | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q[B, heads, S, D] and k, v[B, kv_heads, S, D] of qkv[B, S, F], the output of a linear with this bias.

    q and k are turned if there are tables. Gradients flow to qkv, joined, and to the bias, as if it had been added
    here. With as many k, v heads as q heads all three are views of qkv, which is changed in place: nobody else may
    need it. Otherwise they are views of one new tensor.
    """
    q, k, v = _Heads.apply(qkv, bias, tables, heads, kv_heads)  # type: ignore[no-untyped-call]
    return q, k, v


def compiled_heads_of(qkv: Tensor, heads: int, kv_heads: int, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as `heads_of`, for code that is being compiled: in new memory, with a gradient for qkv alone."""
    q, k, v = _CompiledHeads.apply(qkv, *tables, heads, kv_heads)  # type: ignore[no-untyped-call]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def turned(x: Tensor, tables: Tables) -> Tensor:
    """Return x[B, S, ..., D] as [B, heads, S, D], turned."""
    y: Tensor = _Turned.apply(x, tables)  # type: ignore[no-untyped-call]
    return y


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, bias: Tensor | None, tables: Tables | None, heads: int, kv_heads: int
    ) -> tuple[Tensor, ...]:
        from parallel.ops.kernels.heads_triton import launch_heads  # imports Triton

        qkv = qkv.detach().contiguous()
        ctx.save_for_backward(*(tables or ()))
        ctx.heads, ctx.kv_heads = heads, kv_heads
        is_grouped = heads != kv_heads
        out = torch.empty_like(qkv) if is_grouped else qkv
        size = qkv.shape[-1] // (heads + 2 * kv_heads)
        q, k, v = (x.transpose(1, 2) for x in out.unflatten(-1, (-1, size)).split([heads, kv_heads, kv_heads], 2))
        if is_grouped or tables is not None:
            launch_heads(qkv, (q, k, v), tables, moves_v=is_grouped)
        return q, k, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        from parallel.ops.kernels.heads_triton import launch_heads_backward

        dqkv, db = launch_heads_backward((dq, dk, dv), ctx.saved_tensors or None, sums=ctx.needs_input_grad[1])
        return dqkv, db, None, None, None


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tables: Tables) -> Tensor:
        from parallel.ops.kernels.heads_triton import launch_heads

        ctx.save_for_backward(*tables)
        ctx.shape = x.shape
        joint = x.contiguous().flatten(2)
        y: Tensor = torch.empty_like(joint).unflatten(-1, (-1, x.shape[-1])).transpose(1, 2)
        launch_heads(joint, (y,), tables)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        from parallel.ops.kernels.heads_triton import launch_heads_backward

        dx, _ = launch_heads_backward((dy,), ctx.saved_tensors)
        return dx.view(ctx.shape), None


# -- in compiled code --------------------------------------------------------------------------------------------------


class _CompiledHeads(torch.autograd.Function):
    """Computes `compiled_heads_of` by operators: q[B, S, heads, D] and k, v[B, S, kv_heads, D]."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k, v = torch.ops.colonnade.heads(qkv, cos, sin, heads, kv_heads)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return torch.ops.colonnade.heads_backward(dq, dk, dv, cos, sin), None, None, None, None


# torch's registry of operators has them from the import on: code that is being compiled cannot register one.
torch.library.define(
    "colonnade::heads", "(Tensor qkv, Tensor cos, Tensor sin, int heads, int kv_heads) -> (Tensor, Tensor, Tensor)"
)
torch.library.define("colonnade::heads_backward", "(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin) -> Tensor")


def _empty_heads(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    size = qkv.shape[-1] // (heads + 2 * kv_heads)
    q, k, v = (qkv.new_empty(*qkv.shape[:-1], count, size) for count in (heads, kv_heads, kv_heads))
    return q, k, v


@torch.library.impl("colonnade::heads", "CompositeExplicitAutograd")
def _heads_operator(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    from parallel.ops.kernels.heads_triton import launch_heads

    found = _empty_heads(qkv, cos, sin, heads, kv_heads)
    launch_heads(qkv.contiguous(), [x.transpose(1, 2) for x in found], (cos, sin))
    return found


@torch.library.impl("colonnade::heads_backward", "CompositeExplicitAutograd")
def _heads_backward_operator(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    from parallel.ops.kernels.heads_triton import launch_heads_backward

    dqkv, _ = launch_heads_backward([x.transpose(1, 2) for x in (dq, dk, dv)], (cos, sin))
    return dqkv


torch.library.register_fake("colonnade::heads", _empty_heads)
torch.library.register_fake(
    "colonnade::heads_backward",
    lambda dq, dk, dv, cos, sin: dq.new_empty(*dq.shape[:2], sum(x.shape[2] * x.shape[3] for x in (dq, dk, dv))),
)
