"""The buffers of a module, and its parameters that are no weights: their device, and what is saved of them."""

import torch
from torch import Tensor, nn

from parallel.layout.layout import Piece
from parallel.mesh.collectives import broadcast
from parallel.mesh.mesh import Axis
from parallel.modules.extra_state import is_extra_state
from parallel.modules.units import is_weight, plain_name


def broadcast_buffers(module: nn.Module, device: torch.device, dtype: torch.dtype, axis: Axis) -> None:
    """Move all buffers to the device, with rank 0's values on every rank of the axis.

    Floating-point buffers of the module's state are cast to `dtype`, as in `module.to(dtype)`. Others (the frequencies
    of rotary embeddings) keep the precision that they are computed in. Parameters that are no weights are moved too.
    """
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                is_cast = buffer.is_floating_point() and name not in part._non_persistent_buffers_set
                part._buffers[name] = broadcast(buffer.to(device, dtype if is_cast else None).contiguous(), axis)
        for parameter in part._parameters.values():
            if parameter is not None and not is_weight(parameter):
                parameter.data = parameter.data.to(device).contiguous()
                broadcast(parameter.data.reshape(-1).view(torch.uint8), axis)  # no backend knows all dtypes


def buffer_pieces(module: nn.Module) -> list[Piece]:
    """Return the buffers of the module's state, and its parameters that are no weights, as whole pieces.

    Each comes once, under its first name.
    """
    weights = {name for name, x in module.named_parameters(remove_duplicate=False) if is_weight(x)}
    found: dict[int, Piece] = {}
    for name, x in module.state_dict(keep_vars=True).items():
        if name not in weights and isinstance(x, Tensor) and not is_extra_state(name):
            box = tuple((0, size) for size in x.shape)
            found.setdefault(id(x), Piece(plain_name(name), tuple(x.shape), box, x.detach()))
    return list(found.values())
