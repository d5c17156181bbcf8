"""The checks of a state_dict, which is of one rank of one layout, before an engine loads it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from parallel.errors import CheckpointError, names_text

KEYS = ("layout", "tensors", "counters", "group_names", "values", "value_tensors")


def check_layout(state: Any, layout: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a state that is no engine's, or is of another rank, layout or optimizer."""
    if not isinstance(state, Mapping) or not state.keys() >= set(KEYS):
        raise CheckpointError(f"load_state_dict: this is not what engine.state_dict returned, with {', '.join(KEYS)}.")
    if state["layout"] != layout:
        raise CheckpointError(
            f"load_state_dict: the state is of {_text(state['layout'])}, and this is {_text(layout)}. For another"
            " layout use engine.save_checkpoint and load_checkpoint."
        )


def tensor_problems(saved: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> list[str]:
    """Return messages about tensors that one side lacks, or that have another shape or dtype."""
    found = []
    if missing := now.keys() - saved.keys():
        found.append(f"the state lacks {names_text(sorted(missing))}")
    if left_over := saved.keys() - now.keys():
        found.append(f"the state has {names_text(sorted(left_over))}, which this engine lacks")
    for key in sorted(saved.keys() & now.keys()):
        if (saved[key].dtype, saved[key].shape) != (now[key].dtype, now[key].shape):
            kinds = [f"{x.dtype} {tuple(x.shape)}" for x in (saved[key], now[key])]
            found.append(f"{key} is {kinds[0]} in the state, and {kinds[1]} here")
    return found


def refuse_other(problems: Sequence[str]) -> None:
    """Raise CheckpointError with the first of these messages, if there are any."""
    if problems:
        more = f" ({len(problems)} differences in all)" if len(problems) > 1 else ""
        raise CheckpointError(
            f"load_state_dict: {problems[0]}{more}. Load it into the same model, optimizer and precision, or use"
            " engine.save_checkpoint and load_checkpoint."
        )


def _text(layout: Mapping[str, Any]) -> str:
    """Return a layout as words: 'rank 0 of 2 (data 2) in ZeRO stage 3 with torch.optim.SGD'."""
    split = ", ".join(f"{name} {size}" for name, size in layout["mesh"].items() if size > 1) or "not divided"
    place = f"rank {layout['rank']} of {layout['world_size']} ({split})"
    return f"{place} in ZeRO stage {layout['stage']} with {layout['optimizer']}"
