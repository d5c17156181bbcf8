"""The bytes that a rank holds and sends when ZeRO divides a module of which nothing is known."""

from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.chunk.spec import ALIGNMENT
from parallel.engine.module_engine import ModuleEngine
from parallel.modules.units import layers_of
from parallel.optim.adamw import AdamW
from parallel.zero.gatherer import State
from tests.harness import run
from tests.parity import Raw
from tests.test_module_engine import MODELS, batches, config_of, engine_of, loss_of


def step(engine: ModuleEngine, backwards: int = 1) -> None:
    engine.train()
    ids = batches()[0][0].tensor_split(engine.data.size)[engine.data.rank]
    for _ in range(backwards):
        engine.backward(loss_of(engine, ids, step=0))
    engine.step()


def held(rank: int, world_size: int, raw: Raw, model: str) -> tuple[int, int, dict[str, int]]:
    """Return the number of parameters, the number in a rank's slices, and bytes when an update begins.

    Both numbers count padding.
    """
    engine, _ = engine_of(rank, world_size, raw, MODELS[model]())
    found: dict[str, int] = {}
    update = engine.optimizer.step

    def counted(factor: Tensor, lr: float, found_inf: Tensor | None = None) -> None:
        totals = [x for c in engine.chunks for x in (c.gradient.total, c.gradient.accumulator.buffer)]
        found["gradients"] = sum(x.untyped_storage().nbytes() for x in totals if x is not None)
        update(factor, lr, found_inf)

    engine.optimizer.step = counted  # type: ignore[method-assign]
    step(engine)
    found["master weights"] = sum(c.master.untyped_storage().nbytes() for c in engine.chunks)
    buffers = [chunk.parameters.whole for chunk in engine.chunks]
    buffers += [chunk.parameters.own for chunk in engine.chunks if chunk.spec.is_partitioned]
    found["parameters"] = sum(x.untyped_storage().nbytes() for x in buffers)
    assert isinstance(engine.optimizer, AdamW)
    moments = [x for _, x in engine.optimizer.moments.held()]
    found["moments"] = sum(x.untyped_storage().nbytes() for x in moments)
    return sum(c.size for c in engine.chunks), sum(len(c.master) for c in engine.chunks), found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("model", ["opt", "llama"])
def test_bytes_of_a_rank_equal_the_zero_paper(model: str, stage: int) -> None:
    """The formulas are those of Rajbhandari et al. 2020, section 5, as in test_zero.py."""
    n = 3
    for psi, shard, found in run(held, n, config_of(stage, precision="bf16"), model):
        assert found["moments"] == 8 * shard
        assert psi % (ALIGNMENT * n) == 0
        assert shard == (psi // n if stage else psi)
        assert found["parameters"] == 2 * (psi if stage < 3 else shard)
        assert found["master weights"] == found["gradients"] == 4 * shard


class Stack(nn.Module):
    """A model that recomputes its layers in torch's older way, by a backward within the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 16), nn.Linear(16, 31)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=True)
        y: Tensor = self.head(x)
        return y


def sent(rank: int, world_size: int, raw: Raw, recomputation: str, backwards: int) -> tuple[int, int, dict[str, float]]:
    engine, _ = engine_of(rank, world_size, raw, Stack() if recomputation == "reentrant" else MODELS["opt"]())
    engine.mesh.traffic.reset()
    step(engine, backwards)
    blocks = sum(chunk.size for chunk in engine.chunks if chunk.infos[0].unit)
    handed = {kind: count / 8 for kind, count in engine.mesh.traffic.bytes.items()}
    return sum(chunk.size for chunk in engine.chunks), blocks, handed


@pytest.mark.parametrize(
    ("stage", "recomputation"), [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (3, "full"), (3, "reentrant")]
)
def test_a_step_sends_what_the_table_of_stages_says(stage: int, recomputation: str) -> None:
    """There are m backwards, each of which sums over ranks, so mΨ elements are reduced in every stage.

    The parameters are gathered once, after the update; in stage 3 a block is gathered for each forward and each
    backward, and the root once for both. A recomputation gathers nothing by itself. Three more elements are the norm,
    whether somebody has written into parameters, and whether a loss was finite; the ranks' agreements go through
    another group.
    """
    n, m = 2, 3
    raw = config_of(stage, activation_checkpointing="full" if recomputation == "full" else "none")
    for psi, blocks, handed in run(sent, n, raw, recomputation, m):
        reduced = handed["all_reduce"] - 3 if stage == 0 else handed["reduce_scatter"]
        assert reduced == m * psi
        gathered = {0: 0, 1: psi, 2: psi, 3: m * (psi + blocks)}[stage]
        assert handed.get("all_gather", 0) == gathered / n


def most_whole(rank: int, world_size: int, raw: Raw, model: str) -> tuple[int, int, int]:
    """Return two numbers of layers that are gathering or whole, and the bytes of whole parameters.

    The first number is the largest while a layer computes; the second one, and the bytes, are those after an
    evaluation.
    """
    engine, _ = engine_of(rank, world_size, raw, MODELS[model]())
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(unit.state is not State.RELEASED for unit in engine._passes.gatherer.units))

    for chunk in engine.chunks:
        for info in chunk.infos:
            if info.unit and info.parameter.requires_grad:
                info.parameter.register_hook(count)
    for layer in layers_of(engine.module).values():
        layer.register_forward_pre_hook(count)
    step(engine)
    step(engine, 2)
    engine.evaluate([dict(input_ids=batches()[0][0])])
    left = sum(chunk.parameters.whole.untyped_storage().nbytes() for chunk in engine.chunks)
    return most, sum(unit.state is not State.RELEASED for unit in engine._passes.gatherer.units), left


@pytest.mark.parametrize("options", [{}, dict(activation_checkpointing="full")])
@pytest.mark.parametrize("model", ["opt", "llama"])
def test_no_more_than_two_layers_are_whole_at_once_and_none_is_left(model: str, options: Any) -> None:
    for found in run(most_whole, 2, config_of(3, **options), model):
        assert found == (2, 0, 0)
