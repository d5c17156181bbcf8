"""Gradients and master weights: what lies between a backward and an updated parameter."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.collectives import all_reduce
from parallel.config import OptimizerConfig
from parallel.layout import ParameterInfo, Piece
from parallel.mesh import Axis


class Gradients:
    """The gradient of each parameter, summed over microbatches and then over ranks, in fp32 at least.

    Parameters whose gradients are summed over the same axes share one flat buffer, which is reduced where it lies. It
    is made by a step's first backward and given up with its gradients: while activations pile up there is none.
    """

    def __init__(self, infos: Sequence[ParameterInfo]) -> None:
        self.infos = infos
        self.sums: list[Tensor] = []  # by parameter, views of the buffers; none between steps
        self._buffers: list[tuple[tuple[Axis, ...], Tensor]] = []
        self._sharing: dict[tuple[Axis, ...], list[int]] = defaultdict(list)
        for i, info in enumerate(infos):
            self._sharing[tuple(axis for axis in info.layout.sync if axis.size > 1)].append(i)

    def absorb(self) -> None:
        """Move what the last backward left in `.grad` into the sums."""
        is_first = not self.sums
        if is_first:
            self._begin()
        for info, total in zip(self.infos, self.sums, strict=True):
            grad, info.parameter.grad = info.parameter.grad, None
            if grad is None:
                grad = torch.zeros_like(info.parameter)
            if is_first:
                total.copy_(grad)
            else:
                total.add_(grad)

    def reduce(self) -> list[Tensor]:
        """Each gradient summed over its layout's axes; the sums start anew."""
        for axes, buffer in self._buffers:
            for axis in axes:
                all_reduce(buffer, axis, in_place=True)
        sums, self.sums, self._buffers = self.sums, [], []
        return sums

    def _begin(self) -> None:
        sums: dict[int, Tensor] = {}
        for axes, indices in self._sharing.items():
            parameters = [self.infos[i].parameter for i in indices]
            sizes = [parameter.numel() for parameter in parameters]
            buffer = parameters[0].new_empty(sum(sizes), dtype=master_dtype(parameters[0].dtype))
            self._buffers.append((axes, buffer))
            for i, parameter, part in zip(indices, parameters, buffer.split(sizes), strict=True):
                sums[i] = part.view_as(parameter)
        self.sums = [sums[i] for i in range(len(self.infos))]


class AdamW:
    """torch's AdamW on master weights in fp32 (fp64 for an fp64 model), with decay on matrices only.

    Parameters come in master precision. Those of a bf16 model become roundings of masters that are kept apart; wider
    ones are their own masters.
    """

    def __init__(self, infos: Sequence[ParameterInfo], config: OptimizerConfig, dtype: torch.dtype) -> None:
        self.infos = infos
        self.masters = [info.parameter.detach() for info in infos]
        for info, master in zip(infos, self.masters, strict=True):
            info.parameter.data = master.to(dtype)
        decayed = [m for info, m in zip(infos, self.masters, strict=True) if info.is_matrix]
        others = [m for info, m in zip(infos, self.masters, strict=True) if not info.is_matrix]
        groups = [dict(params=decayed, weight_decay=config.weight_decay), dict(params=others, weight_decay=0.0)]
        self.inner = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )

    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = lr
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        self.inner.step()
        for master in self.masters:
            master.grad = None
        self._narrow()

    def pieces(self) -> dict[str, list[Piece]]:
        """The masters and both moments, as pieces of public tensors: views, to be saved or filled."""
        found: dict[str, list[Piece]] = {"master": [], "exp_avg": [], "exp_avg_sq": []}
        for info, master in zip(self.infos, self.masters, strict=True):
            state = self._state(master)
            for kind in found:
                found[kind] += info.pieces(master if kind == "master" else state[kind])
        return found

    def restore(self, steps: int) -> None:
        """Take the masters and moments as they are now, filled through `pieces`, as those after `steps` updates."""
        for master in self.masters:
            self._state(master)["step"].fill_(steps)
        self._narrow()

    def _narrow(self) -> None:
        """Make the parameters roundings of their masters again, where they are kept apart."""
        if self.masters[0].dtype != self.infos[0].parameter.dtype:
            torch._foreach_copy_([info.parameter.data for info in self.infos], self.masters)

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.inner.state[master]
        if not state:  # as torch itself starts it, at the first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
        return state


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision in which a parameter of this dtype is summed and updated: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)
