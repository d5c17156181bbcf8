"""Count the bytes that a rank keeps for backward, allocates and sends, and evaluate the documents' formulas.

They are counted inside torch, where it saves, allocates and dispatches, and not by the code under test.
"""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.shape import ModelShape
from parallel.config.parallel import ContextConfig, TensorConfig
from parallel.layout.layout import Layout
from parallel.mesh.collectives import all_reduce, local_slice
from parallel.mesh.mesh import Mesh
from parallel.mesh.topology import Topology
from parallel.sequence import sequence_of
from parallel.tensor import MODES, Mode
from parallel.tensor.mode import Split
from tests.patience import patient, wait_until

UNSPLIT = ContextConfig()


def mode_of(rank: int, tensor: TensorConfig, dtype: torch.dtype, context: ContextConfig = UNSPLIT) -> Mode:
    """Return a tensor mode on a mesh of these two sections, with process groups if there are any."""
    mesh = mesh_of(rank, tensor, context, connect=dist.is_initialized())
    return MODES[tensor.kind](mesh, dtype, sequence=sequence_of(mesh, context), overlaps=tensor.overlap)


def mesh_of(rank: int, tensor: TensorConfig, context: ContextConfig, *, connect: bool = False) -> Mesh:
    """Return a mesh with the axes of these two sections alone."""
    topology = Topology({"pipe": 1, "data": 1, "context": context.size, **tensor.axes()})
    return Mesh(topology, rank, merged=MODES[tensor.kind].merged_axes(), connect=connect)


def letters(tensor: TensorConfig, shape: ModelShape, batch: int, sequence: int) -> dict[str, int]:
    """Return the values of the letters of docs/notation.md."""
    axes = tensor.axes()
    d, r, c, q = (axes.get(name, 1) for name in ("depth", "row", "col", "w"))
    parts = axes.get("t", 1) * c * q  # the vocabulary's
    V = -(-shape.vocab_size // parts) * parts
    kept = shape.kept()
    sizes = dict(p=tensor.size, d=d, r=r, c=c, q=q, T=batch * sequence, S=sequence, V=V, E=shape.embedding_width)
    return sizes | widths_of(shape) | sums_of(shape, V) | dict(O=kept.outer, I=kept.inner, N=kept.statistics)


def widths_of(shape: ModelShape) -> dict[str, int]:
    """Return the widths of a block and the elements of its matrices; these are counted among its public tensors too."""
    H, A, G, D = shape.hidden_size, shape.num_attention_heads, shape.num_kv_heads, shape.head_size
    (F,) = shape.inner_widths().values()
    Q, Z = (A + 2 * G) * D, F * len(_public_names(shape, "feed_forward.up"))
    W = sum(prod(size) for size in shape.block_tensors(0).values() if len(size) == 2)
    assert W == H * (Q + A * D + Z + F)
    return dict(H=H, A=A, G=G, D=D, L=shape.num_hidden_layers, F=F, Q=Q, Z=Z, W=W)


def sums_of(shape: ModelShape, vocabulary: int) -> dict[str, int]:
    """Return the elements of which gradients are summed: of all matrices, and of the kinds of vectors."""
    tables = 1 if shape.tie_word_embeddings else 2
    vectors = {"Y": 0, "J": 0, "U": 0}
    matrices = tables * vocabulary * shape.embedding_width
    for name, size in shape.public_tensors().items():
        if name == shape.positions:
            vectors["U"] += prod(size)
        elif len(size) == 1:
            vectors[_kind_of(shape, name)] += prod(size)
        elif name not in (shape.embedding, shape.head):
            matrices += prod(size)
    return vectors | dict(M=matrices)


def _kind_of(shape: ModelShape, name: str) -> str:
    """Return the letter under which docs/notation.md counts a public vector: Y, J or U."""
    module = name.removeprefix(f"{shape.blocks}.").partition(".")[2].rpartition(".")[0]  # of a block's vector
    for letter, ours in (("Y", ("attention.q_norm", "attention.k_norm")), ("J", ("attention.qkv", "feed_forward.up"))):
        if any(module in _public_names(shape, our) for our in ours):
            return letter
    return "U"


def _public_names(shape: ModelShape, module: str) -> tuple[str, ...]:
    found = shape.names().get(module, ())
    return (found,) if isinstance(found, str) else found


def value(formula: str, letters: Mapping[str, int]) -> float:
    """Evaluate a formula of the documents. The result is exact if it divides only by powers of two."""
    for sign, python in (("·", "*"), ("−", "-"), ("²", "**2")):
        formula = formula.replace(sign, python)
    return float(eval(formula, dict(letters)))


def part(x: Tensor, *dims: Split) -> Tensor:
    """Return this rank's part of a tensor whose first dims are split over these axes, outermost first: a copy."""
    for dim, axes in enumerate(dims):
        for axis in axes:
            x = local_slice(x, dim, axis)
    return x.clone(memory_format=torch.contiguous_format)


def summed(parameter: nn.Parameter, layout: Layout) -> Tensor:
    """Return the parameter's gradient, summed as its layout says, in fp32 at least."""
    assert parameter.grad is not None
    gradient = parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32))
    for axis in layout.sync:
        gradient = all_reduce(gradient, axis)
    return gradient


