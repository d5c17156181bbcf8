"""Unusual modules and loops train as in plain torch, or are refused by name."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

import parallel
from parallel.engine.loaders import divide_loader
from parallel.engine.module_engine import ModuleEngine
from tests.harness import run
from tests.test_module_engine import config_of, engine_of


class Blocks(nn.Module):
    """A linear layer and three more in a ModuleList, called one after another; subclasses use them differently."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class WithNothing(Blocks):
    """Blocks of which an entry of the list is None."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5), None, nn.Linear(5, 5)])  # type: ignore[list-item]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x if layer is None else layer(self.first(x)).tanh()  # type: ignore[redundant-expr]
        return x


class Nested(Blocks):
    """Blocks whose entries are containers, which are never called."""

    def __init__(self) -> None:
        super().__init__()
        rows = [nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]), nn.ModuleDict(dict(a=nn.Linear(5, 5)))]
        self.layers = nn.ModuleList(rows)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for row in self.layers:
            for layer in row.values() if isinstance(row, nn.ModuleDict) else row:  # type: ignore[union-attr]
                x = layer(x).tanh()
        return x


class Sparse(Blocks):
    """Blocks with an embedding that has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.abs().sum(-1) * 3).long() % 7
        return super().forward(x + self.embed(ids))


class WeightsOnly(Blocks):
    """Blocks that use the layers' weights, and never call the layers."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.linear(self.first(x), layer.get_parameter("weight"))
        return x


class Compares(Blocks):
    """Blocks with a comparison of a weight: with a NaN it would silently be False."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x * 2 if self.layers[1].get_parameter("weight").abs().max() > 0 else x


def batch() -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def made(kind: type[Blocks]) -> Blocks:
    torch.manual_seed(3)
    return kind()


def once(forward: Any, x: Tensor) -> Tensor:
    loss: Tensor = (forward(x) ** 2).mean()
    return loss


Loop = Callable[[Any, Callable[[Tensor], None], Tensor], None]


def one_backward(forward: Any, backward: Callable[[Tensor], None], x: Tensor) -> None:
    backward(once(forward, x))


def two_forwards_then_two_backwards(forward: Any, backward: Callable[[Tensor], None], x: Tensor) -> None:
    losses = once(forward, x), once(forward, 2 * x)
    for loss in losses:
        backward(loss)


def exported(rank: int, world_size: int, stage: int, kind: type[Blocks], loop: Loop, folder: str) -> None:
    module = made(kind)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    engine, _ = engine_of(rank, world_size, config_of(stage, clip_grad_norm=None), module, optimizer=optimizer)
    loop(engine, engine.backward, batch().chunk(world_size)[rank])
    engine.step()
    engine.save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "loop"),
    [
        (WithNothing, one_backward),
        (Nested, one_backward),
        (Sparse, one_backward),
        (Blocks, two_forwards_then_two_backwards),
    ],
)
@pytest.mark.parametrize("stage", [0, 3])
def test_an_unusual_module_or_loop_trains_as_in_plain_torch(
    stage: int, kind: type[Blocks], loop: Loop, tmp_path: Any
) -> None:
    run(exported, 2, stage, kind, loop, str(tmp_path))
    module = made(kind).double()
    loop(module, lambda loss: loss.backward(), batch())
    for name, value in load_file(tmp_path / "model.safetensors").items():
        want = module.get_parameter(name)
        gradient = torch.zeros_like(want) if want.grad is None else want.grad.to_dense()
        torch.testing.assert_close(value, want.detach() - 0.1 * gradient, rtol=1e-12, atol=1e-12)


def penalized(engine: ModuleEngine) -> None:
    loss = once(engine, batch())
    engine.backward(loss + sum(p.square().sum() for p in engine.module.parameters()))


