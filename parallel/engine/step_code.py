"""The code of a step, as far as somebody can change it between two steps: hooks, modes, attributes of modules."""

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from operator import attrgetter, is_

import torch
from torch.nn.modules import module as torch_module

from parallel.chunk.chunk import Chunk
from parallel.chunk.writes import Writes
from parallel.pipeline.part import ModelPart

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class StepCode:
    """Watches what decides, besides tensors and the config, which kernels forward and backward of a step launch.

    The engine has one hook of its own: of the part, before its forward. And each parameter has one, in which its
    gradient arrives. Hooks, attributes and parameters are not looked at in a program in which nobody but the engine
    writes (`Writes.stop`): a host that has waited for a loss should launch the next step soon.
    """

    def __init__(self, part: ModelPart, chunks: Sequence[Chunk], writes: Writes) -> None:
        self.part, self.chunks, self.writes = part, list(chunks), writes
        modules = [vars(module) for module in part.modules()]
        self._hooks = [of[name] for of in modules for name in HOOKS if of is not vars(part)]
        self._hooks += [vars(part)[name] for name in HOOKS if name != "_forward_pre_hooks"]
        self._parameters = [info.parameter for chunk in self.chunks for info in chunk.infos]
        self._attributes = [(of, name) for of in modules for name in ("forward", *filter(partial(_is_setting, of), of))]
        self._values = self._values_now()
        self._version = 0

    @property
    def is_observed(self) -> bool:
        """True if torch or a module calls somebody's code within a step: a hook, or a mode for all functions."""
        return _has_modes() or (self.writes.is_on and self._has_hooks())

    @property
    def key(self) -> tuple[object, ...]:
        """The settings of torch and of the modules, where parameters are, and which of them get gradients."""
        places = [chunk.parameters.whole.data_ptr() for chunk in self.chunks]
        if not self.writes.is_on:
            return *_settings_of_torch(), *places
        return *_settings_of_torch(), *places, self._version_now(), *[x.requires_grad for x in self._parameters]

    def _has_hooks(self) -> bool:
        return (
            torch_module._has_any_global_hook()
            or any(self._hooks)
            or len(vars(self.part)["_forward_pre_hooks"]) != 1
            or any(map(attrgetter("_backward_hooks"), self._parameters))
            or any(len(x._post_accumulate_grad_hooks or ()) > 1 for x in self._parameters)
        )

    def _version_now(self) -> int:
        """Return a number that is another one after somebody has set an attribute of a module to another object."""
        now = self._values_now()
        if not all(map(is_, now, self._values)):
            self._values = now
            self._version += 1
        return self._version

    def _values_now(self) -> list[object]:
        return [of.get(name) for of, name in self._attributes]


def _is_setting(attributes: Mapping[str, object], name: str) -> bool:
    """Return whether an attribute is a number or options, such as the probability of a dropout. `train` sets one."""
    value = attributes[name]
    return not name.startswith("_") and name != "training" and (isinstance(value, int | float) or is_dataclass(value))


def _has_modes() -> bool:
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.is_anomaly_enabled()
        or torch._C._autograd._top_saved_tensors_default_hooks(True)
    )


def _settings_of_torch() -> tuple[object, ...]:
    cuda = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cuda"),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.matmul.allow_bf16_reduced_precision_reduction,
    )
