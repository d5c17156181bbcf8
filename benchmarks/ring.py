"""Measure the parts of one layer's attention over sequences that are split over ranks.

    torchrun --nproc-per-node 4 -m benchmarks.ring [--tokens 4096] [--heads 32] [--head 128]    # nccl, bf16
    torchrun --nproc-per-node 2 -m benchmarks.ring --tokens 64 --heads 4 --head 16              # gloo, on a CPU, fp32

It prints a line for each part: every attention kernel by its name (milliseconds and TFLOP/s, forward and backward, for
all queries of a rank and half of an earlier rank's keys), `ring`, `nothing sent` (a ring whose ranks go on with copies
of their own keys: what is left of `ring` without communication), `all_to_all`, and `torch's`: torch's
`context_parallel`, which exists for GPUs only. Then `a hop`, which sends keys and values to the next rank, and other
ways to do so: `a group a link` (each link between neighbours has a process group of its own), `one batch` (torch's
`batch_isend_irecv`) and `one rank sends` (the first to the second, while all others are idle).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from benchmarks.gpu_workers import WITHOUT_NVLS
from parallel.config import parse
from parallel.config.parallel import ContextConfig
from parallel.engine.context import Context, Place, make_context
from parallel.engine.environment import environment_variables
from parallel.mesh.collectives import Pending, start_rotate
from parallel.mesh.mesh import Axis
from parallel.ops.clock import clock_of
from parallel.sequence import Masking, kernels, ring, sequence_of
from parallel.sequence.blocks import Block
from parallel.sequence.kernels import Kernel

TIMES, WARM_UP = 10, 3


@dataclass(frozen=True)
class Layer:
    """The tensors q, k, v and dy, the gradient of y, of one rank: [1, heads, S_context, D]."""

    context: Context
    q: Tensor
    k: Tensor
    v: Tensor
    dy: Tensor

    @classmethod
    def of(cls, context: Context, tokens: int, heads: int, head: int) -> "Layer":
        """Draw the tensors of a layer with so many tokens on each rank, and heads of width `head`."""
        dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
        drawn = (torch.randn(1, tokens, heads, head, device=context.device, dtype=dtype) for _ in range(4))
        q, k, v, dy = (x.transpose(1, 2) for x in drawn)
        return cls(context, q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dy)

    @property
    def axis(self) -> Axis:
        return self.context.mesh.axis("context")

    def seconds(self, act: Callable[[], object]) -> float:
        """Return the median of the seconds that some calls take."""
        clock, taken = clock_of(self.context.device), []
        for _ in range(WARM_UP + TIMES):
            begun = clock.now()
            act()
            taken.append((begun, clock.now()))
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)
        return median(clock.seconds(*one) for one in taken[WARM_UP:])

    def both(self, attend: Callable[[], Tensor]) -> str:
        """Return the time of forward and backward together, as text."""

        def act() -> None:
            attend().backward(self.dy)
            for x in (self.q, self.k, self.v):
                x.grad = None

        return f"{1e3 * self.seconds(act):.3f} ms forward and backward"


def rates(layer: Layer, kernel: Kernel) -> str:
    """Return a kernel's times and rates, for all queries of a rank and half as many keys."""
    own, half = layer.q.shape[-2], layer.q.shape[-2] // 2
    block = Block((range(own),), (range(half),), own, False)
    flops = 4 * own * half * layer.q.shape[1] * layer.q.shape[-1]
    with torch.no_grad():
        given = layer.q, layer.k[..., :half, :], layer.v[..., :half, :]
        found = kernel.forward(*given, block)
        forward = layer.seconds(lambda: kernel.forward(*given, block))
        backward = layer.seconds(lambda: kernel.backward(layer.dy, (*given, *found), block))
    rate, back = flops / forward / 1e12, 2.5 * flops / backward / 1e12
    return f"{1e3 * forward:.3f} ms, {rate:.3g} TFLOP/s; backward {1e3 * backward:.3f} ms, {back:.3g} TFLOP/s"


def hop(layer: Layer) -> str:
    """Return the time and the rate of sending keys and values to the next rank, on all ranks at once."""
    parts = torch.stack([layer.k, layer.v]).detach()
    took = layer.seconds(lambda: start_rotate(parts, layer.axis).wait())
    return f"{1e3 * took:.3f} ms, {parts.nbytes / took / 1e9:.3g} GB/s"


def hop_by_links(layer: Layer) -> str:
    """Return the same where each link between neighbours has a process group of its own, so a stream of its own."""
    size, rank = layer.axis.size, layer.axis.rank
    groups = [dist.new_group(sorted({i, (i + 1) % size})) for i in range(size)]
    to, source = (rank + 1) % size, (rank - 1) % size

    def act(parts: Tensor, arrived: Tensor) -> None:
        works = [dist.isend(parts, to, group=groups[rank]), dist.irecv(arrived, source, group=groups[source])]
        for work in works:
            assert work is not None
            work.wait()

    found = _hop(layer, act)
    for i, group in enumerate(groups):
        if rank in (i, (i + 1) % size):
            dist.destroy_process_group(group)
    return found


