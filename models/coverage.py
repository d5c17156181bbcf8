"""The check that the layers of a family and its shape have the same tensors, before a step is taken.

A tensor that no parameter holds would be missing in the first export, one that two hold would be trained twice, and a
parameter without a layout would be neither summed, nor updated, nor saved. All are faults of a family, not of a user.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from torch import nn

from models.shape import ModelShape, Sizes
from parallel.errors import ModelError
from parallel.layout.layout import ParameterInfo


def check_names(layers: Iterable[str], shape: ModelShape) -> None:
    """Check the attributes of a shape from which public names are made. Raises ModelError."""
    kind, first = type(shape).__name__, shape.first_tensors()
    found = [
        f"{kind}.{attribute}: {name} is not among first_tensors(): {', '.join(first)}."
        for attribute, name in (("embedding", shape.embedding), ("positions", shape.positions))
        if name is not None and name not in first
    ]
    found += [
        f"{name}: it does not begin with {kind}.base, {shape.base!r}, as all names but that of the head do."
        for name in _sizes(layers, shape)
        if name != shape.head and not name.startswith(shape.base)
    ]
    if found:
        raise ModelError("\n".join(found))


def check_tensors(layers: Mapping[str, nn.Module], infos: Sequence[ParameterInfo], shape: ModelShape) -> None:
    """Check that these layers hold each of their public tensors once, and have no other parameters.

    Raises ModelError with a line for each parameter or tensor that is wrong.
    """
    found = [*_without_layout(layers, infos), *_not_split_evenly(infos, shape)]
    if found := found or list(_not_held_once(_sizes(layers, shape), infos)):
        raise ModelError("\n".join(found))


def _sizes(layers: Iterable[str], shape: ModelShape) -> Sizes:
    return {name: size for layer in layers for name, size in shape.tensors_of(layer).items()}


def _without_layout(layers: Mapping[str, nn.Module], infos: Iterable[ParameterInfo]) -> Iterable[str]:
    known = {id(info.parameter) for info in infos}
    for layer, module in layers.items():
        for name, parameter in module.named_parameters():
            if id(parameter) not in known:
                yield (
                    f"{layer}.{name}: a parameter {tuple(parameter.shape)} without a layout. No rank would sum its"
                    " gradient, update it or save it. Take it from the mode: mode.linear_in, mode.norm, ..."
                )


def _not_split_evenly(infos: Iterable[ParameterInfo], shape: ModelShape) -> Iterable[str]:
    """Yield a line for each parameter of a block of which a rank would have padding, which only vocabularies may."""
    for info in infos:
        for size, axes in zip(info.layout.shape, info.layout.axes_of_dims, strict=True):
            parts = prod(axis.size for axis in axes)
            if info.name.startswith("layers.") and size % parts:
                yield (
                    f"{info.name}: {parts} ranks cannot split its dim of {size} evenly."
                    f" {type(shape).__name__}.heads(), widths() and inner_widths() lack it."
                )


def _not_held_once(sizes: Sizes, infos: Iterable[ParameterInfo]) -> Iterable[str]:
    """Yield a line for each public tensor that has rows which no parameter holds, or which are held twice.

    Of a transposed matrix these are the columns.
    """
    held: dict[str, list[tuple[int, int, str]]] = {name: [] for name in sizes}
    totals: dict[str, int] = {}
    for info in infos:
        for source in info.sources:
            if source.shape != sizes[source.name]:
                yield f"{info.name}: its source {source.name} has the shape {source.shape}, not {sizes[source.name]}."
            held[source.name].append((*source.rows, info.name))
            totals[source.name] = (*source.shape, 1)[-2 if source.transposed else 0]
    for name, parts in held.items():
        if not parts:
            yield f"{name}: a public tensor of the shape that no parameter holds."
            continue
        end, total = 0, totals[name]
        for start, stop, _ in [*sorted(parts), (total, total, "")]:
            if start != end:
                owners = ", ".join(dict.fromkeys(own for *_, own in sorted(parts)))
                what = f"row {start} is held twice" if start < end else f"rows {end} ... {start - 1} are left out"
                yield f"{name}: {what}, by {owners}."
                break
            end = stop
