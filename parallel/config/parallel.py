"""The `parallel` section of a config: how a model is split over ranks, and which splits are possible."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Literal

from parallel.config.other_names import OTHER_SCHEDULES
from parallel.config.reader import Count, NamesOrFile, Natural, NumRanks
from parallel.config.schedule_file import ScheduleFile
from parallel.errors import divisors, either, nearest_multiples, times

TensorMode = Literal["1d", "2d", "2.5d", "3d"]

ONE, TWO, ANY = range(1, 2), range(2, 3), range(1, 2**40 + 1)
STAGES_OF_RANK: Mapping[str, range] = MappingProxyType(
    {"gpipe": ONE, "1f1b": ONE, "interleaved": ANY[1:], "zero_bubble": ONE, "zero_bubble_v": TWO}
)
"""The numbers of stages that a rank can have, by schedule; the lowest is the default. A schedule's file has any."""

SCHEDULE_FILE = ".csv"

MOST_RANKS_SEARCHED = 2**40  # the largest world for which sizes that divide it are searched


@dataclass(frozen=True)
class PipelineConfig:
    """`parallel.pipeline`: consecutive layers are one stage, and the stages pass microbatches on to one another.

    `parallel.pipeline=2` is short for `parallel.pipeline=dict(size=2)`.
    """

    size: NumRanks = 1
    """The number of ranks along the pipe. Each holds `chunks` stages, which is one with most schedules."""

    schedule: Annotated[str, NamesOrFile(tuple(STAGES_OF_RANK), SCHEDULE_FILE, OTHER_SCHEDULES, ScheduleFile.read)] = (
        "1f1b"
    )
    """The order of forwards, backwards and weight gradients. "gpipe": all forwards, then all backwards. "1f1b": one
    forward, one backward in turn; the same idle time, and a stage keeps activations of at most `size` microbatches,
    which is why it is the default. "interleaved": 1f1b over several stages on each rank; less idle time, more messages.
    "zero_bubble" (ZB-H1): weight gradients are computed where a rank would wait; about a third of the idle time.
    "zero_bubble_v" (ZB-V): the same with two stages on each rank, the first of which goes down the ranks and the second
    up; nearly no idle time. Or the path of a .csv file with a schedule of one's own.
    """

    layers: tuple[Natural, ...] | None = None
    """The number of blocks on each stage in the order of the model, such as (1, 3): size × chunks numbers. Their sum is
    the model's number of blocks; only the first stage, which has the embedding, and the last, which has the head, may
    have none. None: blocks are divided so that the slowest stage is as fast as possible, by the cost of each layer.
    """

    chunks: Count | None = None
    """The number of stages on each rank. None: 2 for "interleaved" and "zero_bubble_v", else 1. "interleaved" can have
    any number from 2 on; the more, the less idle time and the more messages.
    """

    @property
    def _allowed_chunks(self) -> range:
        return STAGES_OF_RANK.get(self.schedule, ANY)

    @property
    def num_chunks(self) -> int:
        """The number of stages on each rank: `chunks`, or what the schedule has by default, or its file."""
        if self.file is not None:
            return len(self.file.stages[0])
        return self.chunks or self._allowed_chunks[0]

    @property
    def file(self) -> ScheduleFile | None:
        """The schedule, where it is a file: it also says which stages are on which rank."""
        return self.schedule if isinstance(self.schedule, ScheduleFile) else None

    @property
    def num_stages(self) -> int:
        """The number of stages of the whole model."""
        return self.size * self.num_chunks

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages on a rank of the pipe: r, r + p, ...; in a V they turn at the last rank, r and 2p − 1 − r.

        A schedule's file has a placement of its own.

        A V is Qi et al. 2023, arXiv 2401.10241, section 6; the other placement is that of Narayanan et al. 2021,
        arXiv 2104.04473, section 2.2.2.
        """
        if self.file is not None:
            return self.file.stages[rank]
        if self.schedule == "zero_bubble_v":
            return rank, 2 * self.size - 1 - rank
        return tuple(range(rank, self.num_stages, self.size))

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The stages on each rank of the pipe."""
        return tuple(map(self.stages_of, range(self.size)))

    def rank_of(self, stage: int) -> int:
        """Return the rank of the pipe that holds a stage."""
        return next(rank for rank, stages in enumerate(self.stages) if stage in stages)

    def problems(self) -> list[str]:
        """Return what is wrong with `chunks` for this schedule; the stages' layers are checked with the model's."""
        if self.file is not None:
            return self._file_problems(self.file)
        allowed = self._allowed_chunks
        if self.num_chunks in allowed:
            return []
        stages = f"{'at least ' * (len(allowed) > 1)}{allowed[0]} stage{'s' * (allowed[0] > 1)}"
        is_zero_bubble = self.schedule.startswith("zero_bubble")
        similar = ("zero_bubble", "zero_bubble_v", "interleaved") if is_zero_bubble else ("1f1b", "interleaved")
        other = next(name for name in similar if self.num_chunks in STAGES_OF_RANK[name])
        return [
            f"parallel.pipeline.chunks: schedule {self.schedule!r} has {stages} on each rank, got"
            f" {self.num_chunks}. Try chunks={allowed[0]}, or schedule={other!r}."
        ]

    def _file_problems(self, file: ScheduleFile) -> list[str]:
        """Return where the other keys say something else than the schedule's file."""
        found, ranks, chunks = [], len(file.stages), self.num_chunks
        if self.size != ranks:
            found.append(
                f"parallel.pipeline.size: {self.schedule} has {ranks} row{'s' * (ranks > 1)}, one for each rank, got"
                f" {self.size}. Try {ranks}."
            )
        if self.chunks not in (None, chunks):
            found.append(
                f"parallel.pipeline.chunks: {self.schedule} has {chunks} on each rank, got {self.chunks}. Try"
                f" chunks={chunks}, or None."
            )
        return found