def storage_of(x: Tensor) -> int:
    """Return a number that identifies the memory of x."""
    return int(x.untyped_storage()._cdata)


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """Collect every tensor that autograd is asked to save, by torch's functions and by ours."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


def bytes_kept(saved: list[Tensor], module: nn.Module) -> int:
    """Return the bytes of saved tensors: shared memory counts once, the module's own parameters do not count."""
    sizes = {storage_of(x): x.untyped_storage().nbytes() for x in saved}
    return sum(sizes[key] for key in sizes.keys() - set(map(storage_of, module.parameters())))


class Allocations(TorchDispatchMode):
    """The bytes of the tensors that were made in this mode: `now`, and the most so far, `peak`.

    Memory is allocated with the result of an operation, and freed with the last tensor that shares it. The arguments of
    an operation that no operation before has returned existed before this mode, and are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        return sum(list(self.sizes.values()))  # a copy, since a collective's thread may free its tensors meanwhile

    def wait_for(self, wanted: int) -> int:
        """Return `now` once it is `wanted`, or after half a minute: a collective's thread may free its tensors late."""
        wait_until(lambda: self.now == wanted, patient(30.0))
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._register((args, kwargs), is_new=False)
        result = func(*args, **(kwargs or {}))
        self._register(result, is_new=True)
        self.peak = max(self.peak, self.now)
        return result

    def _register(self, tree: Any, *, is_new: bool) -> None:
        for x in tree_leaves(tree):
            if isinstance(x, Tensor) and storage_of(x) not in self.sizes:
                storage = x.untyped_storage()
                self.sizes[storage_of(x)] = storage.nbytes() if is_new else 0
                weakref.finalize(storage, self.sizes.pop, storage_of(x))


@dataclass(frozen=True)
class Call:
    """A collective that a rank called: in which part of a step, of what kind, over which group, with how much data."""

    part: str
    kind: str
    group: str
    size: int
    elements: int
    bytes: int

    @property
    def sent(self) -> float:
        """The number of elements that this rank sends if the collective is a ring."""
        n = self.size  # an all-gather is called with this rank's part, the other collectives with the whole tensor
        factor = {"all_gather": n - 1, "reduce_scatter": (n - 1) / n, "all_reduce": 2 * (n - 1) / n}
        factor |= {"all_to_all": (n - 1) / n, "rotate": 1}
        return factor[self.kind] * self.elements


class RecordedCalls(TorchDispatchMode):
    """Records the calls of torch.distributed as they reach the backend.

    It uses neither the counters in `Traffic` nor the functions in `collectives.py`, which it checks.
    """

    CALLS: ClassVar = {  # torch's operation: our name, and the index of the tensor argument; the group is the next one
        "allreduce_": ("all_reduce", 0),
        "_allgather_base_": ("all_gather", 1),
        "_reduce_scatter_base_": ("reduce_scatter", 1),
        "alltoall_base_": ("all_to_all", 1),
    }

    def __init__(self, part: str, *, agreement: str = "") -> None:
        """`agreement` is the name of the group in which ranks agree on what they do: its calls are kept apart."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.part, self.agreement = part, agreement
        self.calls: list[Call] = []
        self.agreed: list[Call] = []

    @property
    def bytes(self) -> Counter[str]:
        """The bytes of all calls of each kind."""
        total: Counter[str] = Counter()
        for call in self.calls:
            total[call.kind] += call.bytes
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, place = self.CALLS[func._opname]  # KeyError: a call that no formula counts
            (x,) = tree_leaves(args[place])
            group = dist.ProcessGroup.unbox(args[place + 1])
            if kind == "all_to_all" and any(args[place + 3]):  # parts have sizes of their own: all goes to one rank
                kind = "rotate"
            calls = self.agreed if group.group_name == self.agreement else self.calls
            calls.append(Call(self.part, kind, group.group_name, group.size(), x.numel(), x.nbytes))
        return func(*args, **(kwargs or {}))

    def enter(self, part: str, *_: object) -> None:
        """Count what follows under `part`. The other arguments are those of a module's hook, which this can be."""
        self.part = part
