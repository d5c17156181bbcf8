"""Construction of a model that no rank ever holds whole: its parameters are sharded as soon as they have values."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from parallel.errors import ColonnadeError, ModelError
from parallel.mesh.agreement import Agreement
from parallel.mesh.collectives import broadcast
from parallel.mesh.mesh import Axis
from parallel.modules.lazy import HOST
from parallel.modules.python_access import PythonAccess
from parallel.modules.recorder import Recorder, is_on_meta
from parallel.modules.sharded import Shard, is_sharded, refuse_to_load, set_data, shard_parameter
from parallel.modules.units import is_weight

log = logging.getLogger(__name__)


@contextmanager
def construction(replicas: Axis, shard_axis: Axis) -> Iterator[None]:
    """Shard what is loaded or constructed in the block over `shard_axis`; an axis of size 1 leaves it whole.

    Every new parameter is sharded at once, if it has values; the operations on it are recorded, and run when the block
    ends, one parameter after another. So a rank holds its shards and one whole parameter at a time, whether weights are
    loaded one by one (as by transformers' `from_pretrained`), drawn, or computed from others.

    The values do not depend on `shard_axis`, and are those of the first of the `replicas`: its files, its numbers, its
    random generator. A block within another leaves all to the outer one.

    Raises ModelError on every rank where the ranks make different models, and where the block fails on one of them.
    """
    agreement = _BlockAgreement(replicas)
    _share_random_state(replicas)
    new = _NewParameters(shard_axis, agreement)
    hooks = (
        register_module_parameter_registration_hook(new.on_parameter),
        register_module_module_registration_hook(new.on_module),
    )
    try:
        try:
            with new.recorder, PythonAccess(new.recorder):
                yield
        finally:
            for hook in hooks:
                hook.remove()
        agreement.agree_on("the end of sharded_init")
        new.materialize()
        agreement.agree_on("the last parameter of sharded_init")
        _share_random_state(replicas)
    except Exception as error:
        if not agreement.has_failed:
            text = str(error) if isinstance(error, ColonnadeError) else f"{type(error).__name__}: {error}"
            with suppress(Exception):  # the other ranks are told, and raise as well
                agreement.agree_on("", f"sharded_init failed: {text}")
        raise
    if replicas.rank == 0:
        new.report_missing()


class _BlockAgreement(Agreement):
    """An agreement that remembers whether it has failed: all ranks know it then, and none waits for another."""

    has_failed = False

    def agree_on(self, action: str, problem: str = "", error: type[ColonnadeError] = ModelError) -> None:
        """Do as `Agreement.agree_on`."""
        try:
            super().agree_on(action, problem, error)
        except ColonnadeError:
            self.has_failed = True
            raise


def _share_random_state(replicas: Axis) -> None:
    torch.set_rng_state(broadcast(torch.get_rng_state(), replicas))


class _NewParameters:
    """The parameters that are registered during a block, and the modules that they are registered in."""

    def __init__(self, axis: Axis, agreement: Agreement) -> None:
        self.axis, self.agreement, self.recorder = axis, agreement, Recorder(axis, agreement.agree_on)
        self._modules: dict[nn.Module, None] = {}  # in the order of their registration
        self._parents: dict[nn.Module, tuple[nn.Module, str]] = {}
        # By id; the parameters are kept too, so that no other gets the same id.
        self._devices: dict[int, tuple[nn.Parameter, torch.device]] = {}
        self._missing: dict[str, list[str]] = {}  # the tensors that are in no file, by the model that needs them

    def on_module(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        """Called by torch when a module becomes the child of another."""
        if module is not None:
            self._modules |= {parent: None, module: None}
            self._parents[module] = parent, name

    def on_parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Called by torch just before the parameter is set in the module, in place of an earlier one perhaps."""
        self._modules[module] = None
        if parameter is None or not self._is_new(parameter):
            return
        earlier = module._parameters.get(name)
        if earlier is not None and is_on_meta(earlier) and not self.recorder.is_recorded(earlier):
            self._note_if_missing(module, name, parameter)
        self._devices[id(parameter)] = parameter, parameter.device
        self.recorder.record(parameter, f"{type(module).__name__}.{name}")

    def _is_new(self, parameter: nn.Parameter) -> bool:
        """Return whether the parameter has values of its own: it is not shared, nor meant to be on the meta device.

        What is no weight is left alone: whole numbers, quantized ones, and classes that are derived from nn.Parameter.
        """
        known = is_sharded(parameter) or self.recorder.is_recorded(parameter)
        is_plain = type(parameter) is nn.Parameter and is_weight(parameter)
        return is_plain and not known and not is_on_meta(parameter)

    def _note_if_missing(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Note a tensor that transformers found in no file: it marks what it has read, and will draw this one."""
        root, path = self._place(module, name)
        if hasattr(root, "from_pretrained") and not getattr(parameter, "_is_hf_initialized", False):
            source = getattr(getattr(root, "config", None), "name_or_path", None) or "the directory"
            self._missing.setdefault(f"{source} has no weights of this shape for {type(root).__name__}", []).append(
                path
            )

    def _place(self, module: nn.Module, name: str) -> tuple[nn.Module, str]:
        """Return the outermost module that has this one by now, and the name of a parameter in it."""
        seen = {module}
        while (above := self._parents.get(module)) is not None and above[0] not in seen:
            module, name = above[0], f"{above[1]}.{name}"
            seen.add(module)
        return module, name

    def report_missing(self) -> None:
        """Log which tensors were drawn because no file has them."""
        for where, names in self._missing.items():
            log.warning("sharded_init: %s: %s. The model has drawn them at random.", where, ", ".join(sorted(names)))

    @torch.no_grad()
    def materialize(self) -> None:
        """Give every parameter its values, also those of modules that were copied, and every tensor beside them."""
        visited: set[nn.Module] = set()
        for top in self._modules:
            for _, module in top.named_modules(memo=visited):
                for key, parameter in module.named_parameters(recurse=False):
                    self._finish(*self._place(module, key), parameter)
                if any(map(is_sharded, module.parameters(recurse=False))):
                    module.register_load_state_dict_pre_hook(refuse_to_load)
                for x in (*module._buffers.values(), *vars(module).values()):
                    if self.recorder.is_recorded(x):
                        set_data(x, self.recorder.read(x))

    def _finish(self, root: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Shard the parameter of a model, or make it whole: over an axis of size 1, and where it is no weight."""
        is_recorded = self.recorder.is_recorded(parameter)
        if not is_recorded and not (self.axis.size > 1 and self._is_new(parameter)):
            return
        if self.axis.size > 1:
            grad = "trained" if parameter.requires_grad else "frozen"
            self.agreement.agree_on(f"{type(root).__name__}: {name}, {grad}, {self.recorder.describe(parameter)}")
        _, device = self._devices.get(id(parameter), (parameter, HOST))
        if self.axis.size > 1 and is_weight(parameter):
            shard = self.recorder.shard(parameter) if is_recorded else Shard.of(parameter, self.axis)
            shard_parameter(parameter, shard, device, name)
        elif is_recorded:
            set_data(parameter, self.recorder.read(parameter).to(device))
