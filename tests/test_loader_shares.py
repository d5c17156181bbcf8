"""Batches that replicas cannot share evenly: the gradients, losses and weights are those of one process."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import parallel
from models.build import build
from models.shapes import resolve
from parallel.config import parse
from parallel.engine.context import Place, make_context, use
from parallel.engine.module_engine import ModuleEngine
from tests.harness import run
from tests.parity import Raw, whole

BATCH, NUM = 5, 11  # the batches have 5, 5 and 1 samples: of the last one most replicas have none
BOUND = 1e-13  # of fp64, whose sums over samples are in another order


class Model(nn.Module):
    """A small language model with layers that stage 3 gathers on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(13, 6), nn.Linear(6, 13)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.head(x)
        return y


def model() -> Model:
    torch.manual_seed(5)
    return Model()


def samples() -> list[dict[str, Tensor]]:
    """Return NUM samples; their numbers of labels differ, and some have none."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(13, (NUM, 4), generator=generator)
    kept = torch.arange(4) < (torch.arange(NUM) % 4)[:, None]
    return [dict(ids=x, labels=y) for x, y in zip(ids, torch.where(kept, ids, -100), strict=True)]


def loss_of(output: Tensor, ids: Tensor) -> Tensor:
    """Return a mean over samples, as a user's loop has it."""
    return F.cross_entropy(output.flatten(0, 1), ids.flatten().to(output.device))


def criterion(output: Tensor, labels: Tensor) -> Tensor:
    """Return a mean over the counted labels."""
    return F.cross_entropy(output.flatten(0, 1), labels.flatten())


def loader(**more: Any) -> DataLoader[Any]:
    return DataLoader(samples(), batch_size=BATCH, **more)  # type: ignore[arg-type]


def plainly(batches: Any) -> Iterator[list[Tensor]]:
    """Yield the ids of the batches of each step: one, then two."""
    iterator = iter(batches)
    yield [next(iterator)["ids"]]
    yield [batch["ids"] for batch in iterator]


def reading_ahead(batches: Any) -> Iterator[list[Tensor]]:
    """Yield the same; everything has been read before."""
    first, *rest = list(batches)
    yield [first["ids"]]
    yield [batch["ids"] for batch in rest]


def copied(batches: Any) -> Iterator[list[Tensor]]:
    """Yield copies, one at a time, as a loop does that moves its batches to a device."""
    iterator = iter(batches)
    yield [next(iterator)["ids"].clone()]
    yield (batch["ids"].clone() for batch in iterator)  # type: ignore[misc]


WAYS = {"plainly": plainly, "reading ahead": reading_ahead, "copied": copied}


def train_by_torch() -> dict[str, Tensor]:
    module = model().double()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3)
    for _ in range(2):
        for part in plainly(loader()):
            optimizer.zero_grad()
            for ids in part:
                (loss_of(module(ids), ids) / 2).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}


def engine_on(rank: int, world_size: int, raw: Raw, **given: Any) -> tuple[ModuleEngine, Any, Any]:
    config = parse(raw, world_size=world_size, batches=False)
    use(make_context(config, Place(rank, world_size, rank, world_size)))
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3)
    engine, train, held_out, _ = parallel.initialize(module, optimizer, **given)
    return engine, train, held_out


def config_of(stage: int, **zero: Any) -> Raw:
    return dict(zero=dict(stage=stage, **zero), train=dict(precision="fp64", clip_grad_norm=0.1, micro_batch_size=2))


def weights_of(engine: ModuleEngine) -> dict[str, Tensor]:
    return whole(engine, [chunk.master for chunk in engine.chunks])


def train_by_engine(rank: int, world_size: int, stage: int) -> dict[str, dict[str, Tensor]]:
    """Return the weights after two epochs of a user's loop, for each way of reading the loader."""
    found = {}
    for way, steps in WAYS.items():
        engine, batches, _ = engine_on(rank, world_size, config_of(stage), train_dataloader=loader())
        for _ in range(2):
            for part in steps(batches):
                for ids in part:
                    engine.backward(loss_of(engine(ids), ids) / 2)
                engine.step()
        found[way] = weights_of(engine)
    return found


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (3, 1), (2, 2), (3, 3)])
def test_a_users_loop_over_uneven_batches_trains_as_one_process(ranks: int, stage: int) -> None:
    """Two replicas have 3 and 2 of 5 samples; the last batch has one sample, of which most replicas have none."""
    want = train_by_torch()
    for way, weights in run(train_by_engine, ranks, stage)[0].items():
        for name, x in want.items():
            assert torch.allclose(weights[name], x, rtol=BOUND, atol=BOUND), (way, name)


