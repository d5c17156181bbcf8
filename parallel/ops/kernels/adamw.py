"""AdamW on consecutive elements, in one pass over them (Loshchilov and Hutter 2019, algorithm 2).

For each element, with the gradient g times the clip factor, the master weight w, the moments m and v, and the number t
of updates with this one:

    m ← m + (1 − β1) · (g − m)
    v ← v + (1 − β2) · (g² − v)
    w ← w − lr · decay · w − lr / (1 − β1^t) · m / (√v / √(1 − β2^t) + eps)

and the parameter is w in its own dtype. Where the step is to be left out, no bit changes. `update_in_torch` is the
reference: it widens and scales the gradient, calls torch's fused Adam kernel, and copies the weights into the
parameters. The kernel reads and writes each number once. With a gradient and parameters of 2 bytes and states in fp32
it moves 28 bytes for each element, where these four passes move 46; with moments in bf16 it moves 20.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from parallel.config import OptimizerConfig
from parallel.ops.kernels.elements import Elements, Step
from parallel.ops.kernels.table import is_fused

MOMENTS = frozenset({torch.float32, torch.bfloat16})


def can_be_fused(gradient: Tensor, states: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Return whether the kernel takes these tensors. Parameters on another device are copied from the weights later."""
    master, *moments = states
    is_taken = master.dtype == torch.float32 and all(x.dtype in MOMENTS for x in moments)
    return is_taken and all(x.device == gradient.device for x in states) and is_fused("adamw", gradient)


def update_fused(many: Sequence[Elements], step: Step, config: OptimizerConfig) -> None:
    """Update all of these elements, which are on one GPU, with few launches."""
    from parallel.ops.kernels.adamw_triton import launch_update  # imports Triton

    launch_update(many, step, config)


def update_in_torch(elements: Elements, step: Step, config: OptimizerConfig) -> None:
    """Update these elements, whose states have one dtype. Their gradient may be changed."""
    master, first, second = elements.states
    adamw(
        [master],
        [scaled(elements.gradient, step.factor, master.dtype)],
        [first],
        [second],
        [],
        [torch.full((), elements.updates - 1.0, device=master.device)],
        fused=True,
        found_inf=step.found_inf,
        amsgrad=False,
        beta1=config.betas[0],
        beta2=config.betas[1],
        lr=step.lr,
        weight_decay=elements.decay,
        eps=config.eps,
        maximize=False,
    )
    if elements.own is not None:
        elements.own.copy_(master)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient[n] · factor[] in `dtype`: the gradient itself, changed in place, if that is its dtype."""
    wide = [gradient]
    if gradient.dtype != dtype:
        wide = [torch.empty_like(gradient, dtype=dtype)]
        torch._foreach_copy_(wide, [gradient])  # faster than `to`
    torch._foreach_mul_(wide, factor.to(dtype))
    return wide[0]
