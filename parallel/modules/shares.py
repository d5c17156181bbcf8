"""The share that a replica has of each global batch, by which the gradients of a user's loop are weighted.

A user's loss is the mean over the replica's own samples. The mean over a global batch of n samples is the sum over
replicas of n_r / n · loss_r, while gradients are averaged over R replicas: so each is multiplied by n_r · R / n.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from parallel.mesh.mesh import Axis

P = ParamSpec("P")
R = TypeVar("R")

UNKNOWN = (
    "loss: its batch may be smaller on some replicas than on others, and it cannot be known which batch of the"
    " dataloader it is from. Give the engine the very tensors that the dataloader yields (it moves them to its device),"
    " or let the number of replicas divide every batch (drop_last=True)."
)
MIXED = (
    "loss: since the last backward there were forwards of batches of which this replica has different shares. Call"
    " engine.backward for each of them by itself, after its forward."
)


@dataclass(frozen=True)
class Replica:
    """The number of a replica among `size`. Unlike an Axis it can be sent to a process that loads data."""

    rank: int
    size: int

    @classmethod
    def of(cls, axis: Axis) -> "Replica":
        """Return the replica that this rank is a part of; the axis is that of the replicas."""
        return cls(axis.rank, axis.size)


@dataclass(frozen=True)
class Share:
    """The samples [start, start + own) of a global batch of `total`, which are those of one of R = `num_replicas`.

    An empty share (fewer samples than replicas) repeats the first sample, which then counts nothing. The first replica
    has that sample alone: where its loss times zero is not finite, the first replica's is not either.
    """

    start: int
    own: int
    total: int
    num_replicas: int

    @classmethod
    def of(cls, total: int, replica: Replica) -> "Share":
        """Return the replica's share of `total` samples, as Tensor.tensor_split does: the first have one more."""
        size, more = divmod(total, replica.size)
        return cls(replica.rank * size + min(replica.rank, more), size + (replica.rank < more), total, replica.size)

    @property
    def rows(self) -> slice:
        """The rows of the global batch that this replica computes."""
        return slice(self.start, self.start + self.own) if self.own else slice(0, 1)

    @property
    def weight(self) -> float:
        """own · R / total, by which the gradient of a mean over the own samples is multiplied; exactly 1 if even."""
        return self.own * self.num_replicas / self.total if self.total else 1.0


class Shares:
    """The shares of the batches that divided loaders have handed out, and which of them a forward is of.

    The tensors of a batch are recognized, so that any number of batches may be handed out before they are used. Other
    tensors (copies of them on a device) are taken for those of the last batch, where no loop reads ahead of its
    forwards.
    """

    def __init__(self) -> None:
        self._share_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._iterations: list[HandedOut] = []  # those in progress, the one used last at the end

    def begin(self, loader: object) -> "HandedOut":
        """Begin an iteration over a loader; an earlier one over the same loader, which was left, is forgotten."""
        self._iterations = [one for one in self._iterations if one.loader_id != id(loader)]
        return HandedOut(self, id(loader))

    def hand_out(self, batch: Any, share: Share | None, iteration: "HandedOut") -> None:
        """Note that a batch is handed out; `share` is None where it cannot be known."""
        for leaf in _tensors(batch):
            if share is not None:
                self._share_of[leaf] = share
        self._iterations = [*(one for one in self._iterations if one is not iteration), iteration]

    def end(self, iteration: "HandedOut") -> None:
        """Forget an iteration that has ended."""
        self._iterations = [one for one in self._iterations if one is not iteration]

    def copied(self, x: Tensor, copy: Tensor) -> None:
        """Note that `copy` was made of x, so that both are recognized."""
        if copy is not x and (share := self._share_of.get(x)) is not None:
            self._share_of[copy] = share

    def weights_of(self, inputs: Any) -> set[float | None]:
        """Return the weights of the batches that these inputs of a forward are from; None for one that is not known.

        A batch that is from no divided loader has a weight of 1.
        """
        leaves = _tensors(inputs) if len(self._share_of) else ()  # a look into it takes 20 µs
        found = {share.weight for leaf in leaves if (share := self._share_of.get(leaf)) is not None}
        for iteration in self._iterations[-1:]:
            if not found and not iteration.is_even:
                found = {iteration.weight_of_last(inputs)}
            iteration.is_used = True
        return found or {1.0}

    def counts(self, batch: Any) -> bool | None:
        """Return whether the samples of a batch count: False for one that an empty replica repeats, None if unknown."""
        has_empty = any(iteration.has_empty for iteration in self._iterations)
        weights = self.weights_of(batch)
        return True if not has_empty else None if None in weights else weights != {0.0}


