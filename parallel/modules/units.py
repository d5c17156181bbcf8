"""The units of any module: its layers, which are gathered on demand in stage 3, and a root that has the rest.

They are the counterpart of the modules that FSDP wraps.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from parallel.errors import ModelError, either
from parallel.layout.layout import ROOT, Layout, ParameterInfo
from parallel.layout.sources import whole
from parallel.mesh.mesh import Axis
from parallel.modules.precision import computed_dtypes, report_dtypes

COMPILED = "_orig_mod."
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_weight(x: Tensor) -> bool:
    """Return whether x has a dtype in which an engine trains, casts and divides parameters.

    Others (indices, quantized and complex numbers) are kept as they are, whole on every rank, like buffers.
    """
    return x.dtype in WEIGHT_DTYPES


def no_values(name: str) -> ModelError:
    """Return the error about a parameter or a buffer on the meta device."""
    return ModelError(
        f"{name}: it is on the meta device, and has no values. To make a model that no rank holds whole, use `with"
        " parallel.sharded_init()` in place of torch.device('meta')."
    )


def plain_name(name: str) -> str:
    """Return a name in a module without the wrappers of `torch.compile`: the weights are those of the same model."""
    return name.replace(COMPILED, "")


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a module by their names, in order: the entries of every ModuleList that is not in a layer.

    Transformers keep their blocks in this way: a decoder's, or an encoder's and a decoder's. A list within a block, of
    experts for example, is a part of the block. An entry without a forward, such as a ModuleDict, is never called: its
    own entries are the layers.
    """
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and not any(name.startswith(f"{layer}.") for layer in found):
            found |= dict(_callable_entries(name, part))
    return found


def _callable_entries(name: str, container: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for key, entry in container.named_children():
        path = f"{name}.{key}".lstrip(".")
        if type(entry).forward is nn.Module.forward:
            yield from _callable_entries(path, entry)
        else:
            yield path, entry


def infos_of(
    module: nn.Module, layers: dict[str, nn.Module], data: Axis, precision: torch.dtype
) -> list[ParameterInfo]:
    """Return every parameter that `is_weight` once, under its first name; its gradient is summed over `data`.

    Names are without the wrappers of `torch.compile`. It is computed in `precision`, or in its own dtype (see
    `computed_dtypes`); the first rank logs it where there are several. The parameters of a single layer belong to its
    unit, all others to the root, and so do those that two layers share. Raises ModelError for a parameter of another
    dtype that requires a gradient, and for one that has no shape yet.
    """
    owners: dict[nn.Parameter, set[str]] = {}
    names: dict[nn.Parameter, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), ROOT)
        owners.setdefault(parameter, set()).add(layer)
        names.setdefault(parameter, plain_name(name))
    weights = [x for x in names if _is_trainable(x, names[x])]
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise no_values(name)
    computed = computed_dtypes(weights, precision)
    if data.rank == 0:
        report_dtypes(weights, computed)
    return [_info(x, names[x], owners[x], data, computed[x.dtype]) for x in weights]


def _is_trainable(parameter: nn.Parameter, name: str) -> bool:
    """Return whether an engine takes the parameter over. Raises ModelError where it cannot, but should."""
    if is_lazy(parameter):
        raise ModelError(f"{name}: it has no shape yet. Run one forward of the module before parallel.initialize.")
    if parameter.is_meta:
        raise no_values(name)
    if not is_weight(parameter) and parameter.requires_grad:
        known = either(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
        raise ModelError(f"{name}: it is {parameter.dtype}, and only {known} can be trained. Freeze it.")
    return is_weight(parameter)


def _info(parameter: nn.Parameter, name: str, owners: set[str], data: Axis, dtype: torch.dtype) -> ParameterInfo:
    shape = tuple(parameter.shape)
    layout = Layout(shape, ((),) * len(shape), sync=(data,))
    unit = next(iter(owners)) if len(owners) == 1 else ROOT
    return ParameterInfo(name, unit, parameter, layout, whole(name, shape), dtype)