def hop_in_one_batch(layer: Layer) -> str:
    """Return the same with torch's `batch_isend_irecv`."""
    to, source = (layer.axis.rank + 1) % layer.axis.size, (layer.axis.rank - 1) % layer.axis.size

    def act(parts: Tensor, arrived: Tensor) -> None:
        operations = [dist.P2POp(dist.isend, parts, to), dist.P2POp(dist.irecv, arrived, source)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    return _hop(layer, act)


def hop_of_one(layer: Layer) -> str:
    """Return the same where the first rank sends to the second one, and no other rank sends."""

    def act(parts: Tensor, arrived: Tensor) -> None:
        if layer.axis.rank == 0:
            dist.send(parts, 1)
        elif layer.axis.rank == 1:
            dist.recv(arrived, 0)

    return _hop(layer, act)


def _hop(layer: Layer, act: Callable[[Tensor, Tensor], None]) -> str:
    """Return the time and the rate of a function that sends keys and values, and receives others."""
    parts = torch.stack([layer.k, layer.v]).detach()
    arrived = torch.empty_like(parts)
    took = layer.seconds(lambda: act(parts, arrived))
    return f"{1e3 * took:.3f} ms, {parts.nbytes / took / 1e9:.3g} GB/s"


def around(layer: Layer) -> str:
    """Return the time of ring attention."""
    return layer.both(lambda: ring.ring_attention(layer.q, layer.k, layer.v, layer.axis, Masking()))


def alone(layer: Layer) -> str:
    """Return the time of ring attention whose ranks send nothing."""
    with patch.object(ring, "start_rotate", lambda x, axis: Pending(x.clone())):
        return around(layer)


def exchanged(layer: Layer) -> str:
    """Return the time of attention by all-to-all."""
    heads, head = layer.q.shape[1], layer.q.shape[-1]
    if heads % layer.axis.size:
        return f"{heads} heads do not divide"
    sequence = sequence_of(layer.context.mesh, ContextConfig(layer.axis.size, "all_to_all"))

    def attend() -> Tensor:
        y: Tensor = sequence.attend(layer.q, layer.k, layer.v, Masking()).unflatten(-1, (heads, head)).transpose(1, 2)
        return y

    return layer.both(attend)


def torchs(layer: Layer) -> str:
    """Return the time of torch's context parallelism."""
    mesh = init_device_mesh("cuda", (layer.axis.size,))
    split = [torch.zeros(1, layer.q.shape[-2] * layer.axis.size, device=layer.q.device)]
    with context_parallel(mesh, buffers=split, buffer_seq_dims=[1], no_restore_buffers=set(split)):
        return layer.both(lambda: F.scaled_dot_product_attention(layer.q, layer.k, layer.v, is_causal=True))


def parts_of(layer: Layer) -> dict[str, Callable[[Layer], str]]:
    """Return the parts that this device has, by the names of their lines."""
    on_gpu = layer.context.device.type == "cuda"
    torchs_own = {backend.name: kernel for backend, kernel in kernels.ON_GPU.items()} if on_gpu else {}
    found = torchs_own or {"FLASH_ON_CPU": kernels.FLASH_ON_CPU}
    table: dict[str, Callable[[Layer], str]] = {name: partial(rates, kernel=kernel) for name, kernel in found.items()}
    table |= {"ring": around, "nothing sent": alone, "all_to_all": exchanged}
    table |= {"torch's": torchs} if on_gpu else {}
    ways = {"a hop": hop, "a group a link": hop_by_links, "one batch": hop_in_one_batch, "one rank sends": hop_of_one}
    return table | ways


def measure(context: Context, tokens: int, heads: int, head: int) -> dict[str, str]:
    """Measure each part, and return the lines' texts by name; an error is one, too: all ranks have it."""
    layer, found = Layer.of(context, tokens, heads, head), {}
    for name, part in parts_of(layer).items():
        try:
            found[name] = part(layer)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            found[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a rank")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head", type=int, default=128, help="the width of a head")
    arguments = parser.parse_args()
    place = Place.from_environment()
    config = parse(dict(parallel=dict(context=place.world_size)), world_size=place.world_size)
    with environment_variables(**WITHOUT_NVLS):
        for name, text in measure(
            make_context(config, place), arguments.tokens, arguments.heads, arguments.head
        ).items():
            if place.rank == 0:
                print(f"{name:20} {text}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
