"""The receiver of a weight's gradient: where the backward that computes it adds it, then or later."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.ops.deferred import DeferredCalls
from parallel.ops.products import Factor


@dataclass(frozen=True)
class GradientReceiver:
    """Takes the gradient of one weight W[N', K''], so that autograd gets none.

    Each use of a weight with a receiver, by a matmul, a lookup or the head, calls one of the functions `add` once for
    each backward: at once or, where `deferred` keeps a matmul's calls, in `run_deferred`.
    """

    deferred: DeferredCalls
    """Keeps the computation of the gradient for later, in the part of a backward that is to compute none."""

    add_product: Callable[[Factor, Factor], None]
    """Adds the product of two factors, [N', T] and [T, K'']: the matmul itself adds it to the sum, if it can."""

    add: Callable[[Tensor], None]
    """Adds a gradient, [N', K'']."""

    handle: Tensor | None = None
    """Stands for the receiver in compiled code: see parallel/tensor/compiled.py. With None compiled code ends a graph
    at the matmul, whose backward may keep the gradient of the weight for later."""

    add_rows: Callable[[Tensor, Tensor], None] | None = None
    """Adds a gradient as keys[T] and dy[..., K''], the summands of rows; see `kernels.lookup.add_rows`."""

    room: Callable[[Collection[torch.dtype]], Tensor | None] = lambda dtypes: None
    """Returns the place of the sum, [N', K''], for a gradient that is computed before it is added: `add` then need not
    copy it. None where the gradient is to be in memory of its own, as where the sum has none of these dtypes."""


def gradient_to(receiver: GradientReceiver | None, w: Tensor) -> Tensor:
    """Return w[N', K''], whose gradient is given to the receiver if there is one: autograd then gets none."""
    if receiver is None:
        return w
    y: Tensor = _GradientTo.apply(w, receiver)  # type: ignore[no-untyped-call]
    return y


class _GradientTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, receiver: GradientReceiver) -> Tensor:
        ctx.receiver = receiver
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        ctx.receiver.add(gradients[0])
        return None, None
