"""The layouts that `benchmarks.multi_gpu` runs on a number of GPUs, as tables in which a new mode is one more entry.

This module does not import torch.
"""

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

    `peers`, `peers_of_fp8`: the names in `gpu_peers` of what is trained beside it, in bf16 and with linears in 8 bits.
    `traced`: whether the communication of a step is examined. `most`: the most samples in a microbatch, where a peer
    has no room for more. `longer`: how many times as long the samples are as those of other layouts; there are as many
    times fewer of them. `comes_first`: whether it is measured before all layouts that do not, with every model
    and every length of a sample.
    """

    name: str
    sections: Raw = field(default_factory=dict)
    peers: tuple[str, ...] = ()
    peers_of_fp8: tuple[str, ...] = ()
    traced: bool = False
    most: int | None = None
    longer: int = 1
    comes_first: bool = False

    @property
    def stages(self) -> int:
        size: int = self._parallel.get("pipeline", {}).get("size", 1)
        return size

    @property
    def schedule(self) -> str:
        name: str = self._parallel.get("pipeline", {}).get("schedule", "1f1b")
        return name

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

    def peers_in(self, precision: str) -> tuple[str, ...]:
        return self.peers_of_fp8 if precision == "fp8" else self.peers

    @property
    def zero(self) -> int:
        stage: int = self.sections.get("zero", {}).get("stage", 0)
        return stage

    def exists_in(self, precision: str) -> bool:
        """Return whether it trains in this precision: products in 8 bits have no slices that could overlap."""
        return precision != "fp8" or not self._parallel.get("tensor", {}).get("overlap", False)

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


def _sequence(size: int, **more: Any) -> Raw:
    return dict(mode="1d", size=size, sequence_parallel=True) | more


# -- compared with one process ----------------------------------------------------------------------------------------


def parity_layouts(world: int) -> list[Layout]:
    """Return the layouts whose training is compared with Hugging Face's.

    These are each mode and each schedule by itself, modes with a pipeline of two stages, with two replicas, with every
    ZeRO stage, and with sequences split over ranks; on 8 ranks also three axes at once.
    """
    found = [*layouts_of_each_family(world), Layout("data")]
    found += [Layout(f"ZeRO {stage}", dict(zero=dict(stage=stage))) for stage in (1, 2)]
    found += [Layout(name, dict(parallel=dict(tensor=mode))) for name, mode in tensor_modes(world).items()]
    found += _overlapping(world)
    for schedule in SCHEDULES:
        pipe = dict(size=min(world, MOST_RANKS_OF_PIPE), schedule=schedule)
        found.append(Layout(f"pipeline {schedule}", dict(parallel=dict(pipeline=pipe))))
    for kind in KINDS:
        found.append(Layout(f"context {kind}", dict(parallel=dict(context=dict(size=world, kind=kind)))))
    if world >= 4:
        found += _of_two_axes(world)
    if world >= 8:
        found += _of_three_axes(world)
    return list({layout.name: layout for layout in found}.values())


def layouts_of_each_family(world: int) -> list[Layout]:
    """Return the layouts in which every family is compared: one of each kind."""
    modes = tensor_modes(world)
    deepest = next(name for name in modes if name.startswith("2.5d depth 2"))
    found = [Layout("1d, sequence", dict(parallel=dict(tensor=_sequence(world))))]
    names = [next(name for name in modes if name.startswith("2d")), deepest, *(["3d"] if "3d" in modes else [])]
    found += [Layout(name, dict(parallel=dict(tensor=modes[name]))) for name in names]
    pipe = dict(size=min(world, MOST_RANKS_OF_PIPE), schedule="zero_bubble_v")
    found.append(Layout("pipeline zero_bubble_v", dict(parallel=dict(pipeline=pipe))))
    found.append(Layout("ZeRO 3", dict(zero=dict(stage=3))))
    found.append(Layout("context ring", dict(parallel=dict(context=dict(size=world, kind="ring")))))
    return found


def _overlapping(world: int) -> list[Layout]:
    """Return each tensor mode with `overlap`."""
    modes = tensor_modes(world) | {"1d, sequence": _sequence(world)}
    return [
        Layout(f"{name}, overlap", dict(parallel=dict(tensor=mode | dict(overlap=True))))
        for name, mode in modes.items()
        if name != "2.5d depth 1"
    ]


def _of_two_axes(world: int) -> list[Layout]:
    half, found = tensor_modes(world // 2).items(), []
    for kind in KINDS:
        context = dict(size=2, kind=kind)
        found += [Layout(f"context {kind} 2 × {n}", dict(parallel=dict(context=context, tensor=m))) for n, m in half]
        pipe = dict(context=context, pipeline=dict(size=world // 2))
        found.append(Layout(f"context {kind} 2 × pipeline", dict(parallel=pipe)))
        found.append(Layout(f"ZeRO 3 of 2 × context {kind}", dict(zero=dict(stage=3), parallel=dict(context=context))))
    found += [Layout(f"pipeline 2 × {n}", dict(parallel=dict(pipeline=dict(size=2), tensor=m))) for n, m in half]
    found += [Layout(f"ZeRO 3 of 2 × {n}", dict(zero=dict(stage=3), parallel=dict(tensor=m))) for n, m in half]
    for schedule in ("1f1b", "zero_bubble_v"):
        for stage in (1, 2, 3):
            pipe = dict(size=min(world // 2, MOST_RANKS_OF_PIPE), schedule=schedule)
            name = f"ZeRO {stage} of 2 × pipeline{'' if schedule == '1f1b' else f' {schedule}'}"
            found.append(Layout(name, dict(zero=dict(stage=stage), parallel=dict(pipeline=pipe))))
    return found


def _of_three_axes(world: int) -> list[Layout]:
    quarter, found = tensor_modes(world // 4), []
    for (name, mode), stage in zip(quarter.items(), (1, 2, 3), strict=False):
        pipe = dict(size=2, schedule="zero_bubble_v")
        sections = dict(zero=dict(stage=stage), parallel=dict(pipeline=pipe, tensor=mode))
        found.append(Layout(f"ZeRO {stage} of 2 × zero_bubble_v 2 × {name}", sections))
    split = _sequence(world // 4)
    for kind in KINDS:
        parallel = dict(context=dict(size=2, kind=kind), pipeline=dict(size=2), tensor=split)
        found.append(Layout(f"context {kind} 2 × pipeline 2 × 1d, sequence", dict(parallel=parallel)))
        parallel = dict(context=dict(size=2, kind=kind), tensor=split)
        found.append(
            Layout(f"ZeRO 3 of 2 × context {kind} 2 × 1d, sequence", dict(zero=dict(stage=3), parallel=parallel))
        )
    return found


def fp8_layouts(world: int) -> list[Layout]:
    """Return the layouts whose error in 8 bits is compared with that of one rank."""
    modes = tensor_modes(world)
    found = [Layout(f"ZeRO {stage}", dict(zero=dict(stage=stage))) for stage in (2, 3)]
    found += [
        Layout(name, dict(parallel=dict(tensor=mode)))
        for name, mode in ({"1d, sequence": _sequence(world)} | modes).items()
        if name != "2.5d depth 1"
    ]
    for schedule in ("1f1b", "zero_bubble_v"):
        pipe = dict(size=min(world, MOST_RANKS_OF_PIPE), schedule=schedule)
        found.append(Layout(f"pipeline {schedule}", dict(parallel=dict(pipeline=pipe))))
    found += [Layout(f"context {k}", dict(parallel=dict(context=dict(size=world, kind=k)))) for k in KINDS]
    if world >= 4:
        parallel = dict(tensor=_sequence(world // 2))
        found.append(Layout("ZeRO 3 of 2 × 1d, sequence", dict(zero=dict(stage=3), parallel=parallel)))
        parallel = dict(pipeline=dict(size=2, schedule="zero_bubble_v"), tensor=_sequence(world // 2))
        found.append(Layout("zero_bubble_v 2 × 1d, sequence", dict(parallel=parallel)))
    return found


# -- whose speed is measured ------------------------------------------------------------------------------------------

PEERS_OF_SCHEDULES = {"1f1b": "pipelining", "gpipe": "pipelining_gpipe", "interleaved": "pipelining_interleaved"}
PEERS_OF_SCHEDULES |= {"zero_bubble": "pipelining_zero_bubble", "zero_bubble_v": "pipelining_v"}


def speed_layouts(world: int) -> list[Layout]:
    """Return the layouts whose speed is measured, and the peers beside them."""
    compiled = dict(train=dict(compile=True))
    found = [
        Layout("ZeRO 2", dict(zero=dict(stage=2)), ("fsdp2_kept",), ("torchao_kept",), traced=True, comes_first=True),
        Layout("ZeRO 3", dict(zero=dict(stage=3)), ("fsdp2",), ("torchao",), traced=True, comes_first=True),
        *_of_1d(world),
    ]
    for schedule in SCHEDULES:
        section = dict(parallel=dict(pipeline=dict(size=world, schedule=schedule)))
        peer = (PEERS_OF_SCHEDULES[schedule],)
        found.append(Layout(f"pipeline {schedule}", section, peer, comes_first=schedule in ("1f1b", "zero_bubble_v")))
    for kind, peers in (("ring", ("context",)), ("all_to_all", ())):
        sections = dict(zero=dict(stage=2), parallel=dict(context=dict(size=world, kind=kind)))
        name = f"ZeRO 2 × context {kind}"
        found.append(Layout(name, sections, peers, longer=2 * world, comes_first=True))
    for name, mode in tensor_modes(world).items():
        if name not in ("1d", "2.5d depth 1"):  # the latter is the same as 2d
            found.append(Layout(name, dict(parallel=dict(tensor=mode)), traced=True, comes_first=name == "3d"))
            overlaps = dict(parallel=dict(tensor=mode | dict(overlap=True)))
            found.append(Layout(f"{name}, overlap", overlaps, traced=True))
    found += [
        Layout("ZeRO 1", dict(zero=dict(stage=1))),
        Layout("ZeRO 2, compiled", dict(zero=dict(stage=2)) | compiled, ("fsdp2_kept_compiled",)),
        Layout("ZeRO 3, compiled", dict(zero=dict(stage=3)) | compiled, ("fsdp2_compiled",)),
    ]
    if world >= 4:
        found += _of_several(world)
    return found


def _of_1d(world: int) -> list[Layout]:
    """Return 1d with and without sequence parallelism and overlap. A peer of it makes whole logits: so `most` is 4."""
    plain: Raw = dict(mode="1d", size=world)
    peers = {"1d": ("dtensor",), "1d, sequence": ("dtensor_sequence", "dtensor_async")}
    found = []
    for name, mode in (("1d", plain), ("1d, sequence", _sequence(world))):
        for overlaps in (False, True):
            section = dict(parallel=dict(tensor=mode | (dict(overlap=True) if overlaps else {})))
            beside = () if overlaps else peers[name]
            title = f"{name}, overlap" if overlaps else name
            found.append(Layout(title, section, beside, traced=True, most=4, comes_first=True))
    return found


def _of_several(world: int) -> list[Layout]:
    one, pipe = dict(mode="1d", size=2), dict(size=2)
    return [
        Layout("ZeRO 1 × 1d 2", dict(zero=dict(stage=1), parallel=dict(tensor=one))),
        Layout("ZeRO 1 × pipeline 2", dict(zero=dict(stage=1), parallel=dict(pipeline=pipe))),
        Layout("pipeline 2 × 1d", dict(parallel=dict(pipeline=pipe, tensor=tensor_modes(world // 2)["1d"]))),
    ]


ALONE = Layout("alone")
OFFLOADED = Layout("ZeRO 3 on the host", dict(zero=dict(stage=3, tensor_placement_policy="cpu")))


def weak_layouts() -> list[Layout]:
    """Return the layouts whose speed on all GPUs is compared with that of one GPU."""
    return [Layout(f"ZeRO {stage}", dict(zero=dict(stage=stage)), traced=True) for stage in (2, 3)]
