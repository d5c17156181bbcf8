"""The graph of a loss in an evaluation, which computes no gradient: only what is outside of the layers is recorded."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from parallel.modules.units import layers_of


class LossGraph:
    """Has autograd record how a module computes its loss in a forward without gradients.

    Layers are not recorded: a hook switches the recording off while one computes, so that they take the same kernels
    and the same memory as without. What is recorded keeps no activations either: of a tensor with a gradient only the
    shape is saved. That suffices for `loss_terms`, which reads labels, masks and sizes.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._layers = module, list(layers_of(module).values())

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the module's forward in this block, which is within torch.no_grad; the hooks are removed after it."""
        with ExitStack() as stack:
            module = self._module
            hooks = [
                # The module's other hooks, before this one and after the next, see that gradients are off.
                module.register_forward_pre_hook(_switch(True)),
                module.register_forward_hook(_switch(False), prepend=True, always_call=True),
            ]
            for layer in self._layers:
                hooks.append(layer.register_forward_pre_hook(_switch(False), prepend=True))
                hooks.append(layer.register_forward_hook(_resume))
            for hook in hooks:
                stack.callback(hook.remove)
            stack.enter_context(saved_tensors_hooks(_shape_of, lambda x: x))
            yield


def _switch(recording: bool) -> Callable[..., None]:
    """Return a hook that switches the recording on or off."""

    def hook(*_: Any) -> None:
        torch.set_grad_enabled(recording)

    return hook


def _resume(layer: nn.Module, inputs: Any, output: Any) -> Any:
    """Switch the recording on after a layer, and return its output as the start of a graph."""
    torch.set_grad_enabled(True)
    return tree_map(recorded, output)


def recorded(x: Any) -> Any:
    """Return x with a gradient, without its past: what follows is recorded, even if all parameters there are frozen."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    start = torch.zeros((), device=x.device, requires_grad=True)
    return _Start.apply(x, start)  # type: ignore[no-untyped-call]


class _Start(torch.autograd.Function):
    """x, a number with a gradient -> x, which can also be changed in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor) -> Tensor:
        return x.data  # not a view, of which autograd would not allow a change in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        raise AssertionError("an evaluation has no backward")


def _shape_of(x: Tensor) -> Tensor:
    """Return what is saved of a tensor: its shape alone where it has a gradient."""
    return x.detach().to("meta").requires_grad_() if x.requires_grad else x
