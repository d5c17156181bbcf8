"""A user's own torch optimizer, on master weights that are divided over ranks and may be on any tier."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.chunk.managed import Manager
from parallel.errors import ModelError
from parallel.layout.layout import Piece
from parallel.ops.kernels.adamw import scaled
from parallel.optim.elementwise import DECIDING, initial_value, refuse_unless_elementwise, state_kinds
from parallel.optim.leaves import Leaves
from parallel.optim.param_groups import ParamGroups, SavedGroup
from parallel.optim.takeover import take_over
from parallel.storage.transfer import Placement, Tier


class TorchOptimizer:
    """A torch optimizer that updates this rank's segments of master weights instead of the parameters that it was made
    for. It must be elementwise: the update of an element depends on no other element.

    It keeps its param groups, so its hyperparameters and a user's scheduler work as before. A parameter without a
    gradient in a step stays as it is, and so do its states, as in torch. A step that is not finite changes nothing: a
    fused optimizer (`fused=True`, states on the device) is given the flag on the device, as torch's GradScaler does it;
    for any other, and for a first step, the host waits for the flag, and does not call `step` at all. Raises ModelError
    for an optimizer that cannot be divided.
    """

    host_share = first_share = 1.0  # it updates master weights where they are

    def __init__(self, chunks: Sequence[Chunk], inner: torch.optim.Optimizer) -> None:
        _check(chunks, inner)
        self.chunks, self.inner = [c for c in chunks if not c.is_frozen], inner
        self.unused: Container[nn.Parameter] = ()  # parameters that got no gradient
        self.groups = ParamGroups(inner, [info for chunk in chunks for info in chunk.infos])
        inner.register_step_pre_hook(lambda *_: self._refuse_steps_of_others())
        self._leaves = Leaves(self.chunks, inner)
        for chunk in self.chunks:
            if chunk.placement.states is Tier.DISK:
                self._start_on_disk(chunk)

    def take_over(self, manager: Callable[[], Manager | None], drop_gradients: Callable[..., None]) -> None:
        """Have the methods of the user's optimizer do what an engine can do, or say what to call instead."""
        self._leaves.manage(manager)
        take_over(self.inner, self._leaves, self.groups, drop_gradients)

    @property
    def lr(self) -> float:
        """The learning rate of the first group."""
        return float(self.inner.param_groups[0]["lr"])

    def step(self, factor: Tensor, lr: float, found_inf: Tensor | None = None) -> None:
        """Update every weight, except those of `unused` parameters, by its gradient times `factor`, a scalar. The
        learning rates are those of the groups, whatever `lr` is.

        `found_inf`: an fp32 scalar on the same device; where it is 1, nothing changes.
        """
        on_device = found_inf is not None and self._takes_found_inf()
        if found_inf is not None and not on_device and found_inf.item():
            for chunk in self.chunks:
                chunk.drop_gradient()
            return
        with self._leaves.stepping(), self._given(found_inf if on_device else None):
            self._give_gradients(factor)
            self._leaves.drop_states_as_new()
            self.inner.step()
        for pending in [chunk.write_back() for chunk in self.chunks]:
            pending.wait()

    def take_back(self) -> None:
        """Count the last update no longer: torch's own counts are states, which have stayed as they were."""

    def _takes_found_inf(self) -> bool:
        """Return whether torch's step leaves everything as it is where a flag on the device says so.

        SGD makes its momentum in the first step, without values where that is left out. And a flag that torch copied to
        the host would not be waited for.
        """
        is_fused = getattr(self.inner, "_step_supports_amp_scaling", False)
        is_fused = is_fused and all(group.get("fused") for group in self.inner.param_groups)
        on_device = all(chunk.placement.states is Tier.DEVICE for chunk in self.chunks)
        return bool(is_fused and on_device and self._leaves.all_have_states())

    @contextmanager
    def _given(self, found_inf: Tensor | None) -> Iterator[None]:
        """Have the optimizer's step honour a flag in the block, as torch's GradScaler does."""
        if found_inf is None:
            yield
            return
        given: Any = self.inner
        given.grad_scale, given.found_inf = None, found_inf
        try:
            yield
        finally:
            del given.grad_scale, given.found_inf

    def _give_gradients(self, factor: Tensor) -> None:
        """Give each leaf its gradient times `factor`, or None."""
        leaves = iter(self._leaves)
        is_streamed = any(chunk.placement.states is not Tier.DEVICE for chunk in self.chunks)
        on_host = factor.cpu() if is_streamed else factor
        for chunk in self.chunks:
            assert chunk.gradient.total is not None
            chunk.settle()
            scale = factor if chunk.placement.states is Tier.DEVICE else on_host
            gradient = scaled(chunk.gradient.total, scale, chunk.master.dtype)
            chunk.gradient.drop()
            for segment in chunk.spec.segments(gradient):
                _, leaf = next(leaves)
                leaf.grad = None if segment.info.parameter in self.unused else segment.data

    def pieces(self) -> dict[str, list[Piece]]:
        """Return the master weights and the optimizer's states of their elements, as pieces of public tensors: views,
        to be saved or filled.
        """
        for chunk in self.chunks:
            chunk.settle()
        self._leaves.start_states()
        found = {"master": [piece for chunk in self.chunks for piece in chunk.spec.pieces(chunk.master)]}
        for segment, leaf in self._leaves:
            for kind, value in self._leaves.states(leaf):
                found.setdefault(kind, []).extend(segment.pieces(value))
        return found

    def states_with(self, saved: Mapping[int, SavedGroup]) -> dict[str, list[Piece]]:
        """Return the states that `pieces` returns once these groups are restored, with values of master weights."""
        kinds: dict[Tensor, list[str]] = {}
        for i, group in enumerate(self.inner.param_groups):
            fields = {**group, **(saved[i].fields if i in saved else {})}
            kinds |= dict.fromkeys(group["params"], state_kinds(self.inner, fields))
        found: dict[str, list[Piece]] = {}
        for segment, leaf in self._leaves:
            for kind in kinds.get(leaf, ()):
                found.setdefault(kind, []).extend(segment.pieces(segment.data))
        return found

    @property
    def kind(self) -> str:
        """The class of the optimizer, as a checkpoint names it."""
        return f"torch.optim.{type(self.inner).__name__}"

    def counters(self) -> dict[str, Any]:
        """Return what `restore` takes: the number of updates, which is that of its gradients, of each parameter with a
        segment on this rank, 0 where its states are as new; and its other states that are one number, as NAME/KIND.
        """
        self._leaves.start_states()
        scalars = [(segment.info.name, *x) for segment, leaf in self._leaves for x in self._leaves.scalars(leaf)]
        steps = {name if kind == "step" else f"{name}/{kind}": float(value) for name, kind, value in scalars}
        return dict(steps=steps | dict.fromkeys(self._leaves.names_as_new(), 0.0))

    def initial_value(self, kind: str, name: str) -> float:
        """Return the number with which torch fills a kind of state of this parameter before its first update."""
        groups = zip(self.groups.names, self.inner.param_groups, strict=True)
        return next((initial_value(kind, group) for names, group in groups if name in names), 0.0)

    def restore_groups(self, saved: Mapping[int, SavedGroup]) -> None:
        """Set the fields of these groups, by their numbers, and have the states that the fields ask for."""
        before = [_states_of_group(group) for group in self.inner.param_groups]
        self.groups.restore(saved)
        for group, states in zip(self.inner.param_groups, before, strict=True):
            if _states_of_group(group) != states:
                for leaf in group["params"]:
                    self.inner.state.pop(leaf, None)
        for chunk in self.chunks:
            if chunk.placement.states is Tier.DISK and not all(self.inner.state[x] for x in self._leaves.of(chunk)):
                self._start_on_disk(chunk)

    def restore(self, updates: int, *, steps: Mapping[str, float] | None = None) -> None:
        """Go on after `updates` updates, with master weights and states that were filled through `pieces`. `steps` has
        the number of updates of each parameter for which it is another, and the other states that are one number.
        """
        steps = steps or {}
        for segment, leaf in self._leaves:
            for kind, value in self._leaves.scalars(leaf):
                name = segment.info.name if kind == "step" else f"{segment.info.name}/{kind}"
                value.fill_(steps.get(name, updates if kind == "step" else float(value)))
        self._leaves.set_as_new({name for name, count in steps.items() if not count})

    def move(self, chunk: Chunk, placement: Placement) -> None:
        """Move a chunk and its states to another placement."""
        was = chunk.placement.states
        chunk.move_to(placement)
        self._leaves.follow(chunk)
        if was is not placement.states and not chunk.is_frozen:
            self._leaves.move_states(chunk)

    def held(self) -> list[tuple[Tier, Tensor]]:
        """Return the states of all elements, and the tier of each tensor."""
        return self._leaves.held(self.chunks)

    def state_bytes(self, chunk: Chunk) -> int:
        """Return the bytes of a chunk's master weights and of its states, which exist from the first update on."""
        return 0 if chunk.is_frozen else chunk.master.nbytes + self._leaves.state_bytes(chunk)

    def balance(self) -> float:
        """Return the share of updates on the host: there is no other."""
        return self.host_share

    def update_seconds(self) -> tuple[float, float]:
        """Return no seconds: no update streams through the device."""
        return 0.0, 0.0

    def _start_on_disk(self, chunk: Chunk) -> None:
        """Make a chunk's states before the first update, as files of zeros: then a disk without room for them is
        refused at the start, and the host never holds the states of more than one chunk. Raises ModelError if torch
        does not start from zero.
        """
        if any(group.get("momentum") and group.get("dampening") for group in self.inner.param_groups):
            raise ModelError(
                "optimizer: SGD's first step is not dampened, so its states cannot start as zeros in zero.nvme_dir. Use"
                " dampening=0, or leave zero.nvme_dir out."
            )
        self._leaves.start_states(self._leaves.of(chunk))
        self._leaves.move_states(chunk)

    def _refuse_steps_of_others(self) -> None:
        """Raise ModelError if somebody other than the engine calls the optimizer's `step`."""
        if not self._leaves.is_stepping:
            raise ModelError("optimizer.step(): the engine has the gradients. Call engine.step() instead.")


def _states_of_group(group: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return what decides which states the parameters of a group have, in the accepted optimizers."""
    return tuple(bool(group.get(key)) for key in DECIDING)


def _check(chunks: Sequence[Chunk], inner: torch.optim.Optimizer) -> None:
    """Raise ModelError if an optimizer cannot update the divided master weights of these chunks."""
    refuse_unless_elementwise(inner)
    if any(state.get("step") for state in inner.state.values()):
        raise ModelError(
            "optimizer: it has taken steps already. Pass a new one: engine.load_checkpoint restores a state."
        )
    parameters = {info.parameter for chunk in chunks for info in chunk.infos}
    num_unknown = sum(p not in parameters for group in inner.param_groups for p in group["params"])
    if num_unknown:
        raise ModelError(f"optimizer: {num_unknown} of its parameters are not the model's. Make it after the model.")
