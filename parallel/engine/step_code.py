"""The code of a step, as far as somebody can change it between two steps: hooks, modes, attributes of modules."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from parallel.chunk.chunk import Chunk
from parallel.pipeline.part import ModelPart

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class StepCode:
    """Watches what decides, besides tensors and the config, which kernels forward and backward of a step launch.

    The engine has one hook of its own: of the part, before its forward. And each parameter has one, in which its
    gradient arrives.
    """

    def __init__(self, part: ModelPart, chunks: Sequence[Chunk]) -> None:
        self.part, self.chunks = part, list(chunks)
        self._attributes = [(vars(module), _attributes_of(module)) for module in part.modules()]
        self._version = 0

    @property
    def is_observed(self) -> bool:
        """True if torch or a module calls somebody's code within a step: a hook, or a mode for all functions."""
        own = vars(self.part)
        return (
            _has_modes()
            or bool(torch_module._has_any_global_hook())
            or len(own["_forward_pre_hooks"]) != 1
            or any(of[name] for of, _ in self._attributes for name in HOOKS if of is not own)
            or any(own[name] for name in HOOKS if name != "_forward_pre_hooks")
            or any(_is_hooked(info.parameter) for chunk in self.chunks for info in chunk.infos)
        )

    @property
    def key(self) -> tuple[object, ...]:
        """The settings of torch and of the modules, where parameters are, and which of them get gradients."""
        places = [
            (chunk.parameters.whole.data_ptr(), *[info.parameter.requires_grad for info in chunk.infos])
            for chunk in self.chunks
        ]
        return self._version_now(), *_settings_of_torch(), *places

    def _version_now(self) -> int:
        """Return a number that is another one after somebody has set an attribute of a module to another object."""
        if any(of.get(name) is not value for of, known in self._attributes for name, value in known):
            self._attributes = [(of, [(name, of.get(name)) for name, _ in known]) for of, known in self._attributes]
            self._version += 1
        return self._version


def _attributes_of(module: nn.Module) -> list[tuple[str, object]]:
    """Return the module's own attributes, such as the probability of a dropout, and its `forward` if it has one."""
    found = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return [*({"forward": None} | found).items()]


def _is_hooked(parameter: nn.Parameter) -> bool:
    return bool(parameter._backward_hooks) or len(parameter._post_accumulate_grad_hooks or ()) > 1


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
