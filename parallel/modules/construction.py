"""A model that no rank ever holds whole: its parameters are divided over the replicas as they come to be."""

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
from parallel.modules.recorder import HOST, Concealed, Recorder, is_on_meta, replace
from parallel.modules.sliced import divide, is_divided


@contextmanager
def construction(replicas: Axis, over: Axis) -> Iterator[None]:
    """What is loaded or constructed in this block is divided over an axis; one of size 1 leaves it whole.

    *Loading*: weights that arrive one by one where parameters on the meta device stood, as in transformers'
    `from_pretrained`, are divided on arrival. *Construction*: a new parameter is put off, and gets its values when the
    block ends, one parameter at a time. A rank holds its slices and the parameter in the making.

    The values are the same whatever `over` is: random ones are drawn from the generator of the first of the `replicas`,
    where it stood when the block began. A block within another leaves all to the outer one.
    """
    torch.set_rng_state(gather_objects(torch.get_rng_state(), replicas)[0])
    nursery = _Nursery(over)
    hooks = (
        register_module_parameter_registration_hook(nursery.on_parameter),
        register_module_module_registration_hook(nursery.on_module),
    )
    try:
        with nursery.notebook, Concealed(nursery.notebook):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    nursery.finish()


class _Nursery:
    """The modules that have been put together during a block, and what became of their parameters."""

    def __init__(self, axis: Axis) -> None:
        self.axis, self.notebook = axis, Recorder(axis)
        self._modules: dict[nn.Module, None] = {}  # in order
        self._parents: dict[nn.Module, tuple[nn.Module, str]] = {}
        # By identity; the parameters are held too, lest another gets the same.
        self._homes: dict[int, tuple[nn.Parameter, torch.device]] = {}
        self._arrived: dict[int, nn.Parameter] = {}

    def on_module(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is not None:
            self._modules |= {parent: None, module: None}
            self._parents[module] = parent, name

    def on_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Called by torch just before the parameter takes its place, where an earlier one may stand."""
        self._modules[module] = None
        if parameter is None or is_lazy(parameter) or self._is_settled(parameter):  # type: ignore[redundant-expr]
            return
        stood = module._parameters.get(name)
        if stood is not None and is_on_meta(stood) and not self.notebook.knows(stood):
            self._arrive(module, name, parameter)
        else:
            self._homes[id(parameter)] = parameter, parameter.device
            self.notebook.defer(parameter)

    def _is_settled(self, parameter: nn.Parameter) -> bool:
        """It has been met before, and another module shares it; or it is on the meta device by the user's wish."""
        met = is_divided(parameter) or id(parameter) in self._arrived or self.notebook.knows(parameter)
        return met or is_on_meta(parameter)

    def _arrive(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        self._arrived[id(parameter)] = parameter
        if self.axis.size > 1:
            self._refuse_if_missing(module, name, parameter)
            divide(parameter, self.axis)

    def _refuse_if_missing(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """transformers marks what it has read; where there was nothing to read it makes a tensor to be drawn."""
        root, path = module, name
        while root in self._parents:
            root, place = self._parents[root]
            path = f"{place}.{path}"
        if hasattr(root, "from_pretrained") and not getattr(parameter, "_is_hf_initialized", False):
            source = getattr(getattr(root, "config", None), "name_or_path", None) or "the directory"
            raise DataError(
                f"{source}: there is no tensor {path}, which {type(root).__name__} needs. sharded_init draws nothing in"
                " the place of a missing weight: load the model without it once, save it, and load that."
            )

    @torch.no_grad()
    def finish(self) -> None:
        """Give every parameter that was put off its values, those of copied modules too."""
        visited: set[nn.Module] = set()
        modules = [module for top in self._modules for _, module in top.named_modules(memo=visited)]
        for parameter in (x for module in modules for x in module.parameters(recurse=False)):
            if self.notebook.knows(parameter):
                _, home = self._homes.get(id(parameter), (parameter, HOST))
                replace(parameter, self.notebook.value_of(parameter).to(home))
                if self.axis.size > 1:
                    divide(parameter, self.axis)
