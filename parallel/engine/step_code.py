"""The code of a step, as far as somebody can change it between two steps: hooks, modes, attributes of modules."""

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from parallel.chunk.chunk import Chunk
from parallel.chunk.writes import Writes
from parallel.pipeline.part import ModelPart

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class StepCode:
    """Watches what decides, besides tensors and the config, which kernels forward and backward of a step launch.

    The engine has one hook of its own: of the part, before its forward. And each parameter has one, in which its
    gradient arrives. All other hooks are somebody's, and so is a function that takes the place of a class's method. An
    attribute of a module is compared by identity: it may be a number, a module, a tensor that a graph reads. Such a
    tensor's memory is kept until its place has been compared, since a graph may be launched before that.

    Modules and parameters are not looked at in a program in which nobody but the engine writes (`Writes.stop`): a host
    that has waited for a loss should launch the next step soon.
    """

    def __init__(self, part: ModelPart, chunks: Sequence[Chunk], writes: Writes) -> None:
        self.part, self.chunks, self.writes = part, list(chunks), writes
        self._parameters = [info.parameter for chunk in self.chunks for info in chunk.infos]
        self._methods: dict[type, list[object]] = {}  # of each class of a module, when it was seen first
        self._version = 0
        self._note_modules()

    def key(self) -> tuple[object, ...] | None:
        """Return the settings of torch and of the modules, and where parameters are.

        None: torch or a module calls somebody's code within a step, which only a step that runs as usual does.
        """
        if _has_modes():
            return None
        places = [chunk.parameters.whole.data_ptr() for chunk in self.chunks]
        if not self.writes.is_on:
            return *_settings_of_torch(), *places
        self._follow_modules()
        if self._has_patches() or self._has_hooks():
            return None
        return *_settings_of_torch(), *places, self._version

    def versions(self) -> list[int]:
        """Return how often torch has written into each tensor that is an attribute of a module, besides parameters."""
        return [x._version for x in self._tensors if not x.is_inference()]

    def _follow_modules(self) -> None:
        """Count a new version where an attribute of a module, or of its lists and dicts, is another object now."""
        now, before = self._objects_now(), self._objects
        if len(now) != len(before) or not all(map(is_, now, before)) or _places_of(self._tensors) != self._places:
            self._note_modules()
            self._version += 1

    def _note_modules(self) -> None:
        layers = chain.from_iterable(self.part.stages.values())  # a layer may have been replaced there alone
        modules = dict.fromkeys(chain(self.part.modules(), *(layer.modules() for layer in layers)))
        named = [vars(module) for module in modules]
        self._hooks = [of[name] for of in named for name in HOOKS if of is not vars(self.part)]
        self._hooks += [vars(self.part)[name] for name in HOOKS if name != "_forward_pre_hooks"]
        pairs = [(name, x) for of in named for name, x in of.items() if not name.endswith("_hooks")]
        dicts = named + [x for _, x in pairs if isinstance(x, dict)]
        self._containers = [*map(dict.values, dicts), *(x for _, x in pairs if isinstance(x, list))]
        self._objects = self._objects_now()
        self._tensors = [x for x in self._objects if type(x) is Tensor and torch._C._has_storage(x)]
        self._places, self._kept = _places_of(self._tensors), [x.untyped_storage() for x in self._tensors]
        self._has_patched = any(
            callable(getattr(type(module), name, None)) for module in modules for name in vars(module)
        )
        for cls in dict.fromkeys(chain.from_iterable(type(module).__mro__ for module in modules)):
            self._methods.setdefault(cls, _methods_of(cls))

    def _objects_now(self) -> list[object]:
        return [*chain.from_iterable(self._containers)]

    def _has_patches(self) -> bool:
        """Return whether a function has taken the place of a method, of one module or of its class."""
        return self._has_patched or any(_methods_of(cls) != methods for cls, methods in self._methods.items())

    def _has_hooks(self) -> bool:
        return (
            torch_module._has_any_global_hook()
            or any(self._hooks)
            or len(vars(self.part)["_forward_pre_hooks"]) != 1
            or any(map(attrgetter("_backward_hooks"), self._parameters))
            or any(len(x._post_accumulate_grad_hooks or ()) > 1 for x in self._parameters)
        )


def _places_of(tensors: Sequence[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _methods_of(cls: type) -> list[object]:
    return [*filter(callable, vars(cls).values())]


def _has_modes() -> bool:
    """Return whether torch does more than it is told, or refuses it: in a mode, or for a context of autograd."""
    stacks = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    modes = torch._C._is_any_autocast_enabled(), torch.is_anomaly_enabled(), torch.is_inference_mode_enabled()
    return any((*stacks, hooks, *modes))


def _settings_of_torch() -> tuple[object, ...]:
    cuda = torch.backends.cuda
    return (
        torch.get_deterministic_debug_mode(),
        torch.get_default_dtype(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        *torch._C._get_sdp_priority_order(),
        cuda.preferred_blas_library(),
        cuda.matmul.fp32_precision,  # `get_float32_matmul_precision` raises for some of its values
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_fp16_accumulation,
    )
