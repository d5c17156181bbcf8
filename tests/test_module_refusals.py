"""Misuse of a module under an engine is refused by name, on every rank, and no rank waits forever."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parallel
from parallel.engine.module_engine import ModuleEngine
from tests.harness import run
from tests.parity import Raw
from tests.test_module_engine import Plain, batches, config_of, engine_of, loss_of, plain


class Skipping(Plain):
    """A module that leaves one layer out, if `skipped` is its index."""

    skipped: int | None = None

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, sometimes: bool = False) -> Any:
        x = self.embed(input_ids)
        for i, block in enumerate(self.blocks):
            if i != self.skipped:
                x, _ = block(hidden=x, scale=self.scale)
        return self.head(x)


def skip(engine: ModuleEngine, layer: int) -> None:
    engine.module.skipped = layer  # type: ignore[assignment]


def cast(engine: ModuleEngine) -> None:
    engine.module.half()


def retie(engine: ModuleEngine) -> None:
    setattr(engine.module.get_submodule("head"), "weight", nn.Parameter(torch.zeros(31, 13)))  # noqa: B010


def thaw(engine: ModuleEngine) -> None:
    engine.module.get_submodule("blocks.0").requires_grad_(True)


def step_early(engine: ModuleEngine) -> None:
    engine.step()


def forward_without_gradients(engine: ModuleEngine) -> None:
    with torch.no_grad():
        loss_of(engine, batches()[0][0], step=0)


def use_loss_backward(engine: ModuleEngine) -> None:
    loss_of(engine, batches()[0][0], step=0).backward()


def backward_of_many(engine: ModuleEngine) -> None:
    engine.backward(torch.ones(3, requires_grad=True))


def train_without_labels(engine: ModuleEngine) -> None:
    engine.train_step(dict(mask=torch.ones(2)))


def evaluate_without_labels(engine: ModuleEngine) -> None:
    engine.evaluate([dict(mask=torch.ones(2))])


ACTS: dict[str, tuple[Callable[[ModuleEngine], None], str]] = {
    "skip the first": (partial(skip, layer=0), "do different things: rank 0: blocks.0; rank 1: blocks.1"),
    "skip one": (partial(skip, layer=2), "do different things: rank 0: blocks.2; rank 1: blocks.3"),
    "skip the last": (partial(skip, layer=3), "do different things: rank 0: blocks.3; rank 1: a backward"),
    "cast": (cast, "rank 1: model: scale moved"),
    "replace": (retie, "rank 1: model: head.weight is not the parameter it was"),
    "thaw": (thaw, "rank 1: model: blocks.0.never was frozen"),
    "forward without gradients": (
        forward_without_gradients,
        "do different things: rank 0: a forward; rank 1: a forward without gradients",
    ),
    "step": (step_early, "do different things: rank 0: a forward; rank 1: a step"),
    "a loss of many": (backward_of_many, "rank 1: loss: it must be one number with a gradient"),
    "no labels": (train_without_labels, "rank 1: batch: it has neither 'labels' nor 'input_ids', but mask"),
    "evaluate without labels": (evaluate_without_labels, "rank 1: batch: it has neither"),
}


def refusal(rank: int, world_size: int, raw: Raw, act: str) -> str:
    """Return what is raised on this rank when rank 1 alone does this after a first step."""
    torch.manual_seed(3)
    engine, _ = engine_of(rank, world_size, raw, Skipping())
    ids = batches()[0][0].tensor_split(world_size)[rank]

    def step() -> None:
        engine.backward(loss_of(engine, ids, step=0))
        engine.step()

    step()
    try:
        if rank == 1:
            ACTS[act][0](engine)
        step()
    except (parallel.ModelError, parallel.DataError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("act", ACTS)
def test_what_one_rank_alone_does_to_a_module_is_refused_by_name_on_every_rank(act: str) -> None:
    stage = 2 if act == "cast" else 3  # in stage 3 a cast between steps is refused where it is done
    for message in run(refusal, 3, config_of(stage), act):
        assert ACTS[act][1] in message


def test_a_forward_without_gradients_on_one_rank_is_refused_where_a_placement_is_planned() -> None:
    """A plan needs the size of the step from all ranks, and only a forward with gradients begins a step."""
    raw = config_of(2) | dict(zero=dict(stage=2, tensor_placement_policy="auto"))
    for message in run(refusal, 2, raw, "forward without gradients"):
        assert ACTS["forward without gradients"][1] in message


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_layer_that_one_rank_skips_is_allowed_where_parameters_are_whole(stage: int) -> None:
    assert run(refusal, 2, config_of(stage), "skip one") == ["nothing"] * 2


def refusal_alone(rank: int, world_size: int, raw: Raw, act: str) -> str:
    torch.manual_seed(3)
    model = Skipping()
    engine, _ = engine_of(rank, world_size, raw, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        ALONE_ACTS[act](engine)
    except (parallel.ModelError, parallel.ConfigError) as error:
        return str(error)
    return "nothing"


def initialize_with(optimizer: type[torch.optim.Optimizer], model: nn.Module, parameters: nn.Module) -> None:
    parallel.initialize(model, optimizer(parameters.parameters(), lr=0.1))  # type: ignore[call-arg]


def optimizer_of_another_kind(engine: ModuleEngine) -> None:
    model = plain()
    initialize_with(torch.optim.Adafactor, model, model)


def optimizer_of_another_model(engine: ModuleEngine) -> None:
    initialize_with(torch.optim.SGD, plain(), plain())


def optimizer_with_bf16_states(engine: ModuleEngine) -> None:
    raw = config_of(0) | dict(optimizer=dict(state_dtype="bf16"))
    model = plain()
    engine_of(0, 1, raw, model, optimizer=torch.optim.AdamW(model.parameters()))


def nothing_to_train(engine: ModuleEngine) -> None:
    parallel.initialize(plain().requires_grad_(False))


ALONE_ACTS: dict[str, Callable[[ModuleEngine], None]] = {
    "loss.backward": use_loss_backward,
    "a loss of many": lambda engine: engine.backward(torch.ones(3, requires_grad=True)),
    "a loss without gradient": lambda engine: engine.backward(torch.ones(())),
    "another optimizer": optimizer_of_another_kind,
    "another model's optimizer": optimizer_of_another_model,
    "bf16 states of a passed optimizer": optimizer_with_bf16_states,
    "nothing to train": nothing_to_train,
    "optimizer.step": lambda engine: engine.optimizer.inner.step(),  # type: ignore[union-attr]
}


@pytest.mark.parametrize(
    ("act", "message"),
    [
        ("loss.backward", "no engine.backward(loss) was waiting"),
        ("a loss of many", "must be one number with a gradient, got a tensor of shape (3,)"),
        ("a loss without gradient", "must be one number with a gradient"),
        ("another optimizer", "Adafactor is not known"),
        ("another model's optimizer", "are not the model's"),
        ("bf16 states of a passed optimizer", "optimizer.state_dtype: 'bf16' is for the config's own AdamW"),
        ("nothing to train", "none of its parameters"),
        ("optimizer.step", "Call engine.step() instead"),
    ],
)
def test_misuse_is_refused_by_name(act: str, message: str) -> None:
    assert message in run(refusal_alone, 1, config_of(3), act)[0]
