"""The scales of the 8-bit numbers in which linears multiply, from the largest magnitudes of the steps before.

A maximum over a tensor that is split, or whose replicas have other samples, is one over all of its ranks. Asking for it
before each product would stop the device each time. So a linear uses the scales that were known when the step began,
records the largest magnitudes that it sees, and at the end of the step one collective brings all of them together
(delayed scaling: Micikevicius et al. 2022, arXiv 2209.05433, section 3.3). All scales stay the same during a step: a
recomputation rounds as the forward did.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from parallel.mesh.collectives import MAX, all_reduce
from parallel.mesh.mesh import Axis
from parallel.ops.fp8 import E4M3, E5M2, SCALE_ALIGNMENT, scale_for

WINDOW = 16
"""The steps whose largest magnitudes decide about the scales of the next one."""

Histories: TypeAlias = Mapping[str, Tensor]
"""The largest magnitudes in the last steps, fp32 [WINDOW, 3] of x, weight and dy, by the public names of a weight."""


@dataclass(frozen=True, eq=False)
class TensorScale:
    """The scale of one tensor of a linear: of its input, its weight, or its output's gradient.

    All are fp32 scalars on the device, and views that stay the same objects from step to step.

    scale    what a value is multiplied by before it is rounded: a power of 2
    inverse  1 / scale, at an address that is a multiple of `SCALE_ALIGNMENT`
    amax     the largest magnitude that this rank has seen in the step so far, which whoever casts the tensor raises
    """

    scale: Tensor
    inverse: Tensor
    amax: Tensor


@dataclass(frozen=True, eq=False)
class LinearScales:
    """The scales of the three tensors of a linear: x and weight in E4M3, dy in E5M2.

    `state` is shared by all linears of a rank.
    """

    x: TensorScale
    weight: TensorScale
    dy: TensorScale
    state: "ScalingState"


@dataclass
class ScalingState:
    """The state that all linears of a rank have in common.

    is_known   False before the first step that recorded maxima: linears multiply in bf16 then, and record
    records    whether maxima are recorded: in the steps of a training, not in an evaluation
    """

    is_known: bool = False
    records: bool = False


class Copies(Protocol):
    """Copies of weights in 8 bits."""

    def clear(self) -> None:
        """Drop them, since the weights or their scales may have changed."""


class Scaling:
    """The scales of all linears of a rank that multiply in 8 bits, stacked in a few tensors on the device.

    history   [WINDOW, linears, 3]  the largest magnitudes of the last steps, the newest at the end; 0 where none is
    amax      [linears, 3]          those that this rank has seen in the step so far
    scales    [linears, 3]          the powers of 2 of this step, and `inverses`

    The last dim is x, weight and dy. `linears` has the views of each of them, in the order of `names`, which are the
    public names of their weights. `axes`: all axes over which one of the three tensors is split, or its replicas have
    other values. A pipeline stage has linears of its own. `copies` of weights last for a step or an evaluation.
    """

    def __init__(self, names: Sequence[tuple[str, ...]], axes: Sequence[Axis], device: torch.device) -> None:
        self.names, self.axes, self.state = list(names), list(axes), ScalingState()
        self.history = torch.zeros(WINDOW, len(names), 3, device=device)
        self.amax = torch.zeros(len(names), 3, device=device)
        self.scales = torch.ones(len(names), 3, device=device)
        self.inverses = torch.ones(len(names), 3, SCALE_ALIGNMENT // 4, device=device)[..., 0]  # aligned
        self.linears = [self._views(i) for i in range(len(names))]
        self.copies: list[Copies] = []

    @contextmanager
    def casting(self, *, records: bool) -> Iterator[None]:
        """Let weights be cast once in the block, in which they do not change; `records`: and maxima be recorded."""
        self._clear()
        if records:
            self.amax.zero_()
        self.state.records = records
        try:
            yield
        finally:
            self.state.records = False
            self._clear()

    @torch.no_grad()
    def end_step(self, found_inf: Tensor) -> None:
        """Bring the maxima of all ranks into the history, and the scales of the next step from it.

        Where the scalar `found_inf` is not 0, the step updates nothing and the history stays as it was; the device
        decides it, and the host does not wait. A single maximum that is not finite is left out: that of the window
        stays in its place. Every rank of the axes calls this.
        """
        largest = self.amax.nan_to_num(nan=torch.inf, posinf=torch.inf)  # MAX may lose a NaN, but no infinity
        for axis in self.axes:
            largest = all_reduce(largest, axis, MAX)
        newest = torch.where(largest.isfinite(), largest, self.history.amax(0))
        moved = torch.cat([self.history[1:], newest.unsqueeze(0)])
        self.history.copy_(torch.where(found_inf > 0, self.history, moved))
        self._rescale()

    def take_outcome(self, *, is_updated: bool) -> None:
        """Note whether the step of the last `end_step` has updated the weights: the scales are known if one has."""
        self.state.is_known |= is_updated

    def forget(self) -> None:
        """Go back to the state before the first step: the weights are others than those whose maxima were recorded."""
        self.history.zero_()
        self.state.is_known = False
        self._rescale()

    def histories(self) -> dict[str, Tensor]:
        """Return a copy of the history on the host by public names; nothing before the scales are known."""
        if not self.state.is_known:
            return {}
        history = self.history.cpu()
        return {name: history[:, i].clone() for i, names in enumerate(self.names) for name in names}

    def restore(self, saved: Histories) -> None:
        """Go on from what `histories` returned on the ranks that had these linears; without any as before a step."""
        self.forget()
        if not saved:
            return
        for i, names in enumerate(self.names):
            self.history[:, i] = torch.stack([saved[name] for name in names]).amax(0)
        self.state.is_known = True
        self._rescale()

    def _rescale(self) -> None:
        """Set the scales to those that follow from the history, in place."""
        largest = self.history.amax(0)
        torch.cat([scale_for(largest[:, :2], E4M3), scale_for(largest[:, 2:], E5M2)], 1, out=self.scales)
        torch.reciprocal(self.scales, out=self.inverses)

    def _clear(self) -> None:
        for copy in self.copies:
            copy.clear()

    def _views(self, i: int) -> LinearScales:
        x, weight, dy = (TensorScale(self.scales[i, k], self.inverses[i, k], self.amax[i, k]) for k in range(3))
        return LinearScales(x, weight, dy, self.state)


def is_history(value: object) -> bool:
    """Return whether a value that was read from a checkpoint has the form of `Histories`."""
    return isinstance(value, dict) and all(
        isinstance(name, str)
        and isinstance(history, Tensor)
        and history.shape == (WINDOW, 3)
        and history.dtype == torch.float32
        and bool((history.isfinite() & (history >= 0)).all())
        for name, history in value.items()
    )
