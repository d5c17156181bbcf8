"""The parameters of a module that an engine takes over: their first values, and a watch for later changes."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from torch import nn

from parallel.chunk.chunk import Chunk
from parallel.errors import ModelError, names_text
from parallel.layout.layout import ParameterInfo
from parallel.mesh.collectives import broadcast
from parallel.mesh.mesh import Axis
from parallel.modules.sharded import is_sharded, unshard_parameter


def broadcast_parameters(infos: Sequence[ParameterInfo], axis: Axis) -> None:
    """Give these parameters rank 0's values on every rank of the axis.

    Those that `sharded_init` has sharded are the same on all ranks already, and are all-gathered.
    """
    for info in infos:
        if is_sharded(info.parameter):
            unshard_parameter(info.parameter, info.parameter.data)
        else:
            broadcast(info.parameter.data, axis)


def problem_of_frozen(infos: Sequence[ParameterInfo]) -> str:
    """Return why the parameters of a split model cannot be trained where some are frozen, or an empty string."""
    frozen = [info.name for info in infos if not info.parameter.requires_grad]
    if not frozen:
        return ""
    return (
        f"model: parallel.Engine computes every gradient of a split model, and requires_grad is False of"
        f" {names_text(frozen)}. Leave it True. To keep values, pass parallel.Engine an optimizer of torch.optim that"
        " is not given these parameters; or train a plain module with parallel.initialize, which may have frozen ones."
    )


def make_gradients_dense(module: nn.Module) -> None:
    """Switch sparse gradients of embeddings off: what is summed over replicas in a flat buffer is dense."""
    for part in module.modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            part.sparse = False


def refuse_state_dict(module: nn.Module, has_values: Callable[[], bool]) -> None:
    """Have `state_dict()` and `load_state_dict()` raise ModelError while parameters have no values, in ZeRO stage 3.

    With `keep_vars` a state_dict is allowed, since it returns the parameters themselves, whose values nobody has read
    yet.
    """

    def refuse(part: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not keep_vars and not has_values():
            raise ModelError(
                "model: in zero stage 3 a state_dict has no values: each rank holds a slice. Use engine.save_pretrained"
                " or engine.save_checkpoint, on every rank."
            )

    def refuse_to_load(*_: Any) -> None:
        if not has_values():
            raise ModelError(
                "model: in zero stage 3 load_state_dict has nothing to write into: each rank holds a slice. Call it in"
                " `with engine.full_parameters(writable=True)`, on every rank."
            )

    for part in module.modules():
        part.register_state_dict_pre_hook(refuse)
        part.register_load_state_dict_pre_hook(refuse_to_load)


class OriginalParameters:
    """A module's parameters as they were when an engine took them over: what they are compared with later.

    An engine can follow new values. It cannot follow a parameter that is replaced, added or removed, one whose memory
    is no longer that of its chunk (after a cast, or a move to another device), or a frozen one that is to be trained.

    in_use  what somebody does with the parameters now, so that no step can use them; an empty string if nobody does
    """

    def __init__(self, module: nn.Module, chunks: Sequence[Chunk], *, made_by: str = "parallel.initialize") -> None:
        self._module, self.in_use = module, ""
        self._cure = f"Change a model before {made_by}, not after."
        self._parameters = {n: (p, p.requires_grad) for n, p in module.named_parameters(remove_duplicate=False)}
        self._chunks = list(chunks)
        self._chunk_of = {info.parameter: chunk for chunk in chunks for info in chunk.infos}
        self._modules = list(module.modules())
        self._tree = _tree(self._modules)

    def change(self, *, are_shown: bool = False) -> str:
        """Return a message about the first change that an engine cannot follow, or an empty string without one.

        `are_shown`: it has just been found that all parameters are in the memory of their chunks.
        """
        if self.in_use:
            return self.in_use
        return "" if self._is_unchanged(are_shown=are_shown) else self._first_change()

    def _is_unchanged(self, *, are_shown: bool) -> bool:
        """Return whether nothing at all has changed. With hundreds of parameters it takes a tenth of the time of
        `_first_change`; a GPU may have to wait for it.
        """
        if not are_shown and not all(chunk.parameters.shows_all for chunk in self._chunks):
            return False
        if any(x.requires_grad for x, required_grad in self._parameters.values() if not required_grad):
            return False
        return _tree(self._modules) == self._tree

    def _first_change(self) -> str:
        """Return a message about the first change, or an empty string without one."""
        present = dict(self._module.named_parameters(remove_duplicate=False))
        for name in {**present, **self._parameters}:
            if present.get(name) is not self._parameters.get(name, (None,))[0]:
                return f"model: {name} is not the parameter it was. {self._cure}"
        for name, (parameter, required_grad) in self._parameters.items():
            chunk = self._chunk_of.get(parameter)
            if chunk is not None and not chunk.parameters.shows(parameter):
                return f"model: {name} moved: its memory is not the engine's any more. {self._cure}"
            if parameter.requires_grad and not required_grad:
                return f"model: {name} was frozen and requires a gradient now. {self._cure}"
        return ""


def _tree(modules: Sequence[nn.Module]) -> tuple[list[str], list[int]]:
    """Return the names in the modules, and which objects have them: the modules' own modules and parameters."""
    named: list[dict[str, Any]] = [x for module in modules for x in (module._modules, module._parameters)]
    return [*chain.from_iterable(named)], [*map(id, chain.from_iterable(map(dict.values, named)))]
