"""A description of a rank's dataset, made without reading samples, so that ranks with different ones are told."""

from collections.abc import Sized
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from parallel.engine.batch_parts import digest


def described(loader: Any) -> str:
    """Return words for a loader, which differ where two ranks have other samples, as far as that is known.

    Indexes are drawn by rank 0, so every rank must have the same sample at each. The indexes of a Subset, and the first
    and the last sample of a list or of tensors are compared; samples of other datasets are not read, which might change
    them or draw random numbers.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return "a dataloader"
    dataset = loader.dataset
    try:
        length = f" of {len(dataset)} samples" if isinstance(dataset, Sized) else ""
    except (TypeError, NotImplementedError):
        length = ""
    content = digest([digest(part) for part in _content(dataset)])
    return f"a dataloader over a {type(dataset).__name__}{length}, digest {content:08x}"


def _content(dataset: Any) -> list[Any]:
    """Return what is compared of a dataset, as values of which a digest can be made."""
    if isinstance(dataset, Subset):
        return [list(map(str, dataset.indices)), *_content(dataset.dataset)]
    if isinstance(dataset, ConcatDataset):
        return [part for one in dataset.datasets for part in _content(one)]
    if isinstance(dataset, TensorDataset):
        return [x[[0, -1]] for x in dataset.tensors if len(x)]
    if type(dataset) in (list, tuple) and dataset:
        return [dataset[0], dataset[-1]]
    return []
