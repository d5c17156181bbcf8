"""The head and its cross entropy in one call, over a vocabulary that is split (Shoeybi et al. 2019, section 3).

Logits of a few positions are computed at a time, and their gradient at once. So the logits [B, S, V] never exist, and
are not computed twice: the gradients of x and of the embedding are computed in forward, one token slice at a time.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.layout.layout import Layout, index_along
from parallel.mesh.collectives import MAX, Pending, all_reduce
from parallel.mesh.mesh import Axis
from parallel.ops.kernels.cross_entropy import Exchange, VocabularyPart, cross_entropy, multiply_in_place
from parallel.ops.products import add_product, write_product
from parallel.ops.receiver import GradientReceiver
from parallel.tensor.matmul import LinearCollectives, Multiply, received

TOKENS_PER_SLICE = 4096  # tokens of this rank whose logits exist at a time


@dataclass(frozen=True)
class HeadLayout:
    """The mode's description of the head."""

    collectives: LinearCollectives
    """The collectives around the product of x and the embedding."""

    axes: tuple[Axis, ...]
    """The axes that split the vocabulary."""

    vocabulary: Layout
    """The layout of the embedding."""

    @property
    def entries(self) -> range:
        """The vocabulary's entries of this rank, without padding."""
        start, stop = self.vocabulary.box[0]
        first = index_along(self.axes) * self.vocabulary.local_shape[0]
        return range(first, first + stop - start)

    @property
    def exchange(self) -> Exchange | None:
        """The functions with which ranks combine numbers of tokens; None if no other rank has a part of the table."""
        axes = [axis for axis in self.axes if axis.size > 1]

        def largest(x: Tensor) -> Tensor:
            for axis in axes:
                x = all_reduce(x, axis, MAX)
            return x

        def summed(x: Tensor) -> Tensor:
            for axis in axes:
                x = all_reduce(x, axis)
            return x

        return Exchange(largest, summed) if axes else None


@dataclass(frozen=True)
class _Backward:
    """Tells a forward about the backward that will follow.

    `scale` multiplies the gradients. `receiver` is given the table's, if that is not left to autograd.
    """

    scale: float
    receiver: GradientReceiver | None


class _LMLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, e: Tensor, labels: Tensor, head: HeadLayout, backward: _Backward | None) -> Tensor:
        scale, receiver = (None, None) if backward is None else (backward.scale, backward.receiver)
        table = Pending(head.collectives.start_gather_w(e).wait())
        labels = labels.unflatten(1, (-1, x.shape[1]))  # [B, parts, S_length]: those of the rank that has each part
        size = max(1, TOKENS_PER_SLICE // labels[..., 0].numel())
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        is_one_product = size >= x.shape[1] and head.collectives.gather_w.size == 1  # one product, rounded once
        dtype, room = x.dtype if is_one_product else wide, None
        if receiver is not None and head.collectives.gather_w.size == 1:
            room = receiver.room((dtype, wide))
        dx, dw = torch.empty_like(x), torch.empty_like(table.buffer, dtype=dtype) if room is None else room
        for start in range(0, x.shape[1], size):
            tokens = slice(start, start + size)
            multiply = partial(add_product if start else write_product, out=dw)
            loss, in_flight = _token_slice(x[:, tokens], table, labels[..., tokens].flatten(1), head, scale, multiply)
            total += loss
            if in_flight is not None:
                dx[:, tokens] = in_flight.wait()
        if scale is not None:
            if room is None:
                dw = head.collectives.scatter_dw(dw)
                room = None if receiver is None else receiver.room((e.dtype, wide))
                dw = dw.to(e.dtype) if room is None else room.copy_(dw)
            ctx.save_for_backward(dx, dw)
            ctx.receiver = receiver
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        # In place, so that a second backward raises.
        dx, de = (multiply_in_place(grad, grads[0]) for grad in ctx.saved_tensors)
        return dx, received(de, ctx.receiver), None, None, None


def _token_slice(
    x: Tensor, table: Pending, labels: Tensor, head: HeadLayout, scale: float | None, multiply: Multiply
) -> tuple[Tensor, Pending | None]:
    """Return the loss of x[B, s, H] and, with a scale, dx in flight. `multiply` takes the factors of the table's
    gradient. The logits are freed before those of the next slice are computed.
    """
    whole_x = Pending(head.collectives.start_gather_x(x).wait())
    loss, dlogits = cross_entropy(
        head.collectives.wide_product(whole_x, table, torch.promote_types(x.dtype, torch.float32)),
        labels,
        VocabularyPart(head.entries, head.exchange),
        scale=scale,
        dtype=x.dtype,
    )
    return loss, None if dlogits is None else head.collectives.gradients(dlogits, whole_x, table, multiply)[0]


def sum_cross_entropy(
    x: Tensor,
    e: Tensor,
    labels: Tensor,
    head: HeadLayout,
    *,
    scale: float = 1.0,
    receiver: GradientReceiver | None = None,
) -> Tensor:
    """Return the sum of cross entropies over the labels that are counted, in fp32 at least.

    x[B_batch, S_length, H_hidden], e[V_axes, H_k_in], labels[B_inner_batch, S] -> []: the embedding is a linear_in. All
    ranks of `head.axes` get the same sum. Its gradient is multiplied by `scale` (1/count, a loss scale) in fp32, before
    it is cast to a narrower dtype. Where sequences are split, a token slice is a slice of each rank's positions.
    `receiver` is given e's gradient, which is computed in its room if it has any, and autograd then gets none.
    """
    backward = _Backward(scale, receiver if e.requires_grad else None) if torch.is_grad_enabled() else None
    total: Tensor = _LMLoss.apply(x, e, labels, head, backward)  # type: ignore[no-untyped-call]
    return total
