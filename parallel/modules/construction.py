"""Construction of a model that no rank ever holds whole: its parameters are sharded as soon as they have values."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy

from parallel.errors import DataError
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis
from parallel.modules.lazy import HOST
from parallel.modules.recorder import Recorder, ReportHostDevice, is_on_meta, set_data
from parallel.modules.sharded import is_sharded, shard_parameter


@contextmanager
def construction(replicas: Axis, shard_axis: Axis) -> Iterator[None]:
    """Shard what is loaded or constructed in the block over `shard_axis`; an axis of size 1 leaves it whole.

    *Loading*: weights that replace parameters on the meta device one by one, as in transformers' `from_pretrained`, are
    sharded on arrival. *Construction*: the operations on a new parameter are recorded, and run when the block ends, one
    parameter after another. So a rank holds its shards and one whole parameter at a time.

    The values do not depend on `shard_axis`: random ones are drawn from the generator of the first of the `replicas`,
    in the state that it has when the block begins. A block within another leaves all to the outer one.
    """
    torch.set_rng_state(gather_objects(torch.get_rng_state(), replicas)[0])
    new = _NewParameters(shard_axis)
    hooks = (
        register_module_parameter_registration_hook(new.on_parameter),
        register_module_module_registration_hook(new.on_module),
    )
    try:
        with new.recorder, ReportHostDevice(new.recorder):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    new.materialize()


class _NewParameters:
    """The parameters that are registered during a block, and the modules that they are registered in."""

    def __init__(self, axis: Axis) -> None:
        self.axis, self.recorder = axis, Recorder(axis)
        self._modules: dict[nn.Module, None] = {}  # in the order of their registration
        self._parents: dict[nn.Module, tuple[nn.Module, str]] = {}
        # By id; the parameters are kept too, so that no other gets the same id.
        self._devices: dict[int, tuple[nn.Parameter, torch.device]] = {}  # of those that are recorded
        self._loaded: dict[int, nn.Parameter] = {}

    def on_module(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        """Called by torch when a module becomes the child of another."""
        if module is not None:
            self._modules |= {parent: None, module: None}
            self._parents[module] = parent, name

    def on_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Called by torch just before the parameter is set in the module, in place of an earlier one perhaps."""
        self._modules[module] = None
        if parameter is None or is_lazy(parameter) or self._is_handled(parameter):  # type: ignore[redundant-expr]
            return
        earlier = module._parameters.get(name)
        if earlier is not None and is_on_meta(earlier) and not self.recorder.is_recorded(earlier):
            self._shard_loaded(module, name, parameter)
        else:
            self._devices[id(parameter)] = parameter, parameter.device
            self.recorder.record(parameter)

    def _is_handled(self, parameter: nn.Parameter) -> bool:
        """Return whether there is nothing to do: another module shares it, or the user wants it on the meta device."""
        known = is_sharded(parameter) or id(parameter) in self._loaded or self.recorder.is_recorded(parameter)
        return known or is_on_meta(parameter)

    def _shard_loaded(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        self._loaded[id(parameter)] = parameter
        if self.axis.size > 1:
            self._refuse_if_missing(module, name, parameter)
            shard_parameter(parameter, self.axis)

    def _refuse_if_missing(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Raise DataError where transformers found no such tensor in its files.

        It marks what it has read; in place of a missing tensor it makes one that it means to draw later.
        """
        root, path = module, name
        while root in self._parents:
            root, child = self._parents[root]
            path = f"{child}.{path}"
        if hasattr(root, "from_pretrained") and not getattr(parameter, "_is_hf_initialized", False):
            source = getattr(getattr(root, "config", None), "name_or_path", None) or "the directory"
            raise DataError(
                f"{source}: there is no tensor {path}, which {type(root).__name__} needs. sharded_init draws nothing in"
                " the place of a missing weight: load the model without it once, save it, and load that."
            )

    @torch.no_grad()
    def materialize(self) -> None:
        """Give every recorded parameter its values, also those of modules that were copied."""
        visited: set[nn.Module] = set()
        modules = [module for top in self._modules for _, module in top.named_modules(memo=visited)]
        for parameter in (x for module in modules for x in module.parameters(recurse=False)):
            if self.recorder.is_recorded(parameter):
                _, device = self._devices.get(id(parameter), (parameter, HOST))
                set_data(parameter, self.recorder.materialize(parameter).to(device))
                if self.axis.size > 1:
                    shard_parameter(parameter, self.axis)
