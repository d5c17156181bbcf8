"""A copy of a module without values: what code does to the copy is recorded, and computed one tensor at a time."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.layout.layout import Piece, slices
from parallel.mesh.collectives import all_reduce
from parallel.mesh.mesh import Axis
from parallel.modules.lazy import HOST, Constant
from parallel.modules.python_access import PythonAccess
from parallel.modules.recorder import Recorder

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_pre_hooks")


@dataclass(frozen=True, eq=False)
class OwnedPieces:
    """A tensor of which each element is in the pieces of one rank of the axis; these are the ones of this rank."""

    pieces: Sequence[Piece]
    axis: Axis

    def gather(self, out: Tensor) -> Tensor:
        """All-gather the whole tensor into `out`, of any dtype, and return it; every rank calls this."""
        out.zero_()
        for piece in self.pieces:
            out[slices(piece.box)] = piece.data.to(HOST)
        return out.copy_(all_reduce(out, self.axis))  # what one rank has is zero on all others


class RecordedCopy:
    """A copy of a module whose parameters are recorded, so that other code can work on it as on a whole model.

    Where a model is merged or renamed by code that is not ours, that code runs on the copy under `recording`. Then
    `tensors` computes what it made of it, one tensor after another: no rank ever holds two.
    """

    def __init__(self, module: nn.Module, pieces: Iterable[Piece], dtype: torch.dtype, axis: Axis) -> None:
        """Copy the module. `pieces`: those of its weights that this rank owns, by their first names; every element of
        them is owned by one rank of the axis. They are computed in `dtype`. Every rank of the axis does so.
        """
        self._recorder = Recorder(axis)
        own: dict[str, list[Piece]] = {}
        for piece in pieces:
            own.setdefault(piece.name, []).append(piece)
        known: dict[int, Any] = dict(_kept(module))
        for name, parameter in module.named_parameters():
            if parameter.dtype.is_floating_point:
                empty = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=parameter.requires_grad)
                source = OwnedPieces(own.get(name, []), axis)
                self._recorder.set_content(empty, Constant(source, parameter.shape, dtype))
                known[id(parameter)] = empty
        self.module: Any = copy.deepcopy(module, known)

    @contextmanager
    def recording(self) -> Iterator[Any]:
        """Provide the copy, and record what the block does with it; every rank does the same."""
        with self._recorder, PythonAccess(self._recorder), torch.no_grad():
            yield self.module

    def has_changed(self, parameter: Tensor) -> bool:
        """Return whether a parameter of the copy would have other values than that of the module."""
        return not self._recorder.is_constant(parameter)

    def is_recorded(self, x: Tensor) -> bool:
        """Return whether x is a parameter of the copy, or is computed from one; other tensors are real."""
        return self._recorder.is_recorded(x)

    def tensors(self, wanted: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the values of these tensors of the copy, on the host; every rank calls this."""
        for x in wanted:
            yield self._recorder.materialize(x) if self.is_recorded(x) else x.detach().to(HOST)


def _kept(module: nn.Module) -> Iterator[tuple[int, Any]]:
    """Yield what takes the place of some objects in a copy, by their id: no hook and no function is copied."""
    for part in module.modules():
        for name, value in vars(part).items():
            if name in HOOKS:
                yield id(value), OrderedDict()
            elif callable(value) and not isinstance(value, nn.Module | Tensor):
                yield id(value), value
        for buffer in part.buffers(recurse=False):
            yield id(buffer), buffer.detach().to(HOST, copy=True)