def mean_over_labels(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Return the sum of the losses of the counted labels, and their number."""
    output, labels = module(batch["ids"]), batch["labels"].flatten()
    return F.cross_entropy(output.flatten(0, 1), labels, reduction="sum"), int((labels != -100).sum())


def steps_by_torch() -> tuple[list[float], dict[str, Tensor]]:
    """Return the mean loss of each step and of an evaluation after them, and the weights, by plain torch."""
    module, found = model().double(), []
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3)
    for batch in loader():
        optimizer.zero_grad()
        total, count = mean_over_labels(module, batch)
        (total / count).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()
        found.append(total.item() / count)
    sums = [mean_over_labels(module, batch) for batch in loader(shuffle=True)]
    found.append(sum(total.item() for total, _ in sums) / sum(count for _, count in sums))
    return found, {name: p.detach() for name, p in module.named_parameters()}


def steps_by_engine(rank: int, world_size: int, stage: int) -> tuple[list[float], dict[str, Tensor], float]:
    """Return the same by train_step and evaluate; last the gradient's weight of a user's loop after that."""
    given = dict(train_dataloader=loader(), eval_dataloader=loader(shuffle=True), criterion=criterion)
    engine, train, held_out = engine_on(rank, world_size, config_of(stage), **given)
    found = [engine.train_step(batch).loss for batch in train]
    found.append(engine.evaluate(held_out))
    weights = weights_of(engine)
    engine(torch.zeros(2, 4, dtype=torch.int64))
    return found, weights, engine.loss_weights.backward()[0]


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3), (3, 0), (3, 3)])
def test_train_step_and_evaluate_take_the_mean_over_the_labels_of_uneven_batches(ranks: int, stage: int) -> None:
    """The replicas have other numbers of microbatches, of 2 samples; a sample that is repeated counts no label."""
    losses, want = steps_by_torch()
    for found, weights, weight in run(steps_by_engine, ranks, stage):
        assert found == pytest.approx(losses, rel=BOUND)
        assert all(torch.allclose(weights[name], x, rtol=BOUND, atol=BOUND) for name, x in want.items())
        assert weight == 1.0


def refusals(rank: int, world_size: int) -> list[str]:
    """Return what is said of losses whose share is not known; in the last case of one that is."""
    said = []
    for way in ("copies of what was read ahead", "two batches in one", "what was read ahead"):
        engine, batches, _ = engine_on(rank, world_size, config_of(0), train_dataloader=loader())
        every = [batch["ids"] for batch in batches]
        parts = [every[0], every[2]] if way == "two batches in one" else every[2:]
        if way.startswith("copies"):
            parts = [ids.clone() for ids in parts]
        loss = sum(loss_of(engine(ids), ids) for ids in parts)
        try:
            engine.backward(loss)
            said.append("")
        except parallel.ModelError as error:
            said.append(str(error))
    return said


def test_a_loss_whose_share_cannot_be_known_is_refused_on_every_rank() -> None:
    for copies, mixed, known in run(refusals, 2):
        assert "it cannot be known which batch of the dataloader it is from" in copies
        assert "there were forwards of batches of which this replica has different shares" in mixed
        assert not known


def evaluated_in_stages(rank: int, world_size: int) -> list[float]:
    """Return the loss of a model of models.build over 3 samples in batches of 2: of the last, one replica has none."""
    raw = dict(model=dict(name="opt-tiny"), data=dict(sequence_length=6))
    raw |= dict(train=dict(precision="fp64", global_batch_size=world_size, micro_batch_size=1, steps=1))
    context = use(make_context(parse(raw, world_size=world_size, resolve=resolve), Place(rank, world_size, rank, 1)))
    data = [dict(input_ids=ids) for ids in torch.arange(18).view(3, 6)]
    given: DataLoader[Any] = DataLoader(data, batch_size=2)  # type: ignore[arg-type]
    engine, _, held_out, _ = parallel.initialize(build(context), eval_dataloader=given)
    return [engine.evaluate(held_out), engine.evaluate(list(held_out))]


def test_an_evaluation_in_stages_counts_a_repeated_sample_nowhere() -> None:
    """The mean of fp64 numbers near 6 is over 15 labels, in another order."""
    want = run(evaluated_in_stages, 1)[0][0]
    assert run(evaluated_in_stages, 2) == [pytest.approx([want] * 2, rel=BOUND)] * 2
