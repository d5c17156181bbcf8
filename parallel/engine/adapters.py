"""The export of a peft model: its adapters, or the model that results from merging them into its weights.

What is written, and under which names, is peft's decision: its own code runs on a copy of the model that has no values
(`RecordedCopy`). The values are computed, and written, one tensor at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from parallel.checkpoint.hf_folder import ADAPTER, MERGED, write_tensors_of
from parallel.checkpoint.tensor_file import Entry
from parallel.errors import ModelError
from parallel.layout.layout import Piece
from parallel.mesh.mesh import Axis
from parallel.modules.adapters import (
    adapter_folders,
    adapter_tensors,
    refuse_merge,
    weights_shared_by_chance,
    write_adapter_config,
)
from parallel.modules.hf_configs import write_hf_configs
from parallel.modules.recorded_copy import RecordedCopy
from parallel.modules.units import is_weight


def save_adapters(module: nn.Module, pieces: Iterable[Piece], folder: Path, dtype: torch.dtype, axis: Axis) -> None:
    """Write each adapter of a peft model, as `PeftModel.from_pretrained` reads it; every rank of the axis calls this.

    `pieces`: those of the module's weights that this rank owns.
    """
    copied = RecordedCopy(module, pieces, torch.promote_types(dtype, torch.float32), axis)
    for name, target in adapter_folders(module, folder):
        with copied.recording() as model:
            found = adapter_tensors(model, name)
        entries, tensors = _ordered(copied, found, dtype)
        write_tensors_of(
            target,
            entries,
            tensors,
            axis=axis,
            describe=partial(write_adapter_config, module, name),
            names=ADAPTER,
        )


def save_merged(module: nn.Module, pieces: Iterable[Piece], folder: Path, dtype: torch.dtype, axis: Axis) -> None:
    """Write the model that peft's `merge_and_unload` makes; every rank of the axis calls this.

    `pieces`: those of the module's weights that this rank owns. Adapters are multiplied and added in fp32 at least.
    Raises ModelError where there is nothing to merge, or where a merge would change a tied weight by mistake.
    """
    refuse_merge(module)
    copied = RecordedCopy(module, pieces, torch.promote_types(dtype, torch.float32), axis)
    with copied.recording() as model:
        shared = weights_shared_by_chance(model)
        merged = model.merge_and_unload()
        for weight, names in shared:
            if copied.has_changed(weight):
                raise ModelError(
                    f"save_pretrained: merge=True would change {' and '.join(names)}, which share a weight, by the"
                    " adapter of one of them. Leave merge out to save the adapter."
                )
        state = {name: x for name, x in merged.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
    first = {id(x): name for name, x in reversed(state.items())}  # the first name of a shared tensor
    found = {name: x for name, x in state.items() if first[id(x)] == name}
    entries, tensors = _ordered(copied, found, dtype)
    write_tensors_of(
        folder,
        entries,
        tensors,
        axis=axis,
        describe=partial(write_hf_configs, merged, dtype),
        names=MERGED,
    )


def _ordered(
    copied: RecordedCopy, found: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[list[Entry], Iterator[Tensor]]:
    """Return the entries of these tensors, wide dtypes first, and their values one at a time in the same order.

    Weights are written in `dtype`, buffers in their own.
    """
    dtypes = {name: dtype if copied.is_recorded(x) and is_weight(x) else x.dtype for name, x in found.items()}
    pairs = [(Entry(name, tuple(x.shape), dtypes[name]), x) for name, x in found.items()]
    pairs.sort(key=lambda pair: -pair[0].dtype.itemsize)
    values = zip(copied.tensors([x for _, x in pairs]), pairs, strict=True)
    return [entry for entry, _ in pairs], (x.to(entry.dtype) for x, (entry, _) in values)
