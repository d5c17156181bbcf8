"""Recomputation: a layer whose forward runs again in backward, and whether a forward is such a second run."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from parallel.activations.offload import InputsOnHost

_RUNS = ContextVar("recomputation", default=False)


@contextmanager
def recomputation() -> Iterator[None]:
    before = _RUNS.set(True)
    try:
        yield
    finally:
        _RUNS.reset(before)


def is_recomputation() -> bool:
    return _RUNS.get()


class Recomputed(nn.Module):
    """A layer of which only the input is kept for backward, which runs the forward again (Chen et al. 2016, section 3),
    as far as it goes to what was not kept: not to the last product, nor to its collectives.

    No random stream needs restoring: dropout has no state. `inputs`: keeps the input, on the host.
    """

    def __init__(self, layer: nn.Module, inputs: InputsOnHost | None = None) -> None:
        super().__init__()
        self.layer = layer
        kept = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
        self._checkpoint = kept if inputs is None else inputs.wrap(kept)

    def forward(self, *inputs: Any) -> Any:
        return self._checkpoint(self.layer, *inputs)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around a forward, and around its second run."""
    return nullcontext(), recomputation()
