"""The scales of the 8-bit numbers in which linears multiply, from the largest magnitudes of the steps before.

A maximum over a tensor that is split, or whose replicas have other samples, is one over all of its ranks. Asking for it
before each product would stop the device each time. So a linear uses the scales that were known when the step began,
records the largest magnitudes that it sees, and at the end of the step one collective brings all of them together
(delayed scaling: Micikevicius et al. 2022, arXiv 2209.05433, section 3.3). All scales stay the same during a step: a
recomputation rounds as the forward did.
"""

from dataclasses import dataclass

from torch import Tensor


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
