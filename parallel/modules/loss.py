"""The loss of a module on labelled batches: which labels are counted, and what computes the loss."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.errors import DataError
from parallel.layout.labels import IGNORED
from parallel.mesh.agreement import Agreement
from parallel.storage.transfer import to_device

Criterion = Callable[[Any, Any], Tensor]
"""A function of the module's output and the labels that returns the mean loss over the labels that are not −100."""


@dataclass(frozen=True)
class LabelledMicrobatch:
    """The samples that go through a module together; `num_counted` is the number of labels that the loss is over."""

    inputs: dict[str, Tensor]
    labels: Tensor
    num_counted: int


class ModuleLoss:
    """Cuts a replica's batches into microbatches, and computes the loss of each.

    The loss is the module's own `.loss` or, with a criterion, criterion(output, labels): the mean over the counted
    labels of a microbatch. `size` is the number of samples in one.
    """

    def __init__(
        self, module: nn.Module, criterion: Criterion | None, *, size: int, device: torch.device, agreement: Agreement
    ) -> None:
        self._criterion, self._size, self._device, self._agreement = criterion, size, device, agreement
        self._shifts = criterion is None and shifts_labels(module)

    def microbatches(self, batch: Mapping[str, Tensor]) -> Iterator[LabelledMicrobatch]:
        """Yield the microbatches of a batch, in which every tensor's dim 0 is the samples.

        The labels are `batch["labels"]`, else `batch["input_ids"]`. Raises DataError on every rank where the batch of
        one replica has neither.
        """
        labels = batch.get("labels", batch.get("input_ids"))
        problem = f"batch: it has neither 'labels' nor 'input_ids', but {', '.join(batch) or 'nothing'}."
        self._agreement.agree_on("a batch", problem if labels is None else "", DataError)
        assert labels is not None
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        for start in range(0, len(labels), self._size):
            part = {name: x[start : start + self._size] for name, x in inputs.items()}
            own = labels[start : start + self._size]
            counted = own[:, 1:] if self._shifts else own
            yield LabelledMicrobatch(part, own, int((counted != IGNORED).sum()))

    def of(self, model: Callable[..., Any], microbatch: LabelledMicrobatch) -> Tensor:
        """Return the loss of a microbatch, a scalar; `model` is called as the module would be."""
        if self._criterion is None:
            return model(**microbatch.inputs, labels=microbatch.labels).loss  # type: ignore[no-any-return]
        return self._criterion(model(**microbatch.inputs), to_device(microbatch.labels, self._device))


def shifts_labels(module: nn.Module) -> bool:
    """Return whether the module's own loss shifts its labels, as that of Hugging Face's language models does."""
    return re.search(r"ForCausalLM|LMHead", type(module).__name__) is not None


def loss_problem(loss: object) -> str:
    """Return what is wrong with a loss that a backward is to start from, or an empty string where nothing is."""
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return ""
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    return f"loss: it must be one number with a gradient, got {found}."
