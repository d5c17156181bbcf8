"""What fits into the memory of a GPU, by estimate: how many samples at once, and whether they are recomputed.

This module does not import torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu_layouts import Layout


@dataclass(frozen=True)
class Fit:
    """The number of samples in a microbatch, and whether activations are recomputed."""

    micro: int
    recompute: bool


def fit(layout: Layout, world: int, batch: int, activations: Callable[[int, bool], float], room: float) -> Fit | None:
    """Return the largest microbatch whose activations fit, without recomputation if possible; None where none fits.

    `activations`: the bytes of the activations of a number of samples, recomputed or not, on one GPU that has a whole
    model. `room`: the bytes that are free for them.
    """
    most = 1 if layout.stages > 1 else batch // layout.replicas(world)
    if layout.stages > 1 and layout.tensor > 1:
        most = layout.tensor
    most = min(most, max(layout.most or most, layout.tensor))
    choices = [Fit(micro, recompute) for micro in _halves(most, layout.tensor) for recompute in (False, True)]
    split = layout.stages * layout.tensor * layout.context

    def share(micro: int) -> float:
        return _in_flight(layout, batch // layout.replicas(world) // micro) / split

    return next((f for f in choices if activations(f.micro, f.recompute) * share(f.micro) < room), None)


def _in_flight(layout: Layout, microbatches: int) -> int:
    """Return for how many microbatches a stage keeps the activations of its share of the layers at once."""
    most = {"gpipe": microbatches, "interleaved": 2 * layout.stages, "zero_bubble": 2 * layout.stages}
    return min(max(1, microbatches), most.get(layout.schedule, layout.stages))


def _halves(most: int, least: int) -> list[int]:
    """Return `most`, its half, its quarter and so on, as long as they are whole numbers and no less than `least`."""
    found = [most]
    while found[-1] % 2 == 0 and found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found


def state_bytes(layout: Layout, world: int, parameters: float, largest_layer: float, precision: str = "bf16") -> float:
    """Return the bytes of parameters, gradients and optimizer states on a GPU, in bf16 with fp32 master weights.

    A parameter takes 2 bytes, its gradient 4, its master weight and moments 12, sharded as the ZeRO stage says. Beside
    the shards there are the gradients of three layers in flight and, in stage 3, the parameters of three layers. In fp8
    there are two copies of a weight in 8 bits, or one slice of it in stage 3.
    """
    own = parameters / (layout.stages * layout.tensor)
    slices = world // (layout.stages * layout.tensor)
    passing = largest_layer / layout.tensor
    whole = {0: 18.0, 1: 6.0, 2: 2.0, 3: 0.0}[layout.zero]
    divided = (18.0 - whole) / slices
    if precision == "fp8":
        whole, divided = (whole, divided + 1.0 / slices) if layout.zero == 3 else (whole + 2.0, divided)
    return own * (whole + divided) + passing * {0: 0.0, 1: 0.0, 2: 12.0, 3: 18.0}[layout.zero]
