"""The buffers of a module: where an engine puts them, and what a checkpoint saves of them."""

import torch
from torch import Tensor, nn

from parallel.layout.layout import Piece
from parallel.mesh.collectives import broadcast
from parallel.mesh.mesh import Axis
from parallel.modules.extra_state import is_extra_state


def broadcast_buffers(module: nn.Module, device: torch.device, dtype: torch.dtype, axis: Axis) -> None:
    """Move all buffers to the device, with rank 0's values on every rank of the axis.

    Floating-point buffers of the module's state are cast to `dtype`, as in `module.to(dtype)`. Others (the frequencies
    of rotary embeddings) keep the precision that they are computed in.
    """
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                is_cast = buffer.is_floating_point() and name not in part._non_persistent_buffers_set
                part._buffers[name] = broadcast(buffer.to(device, dtype if is_cast else None).contiguous(), axis)


def buffer_pieces(module: nn.Module) -> list[Piece]:
    """Return the buffers of the module's state as whole pieces, each once, under its first name.

    Parameters that are no floating-point numbers are among them: they are in no chunk, and never trained.
    """
    parameters = {name for name, p in module.named_parameters(remove_duplicate=False) if p.is_floating_point()}
    found: dict[int, Piece] = {}
    for name, x in module.state_dict(keep_vars=True).items():
        if name not in parameters and isinstance(x, Tensor) and not is_extra_state(name):
            box = tuple((0, size) for size in x.shape)
            found.setdefault(id(x), Piece(name, tuple(x.shape), box, x.detach()))
    return list(found.values())
