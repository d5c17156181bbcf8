"""Recomputation of a module's layers in backward: in the module's own way, or by torch's checkpoint."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from parallel.activations.offload import InputsOnHost
from parallel.errors import ConfigError, ModelError
from parallel.ops.compiling import not_compiled
from parallel.zero.unavailable import make_available


def recompute_layers(
    module: nn.Module, layers: Mapping[str, nn.Module], inputs: InputsOnHost | None = None, *, compiles: bool = False
) -> None:
    """Have each layer keep only its input for backward, on the host where `inputs` is given, and run its forward again.

    `compiles`: whether the layers are compiled. Raises ConfigError or ModelError where the module's own way of
    recomputation does not allow the inputs to be kept elsewhere.
    """
    for word in ("activation", "gradient"):  # transformers' name for it, and the one before version 5.20
        enable: Any = getattr(module, f"{word}_checkpointing_enable", None)
        if enable is not None and getattr(module, "supports_gradient_checkpointing", True):
            enable(**{f"{word}_checkpointing_kwargs": dict(use_reentrant=False)})
            if inputs is not None and compiles:
                raise ConfigError(
                    "train.compile: layers that recompute themselves are compiled with what they keep, and 'offload'"
                    " keeps it elsewhere. Try compile=False, or activation_checkpointing='full'."
                )
            if inputs is not None:
                _replace_checkpoint(module, inputs)
            return
    kept = partial(checkpoint, use_reentrant=False)
    for layer in layers.values():
        forward = partial(_with_parameters, layer, layer.forward) if compiles else layer.forward
        layer.forward = partial(kept if inputs is None else inputs.wrap(kept), forward)


@not_compiled
def _with_parameters(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a compiled forward when the layer's parameters are available: compiled code cannot gather them itself."""
    if torch._C._current_graph_task_id() >= 0:
        make_available(layer.parameters())
    return forward(*args, **kwargs)


def _replace_checkpoint(module: nn.Module, inputs: InputsOnHost) -> None:
    """Replace the checkpoint function that transformers calls for each layer by one that keeps inputs on the host."""
    name = "_gradient_checkpointing_func"  # an attribute of each layer, or of the module that has the layers
    users = [part for part in module.modules() if hasattr(part, name)]
    if not users:
        raise ModelError(
            f"train.activation_checkpointing: 'offload' is not possible for {type(module).__name__}, which recomputes"
            " its layers in a way of its own. Try 'full'."
        )
    for part in users:
        setattr(part, name, inputs.wrap(getattr(part, name)))
