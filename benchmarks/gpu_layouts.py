"""The layouts that `benchmarks.multi_gpu` runs on a number of GPUs, as tables in which a new mode is one more entry.

This module does not import torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

Raw = dict[str, Any]
KINDS = ("ring", "all_to_all")  # the values of parallel.context.kind
SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero_bubble", "zero_bubble_v")  # of parallel.pipeline.schedule
MOST_RANKS_OF_PIPE = 4  # with two stages on each, which is what the small model of the parity jobs can fill


@dataclass(frozen=True)
class Layout:
    """Sections of a config, and how they are measured. A pipeline's microbatches are single samples.

    `peers`: the names in `gpu_peers` of what is trained beside it. `traced`: whether the communication of a step is
    examined. `most`: the most samples in a microbatch, where a peer has no room for more. `longer`: how many times as
    long the samples are as those of other layouts; there are as many times fewer of them.
    """

    name: str
    sections: Raw = field(default_factory=dict)
    peers: tuple[str, ...] = ()
    traced: bool = False
    most: int | None = None
    longer: int = 1

    @property
    def stages(self) -> int:
        size: int = self._parallel.get("pipeline", {}).get("size", 1)
        return size

    @property
    def tensor(self) -> int:
        size: int = self._parallel.get("tensor", {}).get("size", 1)
        return size

    @property
    def context(self) -> int:
        size: int = self._parallel.get("context", {}).get("size", 1)
        return size

    def replicas(self, world: int) -> int:
        return world // (self.stages * self.context * self.tensor)

    @property
    def zero(self) -> int:
        stage: int = self.sections.get("zero", {}).get("stage", 0)
        return stage

    @property
    def _parallel(self) -> Raw:
        found: Raw = self.sections.get("parallel", {})
        return found


def tensor_modes(size: int) -> dict[str, Raw]:
    """Return every tensor mode that this number of ranks can form, by name."""
    found: dict[str, Raw] = {"1d": dict(mode="1d", size=size)}
    if size >= 2:
        rows = _rows(size)
        found[f"2d {rows}×{size // rows}"] = dict(mode="2d", size=size, rows=rows)
    if size >= 4 and isqrt(size) ** 2 == size:
        found["2.5d depth 1"] = dict(mode="2.5d", size=size, depth=1)
    if size % 2 == 0:
        rows = _rows(size // 2)
        found[f"2.5d depth 2 of {rows}×{size // 2 // rows}"] = dict(mode="2.5d", size=size, depth=2, rows=rows)
    edge = round(size ** (1 / 3))
    if edge > 1 and edge**3 == size:
        found["3d"] = dict(mode="3d", size=size)
    return found


def _rows(size: int) -> int:
    """Return the rows of the grid of this size that is nearest to a square and has no more rows than columns."""
    return max(rows for rows in range(1, size + 1) if size % rows == 0 and rows * rows <= size)


def parity_layouts(world: int) -> list[Layout]:
    """Return the layouts whose training is compared with Hugging Face's.

    These are each mode and each schedule by itself, modes with a pipeline of two stages, with two replicas, with every
    ZeRO stage, and with sequences split over ranks.
    """
    found = [Layout("data"), *(Layout(f"ZeRO {stage}", dict(zero=dict(stage=stage))) for stage in (1, 2, 3))]
    found += [Layout(name, dict(parallel=dict(tensor=mode))) for name, mode in tensor_modes(world).items()]
    found.append(
        Layout("1d, sequence", dict(parallel=dict(tensor=dict(mode="1d", size=world, sequence_parallel=True))))
    )
    for schedule in SCHEDULES:
        pipe = dict(size=min(world, MOST_RANKS_OF_PIPE), schedule=schedule)
        found.append(Layout(f"pipeline {schedule}", dict(parallel=dict(pipeline=pipe))))
    for kind in KINDS:
        found.append(Layout(f"context {kind}", dict(parallel=dict(context=dict(size=world, kind=kind)))))
    if world >= 4:
        half = tensor_modes(world // 2).items()
        for kind in KINDS:
            context = dict(size=2, kind=kind)
            found += [
                Layout(f"context {kind} 2 × {n}", dict(parallel=dict(context=context, tensor=m))) for n, m in half
            ]
            found.append(
                Layout(
                    f"context {kind} 2 × pipeline", dict(parallel=dict(context=context, pipeline=dict(size=world // 2)))
                )
            )
            found.append(
                Layout(f"ZeRO 3 of 2 × context {kind}", dict(zero=dict(stage=3), parallel=dict(context=context)))
            )
        found += [Layout(f"pipeline 2 × {n}", dict(parallel=dict(pipeline=dict(size=2), tensor=m))) for n, m in half]
        found += [Layout(f"ZeRO 3 of 2 × {n}", dict(zero=dict(stage=3), parallel=dict(tensor=m))) for n, m in half]
        for stage in (1, 2, 3):
            pipe = dict(zero=dict(stage=stage), parallel=dict(pipeline=dict(size=world // 2)))
            found.append(Layout(f"ZeRO {stage} of 2 × pipeline", pipe))
    return found


def speed_layouts(world: int) -> list[Layout]:
    """Return the layouts whose speed is measured, and the peers beside them."""
    found = [
        Layout("ZeRO 1", dict(zero=dict(stage=1))),
        Layout("ZeRO 2", dict(zero=dict(stage=2)), ("fsdp2_kept",), traced=True),
        Layout("ZeRO 3", dict(zero=dict(stage=3)), ("fsdp2",), traced=True),
    ]
    beside: dict[str, tuple[str, ...]] = {"1d": ("dtensor",)}
    for name, mode in tensor_modes(world).items():
        if name != "2.5d depth 1":  # the same as 2d
            layout = dict(parallel=dict(tensor=mode))
            is_first = name == "1d"  # whose peer makes whole logits
            found.append(Layout(name, layout, beside.get(name, ()), traced=True, most=4 if is_first else None))
    for schedule in SCHEDULES:
        section = dict(parallel=dict(pipeline=dict(size=world, schedule=schedule)))
        found.append(Layout(f"pipeline {schedule}", section, ("pipelining",) if schedule == "1f1b" else ()))
    for kind, peers in (("ring", ("context",)), ("all_to_all", ())):
        sections = dict(zero=dict(stage=2), parallel=dict(context=dict(size=world, kind=kind)))
        found.append(Layout(f"ZeRO 2 × context {kind}", sections, peers, longer=2 * world))
    if world >= 4:
        half = tensor_modes(world // 2)
        found += [
            Layout("ZeRO 1 × 1d 2", dict(zero=dict(stage=1), parallel=dict(tensor=dict(mode="1d", size=2)))),
            Layout("ZeRO 1 × pipeline 2", dict(zero=dict(stage=1), parallel=dict(pipeline=dict(size=2)))),
            Layout("pipeline 2 × 1d", dict(parallel=dict(pipeline=dict(size=2), tensor=half["1d"]))),
        ]
    return found + overlap_layouts(world)


def overlap_layouts(world: int) -> list[Layout]:
    """Return each tensor mode with `overlap`, after the same mode without it where that is not measured otherwise.

    The trace of each says which share of its communication is hidden.
    """
    modes = {name: mode for name, mode in tensor_modes(world).items() if name != "2.5d depth 1"}
    sequence = {"1d, sequence": modes["1d"] | dict(sequence_parallel=True)}
    found = [Layout(name, dict(parallel=dict(tensor=mode)), traced=True, most=4) for name, mode in sequence.items()]
    for name, mode in (modes | sequence).items():
        most = 4 if name.startswith("1d") else None  # as without it
        section = dict(parallel=dict(tensor=mode | dict(overlap=True)))
        found.append(Layout(f"{name}, overlap", section, traced=True, most=most))
    return found


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
    in_flight = layout.stages  # microbatches whose activations a stage keeps at once, of its share of the layers
    share = in_flight / (layout.stages * layout.tensor * layout.context)
    return next((f for f in choices if activations(f.micro, f.recompute) * share < room), None)


def _halves(most: int, least: int) -> list[int]:
    """Return `most`, its half, its quarter and so on, as long as they are whole numbers and no less than `least`."""
    found = [most]
    while found[-1] % 2 == 0 and found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found


def state_bytes(layout: Layout, world: int, parameters: float, largest_layer: float) -> float:
    """Return the bytes of parameters, gradients and optimizer states on a GPU, in bf16 with fp32 master weights.

    A parameter takes 2 bytes, its gradient 4, its master weight and moments 12, sharded as the ZeRO stage says. Beside
    the shards there are the gradients of three layers in flight and, in stage 3, the parameters of three layers.
    """
    own = parameters / (layout.stages * layout.tensor)
    slices = world // (layout.stages * layout.tensor)
    passing = largest_layer / layout.tensor
    whole = {0: 18.0, 1: 6.0, 2: 2.0, 3: 0.0}[layout.zero]
    divided = (18.0 - whole) / slices
    return own * (whole + divided) + passing * {0: 0.0, 1: 0.0, 2: 12.0, 3: 18.0}[layout.zero]
