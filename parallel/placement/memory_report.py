"""The message for a memory that has run out in a step: who asked for how much, what is held, and what would help."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from parallel.config import Config
from parallel.errors import size_text
from parallel.placement.held import HeldTensors
from parallel.storage.host import available
from parallel.storage.no_room import Memory
from parallel.storage.transfer import Tier

NUM_SHOWN = 5  # of the largest tensors


@dataclass(frozen=True)
class MemoryUse:
    """The bytes of a memory, as far as they are known: 0 where they are not.

    free       may still be allocated
    allocated  by torch, for tensors that exist; on a device alone
    reserved   by torch, from the driver: more than `allocated` by what is cached, or lost between tensors
    """

    free: int
    allocated: int = 0
    reserved: int = 0

    @property
    def unused(self) -> int:
        """The bytes that torch has reserved and that no tensor uses."""
        return max(0, self.reserved - self.allocated)


@dataclass(frozen=True)
class Shortage:
    """A memory without room: the rank and the moment by name, the bytes that were asked for (0: not known), the error's
    own words, and the use of the memory.
    """

    memory: Memory
    device: torch.device
    who: str
    when: str
    asked: int
    words: str
    use: MemoryUse

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The tiers that are in this memory: a host that computes is the device too."""
        if self.memory is Memory.DEVICE:
            return (Tier.DEVICE,)
        return (Tier.HOST,) if self.device.type == "cuda" else (Tier.DEVICE, Tier.HOST)


def use_of(memory: Memory, device: torch.device) -> MemoryUse:
    """Return the use of a memory now."""
    if memory is Memory.HOST or device.type != "cuda":
        return MemoryUse(available())
    stats = torch.cuda.memory_stats(device)
    limit = torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.get_device_properties(device).total_memory
    reserved = stats.get("reserved_bytes.all.current", 0)
    free = min(torch.cuda.mem_get_info(device)[0], max(0, int(limit) - reserved))
    return MemoryUse(free, stats.get("allocated_bytes.all.current", 0), reserved)


def report(
    shortage: Shortage, held: Sequence[HeldTensors], config: Config, *, predicted: int = 0, num_replicas: int = 1
) -> str:
    """Return the message, at most twelve lines of which the first says it all.

    `predicted`: the bytes of parameters, gradients and states that `--check` gives for this rank; 0: not known.
    """
    here = [one for one in held if one.tier in shortage.tiers]
    cures = list(cures_of(shortage, here, config, num_replicas=num_replicas))
    place = str(shortage.device) if shortage.memory is Memory.DEVICE else "the host"
    asked = f"{size_text(shortage.asked)} more were asked for" if shortage.asked else shortage.words
    first = (
        f"{shortage.who}: no room in the memory of {place} at {shortage.when}: {asked}, {size_text(shortage.use.free)}"
        f" are free. Try {cures[0]}."
    )
    lines = [first, *_use_lines(shortage, here, held, predicted)]
    lines += [f"  {size_text(one.num_bytes):>12}  {one.kind} of {one.layer}" for one in here[:NUM_SHOWN]]
    if len(cures) > 1:
        lines.append(f"If that is not enough, in this order: {'; '.join(cures[1:])}.")
    return "\n".join(lines)


def _use_lines(
    shortage: Shortage, here: Sequence[HeldTensors], held: Sequence[HeldTensors], predicted: int
) -> Iterator[str]:
    """Yield what the memory is used for, and what was predicted of it."""
    kinds: dict[str, int] = {}
    for one in here:
        kinds[one.kind] = kinds.get(one.kind, 0) + one.num_bytes
    parts = [f"{kind} {size_text(count)}" for kind, count in kinds.items()]
    if shortage.memory is Memory.DEVICE and shortage.use.allocated:
        parts.append(f"activations and all else {size_text(max(0, shortage.use.allocated - sum(kinds.values())))}")
        parts.append(f"reserved by torch and not used {size_text(shortage.use.unused)}")
    if parts:
        yield f"held there: {', '.join(parts)}"
    if predicted:
        total = sum(one.num_bytes for one in held)
        yield (
            f"parameters, gradients and states: --check predicts {size_text(predicted)} for this rank, it holds"
            f" {size_text(total)} now; activations come on top"
        )
    if here:
        yield "the largest:"


def cures_of(
    shortage: Shortage, here: Sequence[HeldTensors], config: Config, *, num_replicas: int = 1
) -> Iterator[str]:
    """Yield what would help, what helps most here first."""
    use, model = shortage.use, sum(one.num_bytes for one in here)
    if shortage.asked and use.unused >= shortage.asked:
        yield "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment (memory is in pieces)"
    for_model = [*_cures_of_model(shortage, config, num_replicas)]
    for_activations = [*_cures_of_activations(shortage, config)]
    is_model = model > use.allocated / 2 if use.allocated else "update" in shortage.when
    yield from (*for_model, *for_activations) if is_model else (*for_activations, *for_model)
    yield "parallel.tensor or parallel.pipeline on more devices"


def _cures_of_activations(shortage: Shortage, config: Config) -> Iterator[str]:
    train = config.train
    if shortage.memory is Memory.HOST and shortage.device.type == "cuda":
        return  # activations are on the device
    if (size := train.micro_batch_size) > 1:
        yield f"train.micro_batch_size={next(n for n in range(size // 2, 0, -1) if size % n == 0)}"
    if train.activation_checkpointing == "none":
        yield "train.activation_checkpointing='full'"
    elif train.activation_checkpointing == "full" and shortage.memory is Memory.DEVICE:
        yield "train.activation_checkpointing='offload'"


def _cures_of_model(shortage: Shortage, config: Config, num_replicas: int) -> Iterator[str]:
    zero = config.zero
    if shortage.memory is Memory.HOST and zero.tensor_placement_policy != "cuda" and zero.nvme_dir is None:
        yield "zero.nvme_dir, a folder on a fast disk"
    if zero.stage < 3 and num_replicas > 1:
        yield f"zero.stage={zero.stage + 1 if zero.stage == 0 else 3}"
    if shortage.memory is Memory.DEVICE and zero.tensor_placement_policy == "cuda":
        yield "zero.tensor_placement_policy='auto'"
    if config.optimizer.state_dtype == "fp32" and config.train.precision != "fp64":
        yield "optimizer.state_dtype='bf16'"
