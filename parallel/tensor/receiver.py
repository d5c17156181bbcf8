"""The receiver of a weight's gradient: where a matmul's backward adds it, in that backward or later."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from parallel.ops.deferred import DeferredCalls
from parallel.ops.products import Factor


@dataclass(frozen=True)
class GradientReceiver:
    """Takes the gradient of one weight W[N', K''], so that autograd gets none.

    A matmul whose weight has a receiver calls one of the two functions once for each backward: at once or, where
    `deferred` keeps calls, in `run_deferred`.
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
