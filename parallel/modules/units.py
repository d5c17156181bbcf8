"""The units of any module: its layers, which are gathered on demand in stage 3, and a root that has the rest.

They are the counterpart of the modules that FSDP wraps.
"""

from collections.abc import Iterator

from torch import nn

from parallel.errors import ModelError
from parallel.layout.layout import ROOT, Layout, ParameterInfo
from parallel.mesh.mesh import Axis


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


def infos_of(module: nn.Module, layers: dict[str, nn.Module], data: Axis) -> list[ParameterInfo]:
    """Return every floating-point parameter once, under its first name; its gradient is summed over `data`.

    The parameters of a single layer belong to its unit, all others to the root, and so do those that two layers share.
    Raises ModelError for a parameter of another dtype that requires a gradient.
    """
    owners: dict[nn.Parameter, set[str]] = {}
    names: dict[nn.Parameter, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), ROOT)
        owners.setdefault(parameter, set()).add(layer)
        names.setdefault(parameter, name)
    return list(_infos(names, owners, data))


def _infos(names: dict[nn.Parameter, str], owners: dict[nn.Parameter, set[str]], data: Axis) -> Iterator[ParameterInfo]:
    for parameter, name in names.items():
        if not parameter.is_floating_point():
            if parameter.requires_grad:
                raise ModelError(f"{name}: it is {parameter.dtype}, and only floating-point numbers can be trained.")
            continue
        shape = tuple(parameter.shape)
        layout = Layout(shape, ((),) * len(shape), sync=(data,))
        unit = next(iter(owners[parameter])) if len(owners[parameter]) == 1 else ROOT
        yield ParameterInfo(name, unit, parameter, layout, (name,))
