"""What is done to a module when an engine takes it over, and what can be told of it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.activations.offload import InputsOnHost
from parallel.errors import ConfigError, ModelError
from parallel.layout.layout import ParameterInfo, Piece
from parallel.mesh.collectives import broadcast
from parallel.mesh.mesh import Axis
from parallel.modules.sliced import is_divided, restore


def fill(infos: Sequence[ParameterInfo], axis: Axis) -> None:
    """Every replica starts with rank 0's values: those that `sharded_init` divided are everybody's already."""
    for info in infos:
        if is_divided(info.parameter):
            restore(info.parameter, info.parameter.data)
        else:
            broadcast(info.parameter.data, axis)


def place_buffers(module: nn.Module, device: torch.device, dtype: torch.dtype, axis: Axis) -> None:
    """Buffers to the device, with rank 0's values. Those of the module's state go with its parameters' precision, as in
    `module.to(dtype)`; others (the frequencies of rotary embeddings) are what they are computed with.
    """
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                goes_along = buffer.is_floating_point() and name not in part._non_persistent_buffers_set
                part._buffers[name] = broadcast(buffer.to(device, dtype if goes_along else None).contiguous(), axis)


def make_gradients_dense(module: nn.Module) -> None:
    """An embedding's, too: what is summed over replicas in a flat buffer is dense."""
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            part.sparse = False


def guard_state(module: nn.Module) -> None:
    """Have `module.state_dict()`, by whomever it is called, raise instead of giving out values that are not there. With
    `keep_vars` it gives out the parameters themselves, and nobody has read them yet.
    """

    def refuse(part: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not keep_vars:
            raise ModelError(
                "model: in zero stage 3 a state_dict has no values: each rank holds a slice. Use engine.save_pretrained"
                " or engine.save_checkpoint, on every rank."
            )

    for part in module.modules():
        part.register_state_dict_pre_hook(refuse)


def recompute(
    module: nn.Module, layers: Mapping[str, nn.Module], inputs: InputsOnHost | None = None, *, compiles: bool = False
) -> None:
    """Keep only the input of each layer for backward, where `inputs` keeps it: in a model's own way, if it has one.

    Raises ConfigError or ModelError where a model's own way leaves `inputs` no place.
    """
    for word in ("activation", "gradient"):  # transformers' name for it, and the one before version 5.20
        enable: Any = getattr(module, f"{word}_checkpointing_enable", None)
        if enable is not None:
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
        layer.forward = partial(kept if inputs is None else inputs.wrap(kept), layer.forward)


def _replace_checkpoint(module: nn.Module, inputs: InputsOnHost) -> None:
    """The function that transformers has each layer, or what holds the layers, recomputed by."""
    name = "_gradient_checkpointing_func"
    users = [part for part in module.modules() if hasattr(part, name)]
    if not users:
        raise ModelError(
            f"train.activation_checkpointing: 'offload' finds no place in {type(module).__name__}, which recomputes its"
            " layers in a way of its own. Try 'full'."
        )
    for part in users:
        setattr(part, name, inputs.wrap(getattr(part, name)))


def is_causal(module: nn.Module) -> bool:
    """Whether the module's own loss shifts its labels: as Hugging Face's language models do."""
    return re.search(r"ForCausalLM|LMHead", type(module).__name__) is not None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A block in which no part of the module trains; afterwards those do that did."""
    trained = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, before in trained.items():
            part.training = before


def described(loss: object) -> str:
    return f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__


def buffer_pieces(module: nn.Module) -> list[Piece]:
    """The buffers that belong to a module's state, whole, each under its first name."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    found: dict[int, Piece] = {}
    for name, x in module.state_dict(keep_vars=True).items():
        if name not in parameters and isinstance(x, Tensor):
            box = tuple((0, size) for size in x.shape)
            found.setdefault(id(x), Piece(name, tuple(x.shape), box, x.detach()))
    return list(found.values())


def write_configs(module: nn.Module, dtype: torch.dtype, folder: Path) -> None:
    """The configs that `from_pretrained` reads, if the module has them."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    saved = copy(config)
    saved.dtype, saved.architectures = dtype, [type(module).__name__]
    saved.save_pretrained(folder)
    generation: Any = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
