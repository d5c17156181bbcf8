"""The loss of a module on labelled batches: what computes it, and what it is a mean over."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from parallel.errors import DataError
from parallel.mesh.agreement import Agreement
from parallel.modules.batches import IDS, LABELS, ForwardInputs, batch_problem, num_samples, parts_of
from parallel.modules.loss_count import Count, count_of, count_of_nothing, count_of_sum, count_unknown
from parallel.modules.loss_graph import LossGraph, recorded
from parallel.modules.loss_terms import NotMeasuredError
from parallel.storage.transfer import to_device

Criterion: TypeAlias = Callable[[Any, Any], Tensor | tuple[Tensor, Tensor | float]]
"""A function of the module's output and the labels that returns a loss: a mean over labels, or a sum. It may also
return a sum and the number of labels that it is to be divided by."""


@dataclass(frozen=True)
class LabelledMicrobatch:
    """The samples that go through a module together, and their labels, which a criterion is given.

    Without `is_counted` the loss of these samples counts for nothing.
    """

    inputs: dict[str, Any]
    labels: Any
    is_counted: bool = True

    @property
    def num_samples(self) -> int:
        """The number of samples."""
        return num_samples(self.inputs if self.labels is None else {LABELS: self.labels, **self.inputs})


@dataclass(frozen=True)
class CountedLoss:
    """The loss of a microbatch, a scalar, and what it is a mean over.

    `problem` says why that is not known; where the microbatch is the only one, it does not matter. Without `is_loss`
    there is no loss, but a placeholder.
    """

    loss: Tensor
    count: Count
    problem: str = ""
    is_loss: bool = True

    @property
    def factor(self) -> Tensor:
        """The number by which the loss is multiplied to be the sum over its labels; one for a sum."""
        return self.count.count if self.count.factor is None else self.count.factor

    @property
    def total(self) -> Tensor:
        """The loss summed over its labels, fp64, without a gradient: zero where the loss is a mean of nothing."""
        total = self.loss.detach().double().reshape(()) * self.factor
        return torch.where(self.count.count != 0, total, torch.zeros_like(total))


class ModuleLoss:
    """Cuts a replica's batches into microbatches, and computes the loss of each.

    The loss is the module's own `.loss` or, with a criterion, what that returns for the module's output and the labels.
    What it is a mean over is measured on the graph of the loss (`loss_terms`). `size` is the number of samples in a
    microbatch.
    """

    def __init__(
        self, module: nn.Module, criterion: Criterion | None, *, size: int, device: torch.device, agreement: Agreement
    ) -> None:
        self._criterion, self._size, self._device, self._agreement = criterion, size, device, agreement
        self._inputs = ForwardInputs.of(module)
        self._graph = LossGraph(module)

    def microbatches(self, batch: Mapping[str, Any]) -> Iterator[LabelledMicrobatch]:
        """Yield the microbatches of a batch, in which dim 0 of every tensor is the samples.

        The labels are `batch["labels"]`, else `batch["input_ids"]` where the module or a criterion takes labels. Raises
        DataError on every rank where the batch of one replica cannot be used.
        """
        self._agreement.agree_on("a batch", batch_problem(batch, self._size) or self._keys_problem(batch), DataError)
        for part in parts_of(batch, self._size):
            inputs = {key: x for key, x in part.items() if key != LABELS}
            yield LabelledMicrobatch(inputs, part.get(LABELS, part.get(IDS)))

    def of(self, model: Callable[..., Any], microbatch: LabelledMicrobatch) -> CountedLoss:
        """Return the loss of a microbatch and its count; `model` is called as the module would be.

        In torch.no_grad only the graph of the loss is recorded, and not that of the layers.
        """
        found = self._of(model, microbatch)
        return found if microbatch.is_counted else replace(found, count=count_of_nothing(found.count))

    def _of(self, model: Callable[..., Any], microbatch: LabelledMicrobatch) -> CountedLoss:
        evaluates = not torch.is_grad_enabled()
        if self._criterion is None:
            labels = {} if microbatch.labels is None or not self._inputs.takes(LABELS) else {LABELS: microbatch.labels}
            with self._graph.recorded() if evaluates else nullcontext():
                return _counted(_own_loss(model(**microbatch.inputs, **labels)), microbatch.num_samples)
        output, labels = model(**microbatch.inputs), tree_map(self._moved, microbatch.labels)
        if not evaluates:
            return _counted(self._criterion(output, labels), microbatch.num_samples)
        with torch.enable_grad():
            return _counted(self._criterion(tree_map(recorded, output), labels), microbatch.num_samples)

    def _keys_problem(self, batch: Mapping[str, Any]) -> str:
        """Return what is wrong with the keys of a batch, or nothing."""
        given = {key: x for key, x in batch.items() if self._criterion is None or key != LABELS}
        unknown = self._inputs.unknown(given)
        if LABELS not in batch and IDS not in batch and (self._criterion is not None or unknown):
            return f"batch: it has neither {LABELS!r} nor {IDS!r}, but {', '.join(batch)}. {unknown}".rstrip()
        return f"batch: {unknown}" if unknown else ""

    def _moved(self, x: Any) -> Any:
        return to_device(x, self._device) if isinstance(x, Tensor) else x


def _own_loss(output: Any) -> Any:
    """Return the loss of a module's output: its attribute, or its value of that name; None where it has none."""
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def _counted(found: Any, num_samples: int) -> CountedLoss:
    """Return a loss with its count, or with the problem that it cannot be trained on."""
    loss, number = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        nothing = torch.full((), torch.nan)
        return CountedLoss(nothing, count_unknown(nothing), f"{loss_problem(loss)} Pass a criterion.", is_loss=False)
    if number is not None:
        return CountedLoss(loss, count_of_sum(loss, number))
    try:
        return CountedLoss(loss, count_of(loss, num_samples))
    except NotMeasuredError as error:
        return CountedLoss(loss, count_unknown(loss), _unmeasured(str(error)))


def _unmeasured(reason: str) -> str:
    """Return what a user is told whose loss is not known to be a mean, or a sum, over labels."""
    return (
        f"loss: it is not known which labels it is a mean over: {reason}. Pass a criterion that returns (sum, count),"
        " or call engine.backward in a loop of your own."
    )


def loss_problem(loss: object) -> str:
    """Return what is wrong with a loss that a backward is to start from, or an empty string where nothing is."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return ""
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    return f"loss: it must be one number with a gradient, got {found}."
