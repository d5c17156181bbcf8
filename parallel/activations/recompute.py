"""Recomputation (activation checkpointing): a layer's forward runs again in backward, and can be told apart."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from parallel.activations.offload import InputsOnHost

_IS_RUNNING = ContextVar("recomputation", default=False)


@contextmanager
def recomputation() -> Iterator[None]:
    """Mark the forward in this block as a second one."""
    before = _IS_RUNNING.set(True)
    try:
        yield
    finally:
        _IS_RUNNING.reset(before)


def is_recomputation() -> bool:
    """Return whether the running forward is a second one, within a backward."""
    return _IS_RUNNING.get()


class Recomputed(nn.Module):
    """A layer that keeps only its input for backward, which runs the forward again (Chen et al. 2016, section 3).

    The second forward stops when all tensors that backward needs exist: before the last matrix product and its
    collectives. No random state needs to be restored, because dropout has none. `inputs` keeps the input on the host.
    """

    def __init__(self, layer: nn.Module, inputs: InputsOnHost | None = None) -> None:
        super().__init__()
        self.layer = layer
        kept = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
        self._checkpoint = kept if inputs is None else inputs.wrap(kept)

    def forward(self, *inputs: Any) -> Any:
        return self._checkpoint(self.layer, *inputs)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a first forward, and of its second run."""
    return nullcontext(), recomputation()
