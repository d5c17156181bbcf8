"""A chunk: parameters in a flat buffer, with their gradient and their master weights."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from parallel.chunk.gradient import Gradient
from parallel.chunk.guard import released
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
    """Parameters of one unit in one flat buffer: they have the same decay, and gradients summed over the same axes.

    They lie one behind the other. A chunk is a flat parameter of FSDP and a bucket of DDP in one.

    spec        extents, views and ownership
    parameters  the model's dtype, used by forward and backward: whole [n], and this rank's slice [n_shard]
    states      the master weights [n_shard], fp32 at least, which the optimizer updates. The parameters are the same
                values, rounded where the model's dtype is narrower
    gradient    exists from the first arrival in a step to the update
    sharing     which of these buffers are one memory
    memory      allocates them on the device, the host and the disk
    guard       holds back changes of the states while a checkpoint reads them
    is_of_root  True if a step needs the parameters from its first forward on, not only while a layer runs
    is_private  True if nobody reads the parameters between two steps, neither a user nor a watch for what users write

    From ZeRO stage 1 on each rank of `spec.shard_axis` updates one slice. In stage 3, and where parameters are
    offloaded to the host, the whole buffer has memory only between `gather` and `release`. Padding between parameters
    and after the last one is always zero. Frozen parameters have chunks of their own, which have the model's dtype
    throughout, no gradient and no update.
    """

    def __init__(
        self,
        spec: ChunkSpec,
        storage: ChunkStorage = DEVICE,
        *,
        fill: Fill = lambda infos: None,
        device: torch.device | None = None,
    ) -> None:
        """Move the parameters of `spec` into one buffer on `device`, or on the device of the first of them.

        Then `fill` is called, which gives values to parameters that had no storage: they are views of the buffer by
        then.
        """
        wide = _master_buffer(spec, fill, device)
        whole = wide.to(spec.dtype)
        master = spec.own_slice(wide)
        if spec.shard_axis.size > 1 and (spec.is_partitioned or whole is not wide):
            master = master.clone()  # so that the memory of the whole buffer is freed
        own = master.to(spec.dtype) if spec.is_partitioned else spec.own_slice(whole)
        self.spec, self.sharing = spec, Sharing.of(spec, ON_DEVICE)
        self.memory = ChunkMemory(wide.device, spec.infos[0].name, disk=storage.disk)
        self.parameters = ParameterBuffer(spec, self.memory, whole=whole, own=own)
        self.states = States(master, self.memory)
        self.gradient = Gradient(spec, self.memory)
        self.guard = released()
        self.is_of_root = self.is_private = False
        if spec.is_partitioned:
            self.parameters.release()
        self.move_to(storage.placement)

    @property
    def infos(self) -> list[ParameterInfo]:
        """The descriptions of its parameters, in the order of the buffer."""
        return self.spec.infos

    @property
    def size(self) -> int:
        """The number of elements of the whole buffer, with padding."""
        return self.spec.size

    @property
    def is_frozen(self) -> bool:
        """True if its parameters get no gradient and no update."""
        return self.spec.is_frozen

    @property
    def master(self) -> Tensor:
        """This rank's master weights [n_shard]."""
        return self.states.master

    @property
    def placement(self) -> Placement:
        """The tiers on which the parameters and the states are resident."""
        return Placement(self.parameters.tier, self.states.tier)

    @property
    def is_gathered_on_demand(self) -> bool:
        """True if the parameters are whole only between `gather` and `release`."""
        return not self.sharing.slice_is_view

    @property
    def waits_when_used(self) -> bool:
        """True if computation waits for an update when the layer is used: until then, nobody reads the parameters."""
        is_alone = self.is_private and self.spec.shard_axis.size == 1  # ranks all-gather slices when all are updated
        return not self.is_of_root and (self.parameters.tier is Tier.HOST or is_alone)

    def wait_for_update(self) -> None:
        """Let computation wait for the last update of parameters that stay on the device."""
        if self.parameters.tier is Tier.DEVICE:
            self.parameters.written.wait()

    def move_to(self, placement: Placement) -> None:
        """Move the chunk to another placement, between two steps.

        Between two steps parameters that are gathered on demand are released, and there is no gradient. The master
        weights of frozen parameters are the parameters: they move together.
        """
        if self.is_frozen:
            placement = Placement(placement.parameters, placement.parameters)
        if placement == self.placement:
            return
        self.settle()
        self.drop_gradient()
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
            self.parameters.release()

    def settle(self) -> None:
        """Wait for all copies, for the last update, for the disk, and for a checkpoint that reads the states: then all
        may be used, and changed.
        """
        self.guard.wait()
        self.parameters.written.synchronize()
        self.memory.settle()

    def gather(self) -> Pending:
        """Start to make the parameters whole."""
        if self.gradient.is_in_parameters:  # no update followed, as when fp16 skips one
            self.drop_gradient()
        return self.parameters.gather()

    def release(self) -> None:
        """Free the memory of the whole parameters; this rank's slice stays."""
        self.parameters.release()

    def store_gradient(self, total: Tensor) -> None:
        """Store the sum of the gradient over ranks and rounds so far where the update reads it.

        If the parameters are on the host in memory of their own, that memory is reused for the gradient of a single
        microbatch: no forward and no backward needs the parameters before the update overwrites them.
        """
        if (
            self.gradient.tier is Tier.HOST
        ):  # the last update may be running still, of a layer that this step did not use
            self.parameters.written.wait()
        is_free = self.parameters.tier is Tier.HOST and not self.sharing.masters_are_slice
        before = self.gradient.host_buffer
        self.gradient.store(total, reusable=self.parameters.own if is_free else None)
        if before is not None and before is not self.gradient.host_buffer:
            self.parameters.written.synchronize()  # the last update may be reading what is freed here

    def drop_gradient(self) -> None:
        """Drop the gradient without an update.

        If it is in the memory of the parameters, they are restored first.
        """
        if self.gradient.is_in_parameters:
            self.settle()
            self.parameters.own.copy_(self.master)
        self.gradient.drop()

    def take_written(self) -> None:
        """Take what somebody has written into the parameters over into the master weights.

        An element whose parameter is the rounded master weight has not been written: it keeps its precision.
        """
        if self.sharing.masters_are_slice:
            return
        self.settle()
        own = self.parameters.own.to(self.master.device)
        is_kept = self.master.to(own.dtype).view(torch.uint8) == own.view(torch.uint8)
        is_kept = is_kept.view(-1, own.itemsize).all(1)
        self.master.copy_(torch.where(is_kept, self.master, own.to(self.master.dtype)))

    def write_back(self) -> Pending:
        """Write the master weights into the parameters, and start to all-gather them over `shard_axis`."""
        if not self.sharing.masters_are_slice:
            self.parameters.write(self.master, self.states.tier)
        return self.all_gather_updated()

    def all_gather_updated(self) -> Pending:
        """Start to all-gather the updated parameters over `shard_axis`, unless they are gathered on demand."""
        return self.parameters.all_gather() if self.sharing.slice_is_view else Pending(self.parameters.own)

    def held(self) -> list[tuple[Tier, Tensor]]:
        """Return the tensors of this chunk, without moments, and the tier of each."""
        found = [(Tier.DEVICE, self.parameters.whole)]
        found += [(Tier.DEVICE, x) for x in self.parameters.in_8_bits]
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
    """Return the chunks of these specifications, made one after the other; without `storages` all are on the device."""
    pairs = zip(specs, storages or [DEVICE] * len(specs), strict=True)
    return [Chunk(spec, storage, fill=fill, device=device) for spec, storage in pairs]


def _master_buffer(spec: ChunkSpec, fill: Fill, device: torch.device | None) -> Tensor:
    """Return a buffer [n] in master precision that has the values of the parameters, which become views of it."""
    wide = torch.zeros(spec.size, dtype=spec.master_dtype, device=device or spec.infos[0].parameter.device)
    for info, view in zip(spec.infos, spec.views(wide), strict=True):
        if info.parameter.untyped_storage().nbytes():
            view.copy_(info.parameter.detach())  # one after the other, so that no second model ever exists
        info.parameter.data = view
    fill(spec.infos)
    return wide
