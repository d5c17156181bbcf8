"""The `parallel` section: how a model is split over ranks, and which splits can be laid out."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from parallel.config.reader import Built, Count, Natural
from parallel.errors import either, nearest_multiples, times

TensorMode = Literal["1d", "2d", "2.5d", "3d"]


@dataclass(frozen=True)
class PipelineConfig:
    size: Count = 1
    schedule: Annotated[Literal["gpipe", "1f1b", "interleaved", "zero_bubble"], Built("gpipe", "1f1b")] = "1f1b"
    layers: tuple[Natural, ...] | None = None
    chunks: Annotated[Count | None, Built(None)] = None

    def problems(self) -> list[str]:
        """What is wrong with the layers of each stage; whether they add up is for who knows the model."""
        if self.layers is None:
            return []
        if len(self.layers) != self.size:
            stages = len(self.layers)
            return [
                f"parallel.pipeline.layers: {self.layers} is for {stages} stages, got size {self.size}."
                f" Try size={stages}."
            ]
        if 0 in self.layers[1:-1]:
            stage = self.layers.index(0, 1)
            return [
                f"parallel.pipeline.layers: {self.layers} leaves stage {stage} empty; only the first, which has the"
                " embedding, and the last, which has the head, may have no layers. Try at least 1."
            ]
        return []


@dataclass(frozen=True)
class TensorConfig:
    mode: TensorMode | None = None
    size: Count = 1
    depth: Count = 1
    rows: Count | None = None
    sequence_parallel: Annotated[bool, Built(False)] = False

    @property
    def _form(self) -> tuple[int, int]:
        """(unit, power): the sizes that can be laid out are unit × k ** power."""
        match self.mode:
            case "2d" | "2.5d":
                return (self.depth * self.rows, 1) if self.rows else (self.depth, 2)
            case "3d":
                return 1, 3
            case _:
                return 1, 1

    def _neighbours(self) -> tuple[int, int]:
        """The largest size that can be laid out and is at most `size`, or 0, and the next one."""
        unit, power = self._form
        root = round((self.size // unit) ** (1 / power))
        root -= root**power > self.size // unit
        return unit * root**power, unit * (root + 1) ** power

    def fits(self) -> bool:
        """Whether `size` ranks can be laid out in this mode."""
        return self._neighbours()[0] == self.size and (self.size == 1 or self.mode is not None)

    def axes(self) -> dict[str, int]:
        """The mode's axes of the mesh, from the outside in; none where the mode is serial."""
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
        """Into how many parts the mode splits a microbatch: depth × row, or w × i (as many as w × o)."""
        axes = self.axes()
        return axes.get("depth", 1) * axes.get("row", 1) * axes.get("w", 1) * axes.get("i", 1)

    def problems(self) -> list[str]:
        """What keeps `size` from being laid out."""
        found = []
        if self.depth != 1 and self.mode != "2.5d":
            found.append(f"parallel.tensor.depth: {self.depth} needs mode '2.5d', got {self.mode!r}. Try depth=1.")
        if self.rows is not None and self.mode not in ("2d", "2.5d"):
            found.append(
                f"parallel.tensor.rows: {self.rows} needs mode '2d' or '2.5d', got {self.mode!r}. Try rows=None."
            )
        if not found and not self.fits():
            found.append(f"parallel.tensor: {self._misfit()}")
        return found

    def _misfit(self) -> str:
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
        axes = self.axes()
        return "×".join(str(size) for axis, size in axes.items() if axis != "depth" or self.mode == "2.5d")


@dataclass(frozen=True)
class ContextConfig:
    size: Count = 1
    kind: Literal["ring", "all_to_all"] = "ring"

    @property
    def parts(self) -> int:
        """Into how many parts a sequence is split, all of one length: in a ring, each rank has two of them."""
        return 1 if self.size == 1 else 2 * self.size if self.kind == "ring" else self.size

    def splits(self, sequence_length: int) -> bool:
        """Whether a sequence comes out even."""
        return sequence_length % self.parts == 0

    def sizes(self, sequence_length: int) -> list[int]:
        """Those that split a sequence evenly, in this way."""
        return [n for n in range(1, sequence_length + 1) if replace(self, size=n).splits(sequence_length)]


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is split; what is left of the world size is data parallel."""

    pipeline: PipelineConfig = PipelineConfig()
    tensor: TensorConfig = TensorConfig()
    context: ContextConfig = ContextConfig()

    @property
    def model_size(self) -> int:
        """The ranks that share one replica of the model."""
        return self.pipeline.size * self.context.size * self.tensor.size

    def mesh_shape(self, world_size: int) -> dict[str, int]:
        """The size of each axis of the mesh, from the outside in; `data` takes what the others leave of the world."""
        assert world_size % self.model_size == 0
        return {
            "pipe": self.pipeline.size,
            "data": world_size // self.model_size,
            "context": self.context.size,
            **self.tensor.axes(),
        }

    def problems(self) -> list[str]:
        return self.pipeline.problems() + self.tensor.problems()

    def world_problems(self, world_size: int) -> list[str]:
        """Whether replicas fill the world."""
        if world_size % self.model_size == 0:
            return []
        sizes = {"pipeline": self.pipeline.size, "context": self.context.size, "tensor": self.tensor.size}
        product = times(**{name: size for name, size in sizes.items() if size > 1})
        start = either(nearest_multiples(world_size, self.model_size))
        return [
            f"parallel: world size {world_size} is not a multiple of {product}."
            f" Start {start} processes{self._smaller(world_size)}."
        ]

    def _smaller(self, world_size: int) -> str:
        """The largest tensor size, or else pipeline size, that this world has room for."""
        for size in range(min(self.tensor.size - 1, world_size), 0, -1):
            tensor = replace(self.tensor, size=size)
            if tensor.fits() and world_size % (self.model_size // self.tensor.size * size) == 0:
                return f", or set tensor.size={size}"
        for size in range(min(self.pipeline.size - 1, world_size), 0, -1):
            if world_size % (self.model_size // self.pipeline.size * size) == 0:
                return f", or set pipeline.size={size}"
        for size in range(min(self.context.size - 1, world_size), 0, -1):
            if world_size % (self.model_size // self.context.size * size) == 0:
                return f", or set context.size={size}"
        return ""