class HandedOut:
    """The batches that one iteration over a loader has handed out."""

    def __init__(self, shares: Shares, loader_id: int) -> None:
        self.loader_id = loader_id
        self.is_even = True  # whether every batch so far has had the same number of samples on all replicas
        self.has_empty = False  # whether this replica has had no sample of one of them
        self.is_used = True  # whether a forward has followed the last batch
        self._shares, self._reads_ahead = shares, False
        self._last: Share | None = None

    def hand_out(self, batch: Any, share: Share | None) -> None:
        """Note that a batch is handed out; `share` is None where it cannot be known."""
        self._reads_ahead |= not self.is_used
        self.is_used, self._last = False, share
        self.is_even &= share is not None and share.weight == 1.0
        self.has_empty |= share is None or not share.own
        self._shares.hand_out(batch, share, self)

    def end(self) -> None:
        """Note that there is no further batch. Where some may not have been used yet, they stay in question."""
        if self.is_used and not self._reads_ahead:
            self._shares.end(self)

    def weight_of_last(self, inputs: Any) -> float | None:
        """Return the weight of the last batch for inputs that are copies of its tensors; None if they may not be."""
        if self._reads_ahead or self._last is None:
            return None
        if self._last.weight == 1.0:
            return 1.0
        rows = {leaf.shape[0] for leaf in _tensors(inputs) if leaf.ndim}
        return self._last.weight if max(1, self._last.own) in rows else None


class LossWeights:
    """The weight of the losses that an engine's backwards start from, by the batches of the forwards before them."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._weights: set[float | None] = {1.0}  # of the forwards since a backward
        self._is_new = True  # whether a backward has used them
        self._is_ignored = False

    def follow(self, module: nn.Module) -> None:
        """Register a hook by which the inputs of every forward of the module are noted."""
        module.register_forward_pre_hook(lambda module, *inputs: self._forward(inputs), with_kwargs=True)

    def _forward(self, inputs: Any) -> None:
        weights = self._shares.weights_of(inputs)
        if torch.is_grad_enabled() and not self._is_ignored:
            self._weights = weights if self._is_new else self._weights | weights
            self._is_new = False

    def backward(self) -> tuple[float, str]:
        """Return the weight of the loss that a backward starts from, and what is wrong where it is not known."""
        self._is_new = True
        if self._is_ignored:
            return 1.0, ""
        weight, *others = self._weights
        problem = MIXED if others else "" if weight is not None else UNKNOWN
        return (1.0 if weight is None else weight), problem

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Weight no loss in the block, in which losses are weighted by their labels."""
        self._is_ignored = True
        try:
            yield
        finally:
            self._is_ignored, self._is_new, self._weights = False, True, {1.0}


class Weighting(Protocol):
    """An engine whose losses are weighted."""

    loss_weights: LossWeights


W = TypeVar("W", bound=Weighting)


def weighted_by_labels(method: Callable[Concatenate[W, P], R]) -> Callable[Concatenate[W, P], R]:
    """Have no loss weighted by samples in this method of an engine, since it weights them by their labels."""

    @wraps(method)
    def ignoring(engine: W, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with engine.loss_weights.ignored():
            return method(engine, *args, **kwargs)

    return ignoring


def _tensors(x: Any) -> Iterator[Tensor]:
    """Yield the tensors in x. A mapping that torch's trees do not know (a BatchEncoding) is taken apart, too."""
    for leaf in tree_leaves(x):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(getattr(leaf, "data", None), dict):
            yield from _tensors(leaf.data)
