"""The first number that is not finite in the forwards and backwards of a step, and the layer where it began."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parallel.activations.recompute import Recomputed
from parallel.chunk.chunk import Chunk
from parallel.layout.finite import is_finite, not_finite, share_text
from parallel.layout.layout import ParameterInfo
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis
from parallel.ops.compiling import not_compiled
from parallel.watch.process import host_name

Direction: TypeAlias = Literal["forward", "backward"]


@dataclass(frozen=True)
class Finding:
    """The first number of a rank that is not finite, in the forwards or in the backwards of one pipeline stage.

    `time` counts what the rank has checked before. `module` is the innermost one that has computed the number. `rank`
    and `host` are those of the process. `is_own`: it is a weight of which this rank has the number itself, and has not
    got it from another rank.
    """

    direction: Direction
    stage: int
    microbatch: int
    module: str
    what: str
    time: int
    is_own: bool = False
    rank: int = 0
    host: str = ""

    def __str__(self) -> str:
        place = f"rank {self.rank} on {self.host}, microbatch {self.microbatch}"
        return f"it began on {place}, in the {self.direction} of {self.module}: {self.what}."


class FirstNotFinite:
    """Checks every number of a step while it is computed: the output of each module, the gradient at it, and the
    gradient of each parameter on this rank, before the sum over ranks.

    The first in time counts, since everything that follows from it is not finite either: forwards before backwards, and
    earlier stages of a pipeline before later ones, in backwards the other way around. On a rank with several stages the
    first number of each is kept, since the rank may compute a later stage of one microbatch before an earlier stage of
    another. Where several ranks have the number at the same time, by a collective within a module, the one counts that
    has the weight which it came from.

    The host waits for the device at every check, so this is for a step that has failed. `stage` and `microbatch` are
    set by whoever runs the step. `names`: those of modules that are to be called otherwise than by their place in
    `root`.
    """

    def __init__(self, root: nn.Module, chunks: Sequence[Chunk], names: Mapping[nn.Module, str] | None = None) -> None:
        self.stage = self.microbatch = 0
        self._root, self._names = root, names or {}
        self._chunk_of = {info.parameter: (chunk, info) for chunk in chunks for info in chunk.infos}
        self._found: dict[tuple[Direction, int], Finding] = {}
        self._time = 0
        self._consumer = "the loss"  # the module whose backward is running: the last one with a finite gradient

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Check the modules' numbers in the block."""
        names = {module: name or "the model" for name, module in self._root.named_modules()}
        for outer, name in self._names.items():
            layer = outer.layer if isinstance(outer, Recomputed) else outer
            names |= {outer: name, **{part: f"{name}.{path}".rstrip(".") for path, part in layer.named_modules()}}
        hooks = [self._root.register_forward_pre_hook(self._before_root, with_kwargs=True)]
        hooks += [module.register_forward_hook(partial(self._after, name)) for module, name in names.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def arrived(self, info: ParameterInfo, gradient: Tensor) -> None:
        """Check the gradient of a parameter that has been computed on this rank, or the sum of it so far."""
        self._time += 1
        if not self._has_found("backward") and not is_finite(gradient):
            name = " and ".join(info.names)
            self._note("backward", info.unit or self._consumer, f"the gradient of {name} is not finite", gradient)

    def first_of_all_ranks(self, world: Axis) -> Finding | None:
        """Return the first finding of all ranks, the same on each; None where all numbers were finite.

        Every rank calls this.
        """
        own = [replace(x, rank=world.rank, host=host_name()) for x in self._found.values()]
        everywhere: list[Finding] = [x for found in gather_objects(own, world) for x in found]
        return min(everywhere, key=_in_time, default=None)

    @not_compiled
    def _before_root(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not _is_in_backward() and not self._are_finite(_tensors((args, kwargs))):
            self._note("forward", "the model", "its input is not finite")

    @not_compiled
    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Check what a module returns, and have the gradient checked that arrives there."""
        if _is_in_backward():  # a recomputation
            return
        tensors = list(_tensors(output))
        if not self._are_finite(tensors):
            self._note_forward(name, module)
        for x in tensors:
            if x.requires_grad:
                x.register_hook(partial(self._after_gradient, name))

    def _after_gradient(self, name: str, gradient: Tensor) -> None:
        self._time += 1
        if self._has_found("backward"):
            return
        if is_finite(gradient):
            self._consumer = name
        else:
            self._note("backward", self._consumer, "the gradient of its input is not finite, though its output's is")

    def _note_forward(self, name: str, module: nn.Module) -> None:
        """Note that a module's output is not finite: because of a weight of its own, or without one."""
        if self._has_found("forward"):
            return
        weights = list(self._weights(module))
        for text, is_own in sorted(weights, key=lambda found: not found[1])[:1]:
            self._note("forward", name, f"its weight {text}")
            key: tuple[Direction, int] = "forward", self.stage
            self._found[key] = replace(self._found[key], is_own=is_own)
        self._note("forward", name, "its output is not finite, though its inputs and weights are")

    def _weights(self, module: nn.Module) -> Iterator[tuple[str, bool]]:
        """Yield the weights of a module that are not finite, as text, and whether this rank has the number itself."""
        for parameter in module.parameters():
            if parameter not in self._chunk_of:
                continue
            chunk, info = self._chunk_of[parameter]
            chunk.parameters.written.synchronize()
            own = chunk.spec.segments(chunk.parameters.own)
            for piece in not_finite(x for segment in own if segment.info is info for x in segment.pieces(segment.data)):
                yield f"{piece.name} is not finite ({share_text(piece.data)})", True
            if chunk.parameters.is_whole:
                whole = next(x for x in chunk.spec.segments(chunk.parameters.whole) if x.info is info)
                for piece in not_finite(whole.pieces(whole.data)):
                    yield f"{piece.name} is not finite ({share_text(piece.data)})", False

    def _are_finite(self, tensors: Iterable[Tensor]) -> bool:
        self._time += 1
        return all(bool(is_finite(x)) for x in tensors)

    def _note(self, direction: Direction, module: str, what: str, of: Tensor | None = None) -> None:
        """Note a finding, if it is the first of this stage in this direction."""
        if not self._has_found(direction):
            what += "" if of is None else f" ({share_text(of)})"
            found = Finding(direction, self.stage, self.microbatch, module, what, self._time)
            self._found[direction, self.stage] = found

    def _has_found(self, direction: Direction) -> bool:
        return (direction, self.stage) in self._found


def _in_time(found: Finding) -> tuple[bool, int, int, bool, int]:
    """Return the key by which findings of several ranks are in order of time."""
    is_backward = found.direction == "backward"
    return is_backward, -found.stage if is_backward else found.stage, found.time, not found.is_own, found.rank


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point())


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() >= 0