REFUSED: dict[str, tuple[type[Blocks], Callable[[ModuleEngine], Any], str]] = {
    "weights only": (WeightsOnly, lambda engine: once(engine, batch()), "layers.0: one of its parameters is used"),
    "a comparison": (Compares, lambda engine: once(engine, batch()), "layers.1: one of its parameters is used"),
    "a penalty": (Blocks, penalized, "layers.0: one of its parameters is used"),
    "a part": (Blocks, lambda engine: engine.module.get_submodule("layers.1")(batch()), "layers.1: it was called by"),
    "state_dict": (Blocks, lambda engine: engine.module.state_dict(), "Use engine.save_pretrained"),
}


def refused(rank: int, world_size: int, act: str) -> list[str]:
    """Return the message of the refusal, which is raised twice; after it a usual step must work."""
    kind, do, _ = REFUSED[act]
    engine, _ = engine_of(rank, world_size, config_of(3), made(kind))
    messages = []
    for _ in range(2):
        with pytest.raises(parallel.ModelError) as caught:
            do(engine)
        messages.append(str(caught.value))
    if kind is Blocks:
        loss = once(engine, batch())
        engine.backward(loss)
        assert loss.isfinite()
        assert engine.step().grad_norm
    return messages


@pytest.mark.parametrize("act", REFUSED)
def test_use_of_values_that_are_not_gathered_in_stage_3_is_refused_by_name_and_never_nan(act: str) -> None:
    for messages in run(refused, 2, act):
        assert all(REFUSED[act][2] in message for message in messages)


def exported_buffers(rank: int, world_size: int, dtype: torch.dtype, folder: str) -> str:
    module = made(Blocks)
    module.register_buffer("table", torch.ones(3, dtype=dtype))
    engine, _ = engine_of(rank, world_size, config_of(0), module)
    try:
        engine.save_pretrained(folder)
    except parallel.CheckpointError as error:
        return str(error)
    return "saved"


def test_a_buffer_of_any_dtype_is_exported_or_refused_on_every_rank(tmp_path: Any) -> None:
    assert run(exported_buffers, 2, torch.complex64, str(tmp_path)) == ["saved"] * 2
    assert load_file(tmp_path / "model.safetensors")["table"].dtype == torch.complex64
    for message in run(exported_buffers, 2, torch.complex128, str(tmp_path)):
        assert "table: it is torch.complex128" in message


SAMPLERS: dict[str, Callable[[], Sampler[int]]] = {
    "a subset": lambda: SubsetRandomSampler(range(12)),
    "weights": lambda: WeightedRandomSampler([1.0] * 12, 12, replacement=False),
}


def lengths(rank: int, world_size: int) -> list[tuple[int, int]]:
    """Return the length of loaders of 1 to 17 samples on this replica, and the number of batches that they yield."""
    engine, _ = engine_of(rank, world_size, config_of(0), made(Blocks))
    found = []
    for samples, drop_last in itertools.product(range(1, 18), (False, True)):
        loader = DataLoader(TensorDataset(torch.arange(samples)), batch_size=4, drop_last=drop_last)
        part = divide_loader(loader, engine.data, engine._agreement, engine.context.shares)
        found.append((len(part), len(list(part))))
    return found


def test_a_divided_loader_is_as_long_as_what_it_yields() -> None:
    want = [(count, count) for n in range(1, 18) for count in (-(-n // 4), n // 4)]
    assert run(lengths, 2) == [want] * 2


def drawn(rank: int, world_size: int, sampler: str) -> list[int]:
    """Return the samples of an epoch on this replica, whose torch generator has a seed of its own."""
    engine, _ = engine_of(rank, world_size, config_of(0), made(Blocks))
    torch.manual_seed(rank)
    loader = DataLoader(TensorDataset(torch.arange(12)), batch_size=4, sampler=SAMPLERS[sampler]())
    divided = divide_loader(loader, engine.data, engine._agreement, engine.context.shares)
    return [int(x) for (batch,) in divided for x in batch]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_random_sampler_of_torch_draws_each_sample_on_one_replica(sampler: str) -> None:
    """Only RandomSampler was handled once: with others, replicas took parts of different batches, so that some samples
    came twice and some never.
    """
    assert sorted(itertools.chain(*run(drawn, 2, sampler))) == list(range(12))
