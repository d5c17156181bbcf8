"""What a rank keeps, holds and sends, counted where torch saves, allocates and dispatches; formulas as written."""

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.shapes import OPTShape
from parallel.config.parallel import ContextConfig, TensorConfig
from parallel.mesh.mesh import Mesh
from parallel.mesh.topology import Topology
from parallel.sequence import sequence_of
from parallel.tensor import MODES, Mode
from tests.patience import patient, wait_until

WITHOUT = ContextConfig()


def mode_of(rank: int, tensor: TensorConfig, dtype: torch.dtype, context: ContextConfig = WITHOUT) -> Mode:
    mesh = mesh_of(rank, tensor, context, connect=dist.is_initialized())
    return MODES[tensor.mode](mesh, dtype, sequence=sequence_of(mesh, context))


def mesh_of(rank: int, tensor: TensorConfig, context: ContextConfig, *, connect: bool = False) -> Mesh:
    """Of nothing but these."""
    topology = Topology({"pipe": 1, "data": 1, "context": context.size, **tensor.axes()})
    return Mesh(topology, rank, merged=MODES[tensor.mode].merged_axes(), connect=connect)


def letters(tensor: TensorConfig, shape: OPTShape, batch: int, sequence: int) -> dict[str, int]:
    """What the letters of docs/notation.md stand for."""
    axes = tensor.axes()
    d, r, c, q = (axes.get(name, 1) for name in ("depth", "row", "col", "w"))
    H, F, L = shape.hidden_size, shape.ffn_dim, shape.num_hidden_layers
    P, W = shape.max_position_embeddings + 2, 4 * H * H + 2 * H * F
    parts = axes.get("t", 1) * c * q  # of the vocabulary
    V = -(-shape.vocab_size // parts) * parts
    sizes = dict(p=tensor.size, d=d, r=r, c=c, q=q, T=batch * sequence, A=shape.num_attention_heads)
    return sizes | dict(H=H, F=F, L=L, W=W, V=V, M=L * W + V * H, I=L * (3 * H + F), U=(6 * L + 2 + P) * H)


def value(formula: str, letters: Mapping[str, int]) -> float:
    """What a formula, as the documents write it, comes to: exactly, while only powers of two divide."""
    for sign, python in (("·", "*"), ("−", "-"), ("²", "**2")):
        formula = formula.replace(sign, python)
    return float(eval(formula, dict(letters)))


def storage_of(x: Tensor) -> int:
    """What tells x's memory from others'."""
    return int(x.untyped_storage()._cdata)


@contextmanager
def saved_for_backward() -> Iterator[list[Tensor]]:
    """Everything that autograd is asked to save, by torch's functions and by ours."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


def bytes_kept(saved: list[Tensor], module: nn.Module) -> int:
    """The bytes of what was saved, shared memory once, that of the module's own parameters left out."""
    sizes = {storage_of(x): x.untyped_storage().nbytes() for x in saved}
    return sum(sizes[key] for key in sizes.keys() - set(map(storage_of, module.parameters())))


class Held(TorchDispatchMode):
    """The bytes that tensors made under this mode hold: `now`, and at most so far, `peak`.

    Memory comes into being with the result of an operation, and goes with the last tensor that shares it. What an
    operation is given without having been seen before was there already, and is not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        return sum(list(self.sizes.values()))  # a copy: a collective's own thread may let go of its tensors meanwhile

    def now_or_soon(self, wanted: int) -> int:
        """`now`; but such a thread may be late, so up to seconds are given to come to what is wanted."""
        wait_until(lambda: self.now == wanted, patient(30.0))
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), is_new=False)
        result = func(*args, **(kwargs or {}))
        self._note(result, is_new=True)
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, tree: Any, *, is_new: bool) -> None:
        for x in tree_leaves(tree):
            if isinstance(x, Tensor) and storage_of(x) not in self.sizes:
                storage = x.untyped_storage()
                self.sizes[storage_of(x)] = storage.nbytes() if is_new else 0
                weakref.finalize(storage, self.sizes.pop, storage_of(x))


@dataclass(frozen=True)
class Call:
    """One collective as a rank made it: the part of a step it fell in, its group, and what was handed over."""

    part: str
    kind: str
    group: str
    size: int
    elements: int
    bytes: int

    @property
    def sent(self) -> float:
        """Elements that this rank sends if the collective is a ring."""
        n = self.size
        factor = {"all_gather": n - 1, "reduce_scatter": (n - 1) / n, "all_reduce": 2 * (n - 1) / n}
        factor |= {"all_to_all": (n - 1) / n, "rotate": 1}
        return factor[self.kind] * self.elements  # an all-gather is handed this rank's part, the others the whole


class Handed(TorchDispatchMode):
    """The calls of torch.distributed, each caught as it reaches the backend.

    Nothing of ours is asked: neither the counters in `Traffic` nor the functions in `collectives.py`.
    """

    CALLS: ClassVar = {  # torch's operation: our name, and the argument that is handed over; the group comes next
        "allreduce_": ("all_reduce", 0),
        "_allgather_base_": ("all_gather", 1),
        "_reduce_scatter_base_": ("reduce_scatter", 1),
        "alltoall_base_": ("all_to_all", 1),
    }

    def __init__(self, part: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = part
        self.calls: list[Call] = []

    @property
    def bytes(self) -> Counter[str]:
        """Of all calls together, by kind."""
        total: Counter[str] = Counter()
        for call in self.calls:
            total[call.kind] += call.bytes
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, place = self.CALLS[func._opname]  # KeyError: a call of which no formula knows
            (x,) = tree_leaves(args[place])
            group = dist.ProcessGroup.unbox(args[place + 1])
            if kind == "all_to_all" and any(args[place + 3]):  # parts of different sizes: all of it goes to one rank
                kind = "rotate"
            self.calls.append(Call(self.part, kind, group.group_name, group.size(), x.numel(), x.nbytes))
        return func(*args, **(kwargs or {}))

    def enter(self, part: str, *_: object) -> None:
        """What follows belongs to `part`. The other arguments are a hook's, which this is made to be."""
        self.part = part