@dataclass(frozen=True)
class TensorConfig:
    """`parallel.tensor`: the matrices of every layer, and its activations, are split over ranks."""

    mode: TensorMode | None = None
    """The kind of split. "1d": along one direction, as in Megatron-LM. "2d": over a grid of rows × columns (Optimus).
    "2.5d": over grids at several depths, each with its own part of the batch (Tesseract). "3d": over a cube. None: not
    at all; then `size` is 1. "sequence" is read as `parallel.context` of this size (`parsing.py`).
    """

    size: NumRanks = 1
    """The number of ranks that share each layer. 1d: any number. 2d: a square, or a multiple of `rows`. 2.5d: `depth`
    times a square, or a multiple of `depth` × `rows`. 3d: a cube. It must also divide the model: 1d the heads and
    ffn_dim; 2d and 2.5d the heads by columns, and every width by rows and by columns; 3d the heads by the cube's edge,
    and every width by the square of the edge. The vocabulary is padded instead.
    """

    depth: NumRanks = 1
    """The number of grids, for 2.5d alone. Each depth has all weights and its own part of the batch."""

    rows: NumRanks | None = None
    """The number of rows of each grid, for 2d and 2.5d alone; there are size / (depth × rows) columns. None: as many
    rows as columns.
    """

    sequence_parallel: bool = False
    """True: 1d also splits activations between blocks, along the sequence (Korthikanti et al. 2022, arXiv 2205.05198).
    A rank keeps a `size`-th of them for backward, and sends as much as without it, but for each linear's input, which
    backward gathers a second time. `size` must divide `data.sequence_length`; in context parallelism, the share of it
    that a rank of the context axis has.
    """

    overlap: bool = False
    """True: the collectives around each linear are in slices, of which one is in flight while another is multiplied.
    As many bytes are sent, in more calls. A slice has at least 256 tokens, rows or columns: smaller models have few or
    none. False, since two GPUs that were measured gained nothing from it (docs/benchmarks.md).
    """

    @property
    def kind(self) -> str | None:
        """The mode's name in the table of modes, which has 1d with sequence parallelism as a mode of its own."""
        return f"{self.mode}, sequence parallel" if self.sequence_parallel else self.mode

    @property
    def length_parts(self) -> int:
        """The number of parts into which the mode splits a sequence between blocks."""
        return self.size if self.sequence_parallel else 1

    @property
    def _form(self) -> tuple[int, int]:
        """The pair (unit, power): the sizes that this mode can have are unit × k ** power, for whole numbers k."""
        match self.mode:
            case "2d" | "2.5d":
                return (self.depth * self.rows, 1) if self.rows else (self.depth, 2)
            case "3d":
                return 1, 3
            case _:
                return 1, 1

    def _neighbours(self) -> tuple[int, int]:
        """Return the largest size that this mode can have and is at most `size`, or 0, and the next larger one."""
        unit, power = self._form
        root = round((self.size // unit) ** (1 / power))
        root -= root**power > self.size // unit
        return unit * root**power, unit * (root + 1) ** power

    def fits(self) -> bool:
        """Return whether this mode can have `size` ranks."""
        return self._neighbours()[0] == self.size and (self.size == 1 or self.mode is not None)

    def axes(self) -> dict[str, int]:
        """Return the size of each axis that the mode has in the mesh, outermost first; without a mode there is none."""
        assert self.fits()
        match self.mode:
            case "1d":
                return {"t": self.size}
            case "2d" | "2.5d":
                plane = self.size // self.depth
                rows = self.rows or math.isqrt(plane)
                return {"depth": self.depth, "row": rows, "col": plane // rows}
            case "3d":
                return dict.fromkeys(("i", "w", "o"), round(self.size ** (1 / 3)))
            case _:
                return {}

    @property
    def batch_parts(self) -> int:
        """The number of parts into which the mode splits a microbatch: depth × row, or w × i (as many as w × o)."""
        axes = self.axes()
        return axes.get("depth", 1) * axes.get("row", 1) * axes.get("w", 1) * axes.get("i", 1)

    def problems(self) -> list[str]:
        """Return what is wrong with `size`, `depth` and `rows` in this mode, each with a value that would work."""
        found = []
        if self.depth != 1 and self.mode != "2.5d":
            found.append(f"parallel.tensor.depth: {self.depth} needs mode '2.5d', got {self.mode!r}. Try depth=1.")
        if self.rows is not None and self.mode not in ("2d", "2.5d"):
            found.append(
                f"parallel.tensor.rows: {self.rows} needs mode '2d' or '2.5d', got {self.mode!r}. Try rows=None."
            )
        if self.sequence_parallel and self.mode != "1d":
            found.append(
                f"parallel.tensor.sequence_parallel: True needs mode '1d', got {self.mode!r}. Try False, or mode='1d'."
            )
        if self.overlap and self.mode is None:
            found.append("parallel.tensor.overlap: True needs a tensor mode, got None. Try False, or mode='1d'.")
        if not found and not self.fits():
            found.append(f"parallel.tensor: {self._misfit()}")
        return found

    def _misfit(self) -> str:
        """Return why this mode cannot have `size` ranks, and the nearest sizes that it can have."""
        if self.mode is None:
            modes = [mode for mode in ("1d", "2d", "2.5d", "3d") if replace(self, mode=mode).fits()]
            return f"size {self.size} needs a mode. Try mode={either(map(repr, modes))}."
        unit, power = self._form
        nearest = [replace(self, size=size) for size in self._neighbours() if size]
        tries = either(f"{tensor.size} ({tensor._picture()})" for tensor in nearest)
        if power == 1:
            factors = {"depth": self.depth, "rows": unit // self.depth}
            needs = f"a multiple of {times(**{name: factor for name, factor in factors.items() if factor > 1})}"
        elif power == 3:
            needs = "a cubic size"
        else:
            needs = "a square size" if unit == 1 else f"a size of depth {unit} × a square"
            if self.size % unit == 0:
                plane = self.size // unit
                rows = next(rows for rows in range(math.isqrt(plane), 0, -1) if plane % rows == 0)
                tries += f", or rows={rows} for {replace(self, rows=rows)._picture()}"
        return f"mode {self.mode!r} needs {needs}, got {self.size}. Try {tries}."

    def _picture(self) -> str:
        """Return the axes' sizes as text, such as 2×3 for 2 rows and 3 columns."""
        axes = self.axes()
        return "×".join(str(size) for axis, size in axes.items() if axis != "depth" or self.mode == "2.5d")


@dataclass(frozen=True)
class ContextConfig:
    """`parallel.context`: every sequence is split over ranks (context parallelism). Only attention communicates.

    `parallel.context=4` is short for `parallel.context=dict(size=4)`.
    """

    size: NumRanks = 1
    """The number of ranks that share each sequence. Twice this number must divide `data.sequence_length` in a ring; the
    number itself must divide it with "all_to_all", and the heads too, beside the parts into which the tensor mode
    splits them.
    """

    kind: Literal["ring", "all_to_all"] = "ring"
    """The way in which queries reach the keys of other ranks. "ring": keys and values are passed from rank to rank, and
    a rank attends to one block while the next one is in flight. "all_to_all" (DeepSpeed-Ulysses): ranks exchange
    positions for heads before attention, and back after it; it sends less. "ring" is the default since any number of
    heads will do.
    """

    @property
    def parts(self) -> int:
        """The number of parts of equal length into which a sequence is split; in a ring each rank has two of them."""
        return 1 if self.size == 1 else 2 * self.size if self.kind == "ring" else self.size

    def splits(self, sequence_length: int) -> bool:
        """Return whether a sequence of this length can be split into parts of equal length."""
        return sequence_length % self.parts == 0


@dataclass(frozen=True)
class ParallelConfig:
    """The section `parallel`: data parallel size = world size ÷ (pipeline × context × tensor)."""

    pipeline: PipelineConfig = PipelineConfig()
    """Splits the model's layers into stages."""

    tensor: TensorConfig = TensorConfig()
    """Splits each layer's matrices and activations."""

    context: ContextConfig = ContextConfig()
    """Splits each sequence."""

    @property
    def model_size(self) -> int:
        """The number of ranks that together hold one replica of the model."""
        return self.pipeline.size * self.context.size * self.tensor.size

    @property
    def sequence_parts(self) -> int:
        """The number of which the length of a sequence must be a multiple: context splits it, and then 1d's `size`."""
        return math.lcm(self.context.parts, self.context.size * self.tensor.length_parts)

    def context_sizes(self, sequence_length: int) -> list[int]:
        """Return the values of `context.size` with which a sequence of this length is split evenly."""
        layouts = {n: replace(self, context=replace(self.context, size=n)) for n in divisors(sequence_length)}
        return [n for n, layout in layouts.items() if sequence_length % layout.sequence_parts == 0]

    def mesh_shape(self, world_size: int) -> dict[str, int]:
        """Return the size of each axis of the mesh, outermost first; `data` is the world size ÷ the other sizes."""
        assert world_size % self.model_size == 0
        return {
            "pipe": self.pipeline.size,
            "data": world_size // self.model_size,
            "context": self.context.size,
            **self.tensor.axes(),
        }

    def problems(self) -> list[str]:
        """Return what is wrong with these sizes in any world."""
        return self.pipeline.problems() + self.tensor.problems()

    def world_problems(self, world_size: int) -> list[str]:
        """Return what is wrong if this many ranks are not a whole number of replicas."""
        if world_size % self.model_size == 0:
            return []
        sizes = {"pipeline": self.pipeline.size, "context": self.context.size, "tensor": self.tensor.size}
        product = times(**{name: size for name, size in sizes.items() if size > 1})
        start = either(nearest_multiples(world_size, self.model_size))
        return [
            f"parallel: world size {world_size} is not a multiple of {product}."
            f" Start {start} processes{self._smaller(world_size)}."
        ]

    def _divides(self, world_size: int) -> bool:
        """Return whether this many ranks are a whole number of replicas."""
        return world_size % self.model_size == 0

    def _smaller(self, world_size: int) -> str:
        """Return, as the end of a sentence, the largest tensor, pipeline or context size that this world allows."""
        if world_size > MOST_RANKS_SEARCHED:
            return ""
        for size in reversed(divisors(world_size)):
            tensor = replace(self.tensor, size=size)
            if size < self.tensor.size and tensor.fits() and replace(self, tensor=tensor)._divides(world_size):
                return f", or set tensor.size={size}"
        for size in reversed(divisors(world_size)):
            fewer = replace(self, pipeline=replace(self.pipeline, size=size))
            if size < self.pipeline.size and fewer._divides(world_size):
                return f", or set pipeline.size={size}"
        for size in reversed(divisors(world_size)):
            fewer = replace(self, context=replace(self.context, size=size))
            if size < self.context.size and fewer._divides(world_size):
                return f", or set context.size={size}"
        return ""
