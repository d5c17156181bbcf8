"""Parameters in flat buffers: the unit that is communicated, updated and moved between tiers."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from parallel.chunk.gradient import Gradient
from parallel.chunk.memory import ChunkMemory
from parallel.chunk.parameters import ParameterBuffer
from parallel.chunk.sharing import Sharing
from parallel.chunk.spec import DEVICE, ChunkSpec, ChunkStorage
from parallel.chunk.states import States
from parallel.layout.layout import ParameterInfo
from parallel.mesh.collectives import Pending
from parallel.storage.transfer import ON_DEVICE, Placement, Tier

Fill: TypeAlias = Callable[[Sequence[ParameterInfo]], None]


class Chunk:
    """Parameters of one unit that decay alike and whose gradients are summed over the same axes, end to end in a flat
    buffer: what FSDP calls a flat parameter, and DDP a bucket.

    parameters  what computes, in the model's dtype: whole [n] and this rank's slice [n_shard]
    states      the master weights [n_shard], fp32 at least, that the optimizer updates: `parameters` are their
                roundings where the model is narrower
    gradient    from the first arrival of a step to its update

    What lies between two parameters, and after the last, is padding: always zero. From ZeRO stage 1 on ranks of
    `spec.shard` update a slice each. In stage 3, and where parameters are placed on the host, the whole buffer has
    memory only between `gather` and `release`. `sharing` says which of these buffers are one memory, and `memory`
    allocates them. Frozen parameters have chunks of their own, in the model's dtype throughout, which get no gradient
    and no update.
    """

    def __init__(
        self,
        spec: ChunkSpec,
        storage: ChunkStorage = DEVICE,
        *,
        fill: Fill = lambda infos: None,
        device: torch.device | None = None,
    ) -> None:
        """Take over the parameters of `spec`, on `device` or where the first of them is. `fill` is called with those
        that came without a storage: they have their place in the buffer then, but no values yet.
        """
        wide = _master_buffer(spec, fill, device)
        whole = wide.to(spec.dtype)
        master = spec.own_slice(wide)
        if spec.shard.size > 1 and (spec.is_partitioned or whole is not wide):
            master = master.clone()  # the whole is given up
        own = master.to(spec.dtype) if spec.is_partitioned else spec.own_slice(whole)
        self.spec, self.sharing = spec, Sharing.of(spec, ON_DEVICE)
        self.memory = ChunkMemory(wide.device, storage.disk, spec.infos[0].name)
        self.parameters = ParameterBuffer(spec, whole, own, self.memory)
        self.states = States(master, self.memory)
        self.gradient = Gradient(spec, self.memory)
        if spec.is_partitioned:
            self.parameters.release()
        self.move_to(storage.placement)

    @property
    def infos(self) -> list[ParameterInfo]:
        return self.spec.infos

    @property
    def size(self) -> int:
        """Elements of the whole buffer, with padding."""
        return self.spec.size

    @property
    def is_frozen(self) -> bool:
        return self.spec.is_frozen

    @property
    def master(self) -> Tensor:
        """This rank's master weights [n_shard]."""
        return self.states.master

    @property
    def placement(self) -> Placement:
        return Placement(self.parameters.tier, self.states.tier)

    @property
    def is_gathered_on_demand(self) -> bool:
        """Whether parameters are whole only between `gather` and `release`."""
        return not self.sharing.slice_is_view

    def move_to(self, placement: Placement) -> None:
        """Move the chunk to another placement, between two steps: parameters are not gathered, and there is no
        gradient. Frozen parameters have no states: their master weights are the parameters.
        """
        if self.is_frozen:
            placement = Placement(placement.parameters, placement.parameters)
        if placement == self.placement:
            return
        self.settle()
        self.forget_gradient()
        before, self.sharing = self.sharing, Sharing.of(self.spec, placement)
        if not self.sharing.slice_is_view:
            self.parameters.move_apart(placement.parameters, is_apart=not before.slice_is_view)
        elif not before.slice_is_view:
            self.parameters.move_into_whole()
        if self.sharing.masters_are_slice:
            self.states.share(self.parameters.own, placement.states)
        else:
            self.states.move_apart(placement.states, is_apart=not before.masters_are_slice)
        self.gradient.move_to(placement.states)
        if not self.sharing.slice_is_view:
            self.parameters.free_whole()

    def settle(self) -> None:
        """Wait for all that was asked for: then states on the host and on a disk can be read and written."""
        self.memory.settle()

    def gather(self) -> Pending:
        """Start to make the parameters whole."""
        if self.gradient.is_in_parameters:  # and no update followed
            self.forget_gradient()
        return self.parameters.gather()

    def release(self) -> None:
        """Give up all of the parameters but this rank's slice."""
        self.parameters.release()

    def store_gradient(self, total: Tensor) -> None:
        """Store the gradient that has been summed over ranks so far, in the memory of the parameters if they have some
        of their own on the host: no forward and no backward needs them before the update makes them anew.
        """
        is_free = self.parameters.tier is Tier.HOST and not self.sharing.masters_are_slice
        self.gradient.store(total, reusable=self.parameters.own if is_free else None)

    def forget_gradient(self) -> None:
        """Give up the gradient instead of an update; parameters in whose memory it is return there."""
        if self.gradient.is_in_parameters:
            self.settle()
            self.parameters.own.copy_(self.master)
        self.gradient.forget()

    def write_back(self) -> Pending:
        """Write the master weights into the parameters, on every rank of `shard`."""
        if not self.sharing.masters_are_slice:
            self.parameters.write(self.master, self.states.tier)
        return self.all_gather_updated()

    def all_gather_updated(self) -> Pending:
        """Give every rank of `shard` this rank's updated slice, unless parameters are gathered on demand."""
        return self.parameters.all_gather() if self.sharing.slice_is_view else Pending(self.parameters.own)

    def held(self) -> list[tuple[Tier, Tensor]]:
        """Return the memory that the chunk has now, moments excluded, and the tier of each tensor."""
        found = [(Tier.DEVICE, self.parameters.whole)]
        if self.is_gathered_on_demand:
            found.append((self.parameters.tier, self.parameters.own))
        if not self.sharing.masters_are_slice:
            found.append((self.states.tier, self.master))
        if self.gradient.host_buffer is not None:
            found.append((Tier.HOST, self.gradient.host_buffer))
        return found


def make_chunks(
    specs: Sequence[ChunkSpec],
    storages: Sequence[ChunkStorage] = (),
    *,
    fill: Fill = lambda infos: None,
    device: torch.device | None = None,
) -> list[Chunk]:
    """Make a chunk of each specification, one after another; without `storages` all are placed on the device."""
    pairs = zip(specs, storages or [DEVICE] * len(specs), strict=True)
    return [Chunk(spec, storage, fill=fill, device=device) for spec, storage in pairs]


def _master_buffer(spec: ChunkSpec, fill: Fill, device: torch.device | None) -> Tensor:
    """Return a buffer [n] in master precision with the values of the parameters, which are views of it now."""
    wide = torch.zeros(spec.size, dtype=spec.master_dtype, device=device or spec.infos[0].parameter.device)
    for info, view in zip(spec.infos, spec.views(wide), strict=True):
        if info.parameter.untyped_storage().nbytes():
            view.copy_(info.parameter.detach())  # one after another: no second model exists
        info.parameter.data = view
    fill(spec.infos)
    return wide
