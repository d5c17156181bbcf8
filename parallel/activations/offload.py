"""Inputs of recomputed layers are offloaded to the host between a layer's forward and its backward.

ZeRO calls it P_a+cpu, activation checkpoints in CPU memory (Rajbhandari et al. 2020, arXiv 1910.02054, section 6.1).
torch's `save_on_cpu` is a saved-tensor hook too, but it copies every saved tensor at once, and waits for the copy.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from parallel.activations.host_pool import HostPool
from parallel.activations.kept_input import KeptInput


class InputsOnHost:
    """Keeps the inputs of all layers of a model on this device that are recomputed.

    The newest input stays on the device: at the end of a forward its backward may come next. It is offloaded as the
    next layer begins, so that the copy and that layer run at the same time. In backward the input before it is copied
    back while a layer computes, if it is of the same pass: a pipeline may run the backward of another one much later.
    """

    def __init__(self, device: torch.device) -> None:
        self.pool = HostPool(device)
        self._newest: Callable[[], KeptInput | None] = _nothing
        self._is_first = True  # whether the next input is the first of its pass

    def begin_pass(self) -> None:
        """Begin the forward of a stage, whose backward does not follow on that of the forward before."""
        self._is_first = True

    def wrap(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Return torch's non-reentrant `checkpoint(function, *args, **kwargs)` such that it keeps the inputs here.

        Only tensors with a gradient are offloaded, and no parameters: a mask, for instance, is shared by all layers.
        The function is first called with the arguments themselves, whose lists and dicts it may change, and then with
        copies of these as they were before.
        """
        return partial(self._checkpoint, checkpoint)

    def _checkpoint(
        self, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if _is_offloaded(leaf)]
        if not places:
            return checkpoint(function, *args, **kwargs)
        offloaded = [leaves[place] for place in places]
        others = [None if place in places else leaf for place, leaf in enumerate(leaves)]

        first = [(args, kwargs)]

        def call(*inputs: Tensor) -> Any:
            if first:
                args, kwargs = first.pop()
                return function(*args, **kwargs)
            found = list(others)
            for place, x in zip(places, inputs, strict=True):
                found[place] = x
            args, kwargs = tree_unflatten(found, spec)
            return function(*args, **kwargs)

        with saved_tensors_hooks(self._pack, self._unpack):  # within it, the checkpoint's own hooks replace these
            return checkpoint(call, *offloaded)

    def _pack(self, x: Tensor) -> KeptInput | Tensor:
        if not x.numel():  # an empty tensor that the checkpoint itself saves
            return x
        newest = self._newest()
        if newest is not None:
            newest.offload()
        kept = KeptInput(x, self.pool, _nothing if self._is_first else self._newest)
        self._newest, self._is_first = weakref.ref(kept), False  # it lives as long as autograd's graph
        return kept

    def _unpack(self, kept: KeptInput | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        x = kept.take()
        previous = kept.previous()
        if previous is not None:
            previous.prefetch()
        return x


def _is_offloaded(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and not isinstance(x, nn.Parameter) and torch.is_grad_enabled()


def _nothing() -> None:
    """Return what a weak reference to nothing returns."""
