"""Measure the seconds of the parts that take most of a step, in one process, in fp32 on the CPU.

python -m pytest benchmarks/micro.py [-k loss] [--benchmark-autosave] [--benchmark-compare]

It prints pytest-benchmark's table for each part: our implementation in every mode, and torch's own where it has one.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workload import SHAPE
from models import build
from models.shapes import resolve
from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import ChunkSpec, ChunkStorage
from parallel.config import parse
from parallel.engine.context import Context, Place, make_context
from parallel.engine.engine import Engine
from parallel.layout.layout import Layout, ParameterInfo
from parallel.layout.sources import whole
from parallel.optim.adamw import AdamW
from parallel.placement.initial import ON_HOST
from parallel.tensor import MODES, Mode

Benchmark = Callable[[Callable[[], object]], object]
"""The type of pytest-benchmark's fixture."""

B, S, H, N, V = 8, 128, SHAPE["hidden_size"], SHAPE["ffn_dim"], 8192
NAMES = [name for name in MODES if name != "sequence"]


def context_of(**sections: dict[str, object]) -> Context:
    train = dict(device="cpu") | sections.pop("train", {})
    return make_context(parse(sections | dict(train=train), world_size=1, resolve=resolve), Place())


def mode_of(name: str | None) -> Mode:
    context = context_of(parallel=dict(tensor=dict(mode=name, size=1)))
    torch.manual_seed(0)
    return MODES[name](context.mesh, torch.float32)


def forward_and_backward(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    x = torch.randn(B, S, H, requires_grad=True)
    dy = torch.ones_like(function(x))
    return lambda: function(x).backward(dy)


@pytest.mark.benchmark(group=f"linear, forward and backward: x[{B}, {S}, {H}] · W[{N}, {H}]")
class TestLinear:
    @pytest.mark.parametrize("name", NAMES, ids=str)
    def test_ours(self, name: str | None, benchmark: Benchmark) -> None:
        linear = mode_of(name).linear_in(N, H)
        nn.init.normal_(linear.weight)
        benchmark(forward_and_backward(linear))

    def test_torch(self, benchmark: Benchmark) -> None:
        benchmark(forward_and_backward(nn.Linear(H, N)))


@pytest.mark.benchmark(group=f"head and loss, forward and backward: x[{B}, {S}, {H}], vocabulary {V}")
class TestLoss:
    @pytest.mark.parametrize("name", NAMES, ids=str)
    def test_ours(self, name: str | None, benchmark: Benchmark) -> None:
        mode = mode_of(name)
        vocabulary, labels = mode.vocabulary(V, H, padding_idx=None), torch.randint(V, (B, S))
        nn.init.normal_(vocabulary.weight)
        benchmark(forward_and_backward(lambda x: mode.lm_loss(x, vocabulary, labels)))

    def test_torch(self, benchmark: Benchmark) -> None:
        """Measure torch's loss, which makes all logits at once."""
        head, labels = nn.Linear(H, V, bias=False), torch.randint(V, (B * S,))
        benchmark(forward_and_backward(lambda x: F.cross_entropy(head(x).flatten(0, 1), labels, reduction="sum")))


@pytest.mark.benchmark(group=f"a training step of two tokens a microbatch, {SHAPE['num_hidden_layers']} layers of {H}")
class TestStep:
    """Steps that do hardly anything but work on gradients and weights.

    With one microbatch that is norm, clipping and update; each further one adds the arrival of its gradients.
    """

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("microbatches", [1, 8])
    def test_ours(self, microbatches: int, precision: str, benchmark: Benchmark) -> None:
        train = dict(global_batch_size=microbatches, micro_batch_size=1, precision=precision)
        context = context_of(model=dict(SHAPE, dropout=0.0), data=dict(sequence_length=2), train=train)
        engine = Engine(build(context), context)
        batch = {"input_ids": torch.randint(4, SHAPE["vocab_size"], (microbatches, 2))}
        benchmark(lambda: engine.train_step(batch))


@pytest.mark.benchmark(group="the update of 2^23 weights on the host")
class TestUpdate:
    @pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
    def test_ours(self, state_dtype: str, benchmark: Benchmark) -> None:
        parameter = nn.Parameter(torch.randn(2**12, 2**11))
        info = ParameterInfo("weight", "", parameter, Layout((2**12, 2**11), ((), ())), whole("weight", (2**12, 2**11)))
        chunk = Chunk(ChunkSpec([info], torch.float32), ChunkStorage(ON_HOST))
        optimizer = AdamW([chunk], parse(dict(optimizer=dict(state_dtype=state_dtype))).optimizer)
        gradient, one = torch.randn(chunk.size), torch.ones(())

        def update() -> None:
            chunk.gradient.hold(gradient)
            optimizer.step(one, lr=1e-3)

        optimizer.host_share = 1.0
        benchmark(update)
