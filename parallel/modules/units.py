"""A module of which nothing is known, as units that can come and go: its layers, and a root that holds the rest."""

from collections.abc import Iterator

from torch import nn

from parallel.errors import ModelError
from parallel.layout.layout import ROOT, Layout, ParameterInfo
from parallel.mesh.mesh import Axis


def layers_of(module: nn.Module) -> dict[str, nn.Module]:
    """The entries of every ModuleList that is not inside another's, by their names, in order.

    Transformers keep their blocks so: a decoder's, or an encoder's and a decoder's. A list in a block, of experts say,
    is a part of the block. An entry that has no forward, as a ModuleDict, cannot be called: its own entries are.
    """
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.ModuleList) and not any(name.startswith(f"{layer}.") for layer in found):
            found |= dict(_called(name, part))
    return found


def _called(name: str, container: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for key, entry in container.named_children():
        path = f"{name}.{key}".lstrip(".")
        if type(entry).forward is nn.Module.forward:
            yield from _called(path, entry)
        else:
            yield path, entry


def infos_of(module: nn.Module, layers: dict[str, nn.Module], data: Axis) -> list[ParameterInfo]:
    """Every floating-point parameter, once, under its first name: whole on every rank, its gradient summed over `data`.

    Those of one layer alone belong to its unit, all others to the root: what two layers share, too. Raises ModelError
    for a parameter that can neither be summed nor left as it is.
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
