"""Every optimizer of torch's that updates elements by themselves trains as it does in one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.optim.elementwise import state_kinds
from tests.harness import run
from tests.parity import Raw
from tests.test_module_engine import config_of, engine_of

optim = torch.optim
Made = Callable[[Any], torch.optim.Optimizer]


class Inheriting(optim.AdamW):
    """A class of a user's own that inherits the step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.05, weight_decay=0.1)


OPTIMIZERS: dict[str, Made] = {
    "Adam, amsgrad": lambda p: optim.Adam(p, lr=0.05, amsgrad=True, weight_decay=0.1),
    "Adam, decoupled": lambda p: optim.Adam(p, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
    "AdamW, maximize": lambda p: optim.AdamW(p, lr=0.05, maximize=True),
    "AdamW, foreach": lambda p: optim.AdamW(p, lr=0.05, foreach=True),
    "AdamW, fused": lambda p: optim.AdamW(p, lr=0.05, fused=True),
    "SGD, nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01),
    "RMSprop, centered": lambda p: optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5, weight_decay=0.1),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.05, lr_decay=0.1, initial_accumulator_value=0.3, weight_decay=0.1),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "Adamax": lambda p: optim.Adamax(p, lr=0.05, weight_decay=0.1),
    "NAdam": lambda p: optim.NAdam(p, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: optim.RAdam(p, lr=0.05, weight_decay=0.1),
    "ASGD": lambda p: optim.ASGD(p, lr=0.05, t0=1.0, weight_decay=0.1),
    "Rprop": lambda p: optim.Rprop(p, lr=0.02),
    "a subclass": Inheriting,
}
STEPS, SAVED_AFTER = 7, 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_states_of_a_group_are_known_before_there_are_any(name: str) -> None:
    """A load is refused for states that only one side has, before the groups of the checkpoint are restored."""
    weight = nn.Parameter(torch.ones(3, 2))
    update = OPTIMIZERS[name]([weight])
    known = state_kinds(update, update.param_groups[0])
    weight.grad = torch.ones(3, 2)
    update.step()
    assert known == [kind for kind, x in update.state[weight].items() if isinstance(x, Tensor) and x.shape == (3, 2)]


def model() -> Any:
    """Return a module of which a part has no gradient in the first steps: its states begin later."""
    torch.manual_seed(1)
    return nn.ModuleDict(dict(first=nn.Linear(9, 20), last=nn.Linear(20, 5), late=nn.Linear(9, 5)))


def loss_of(module: Any, x: Tensor, *, step: int) -> Tensor:
    y: Tensor = module["last"](module["first"](x).tanh())
    if step > SAVED_AFTER:
        y = y + module["late"](x)
    return y.square().mean()


class Loss(nn.Module):
    """The loss as a module, which an engine calls."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = model()

    def forward(self, x: Tensor, step: int) -> Tensor:
        return loss_of(self.parts, x, step=step)


def inputs(step: int) -> Tensor:
    return torch.randn(6, 9, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def by_torch(make: Made) -> dict[str, Tensor]:
    module = Loss().double()
    update = make(module.parameters())
    for step in range(STEPS):
        update.zero_grad()
        module(inputs(step), step).backward()
        update.step()
    return {name: p.detach() for name, p in module.named_parameters()}


def by_engine(rank: int, world_size: int, raw: Raw, folder: str) -> dict[str, dict[str, Tensor]]:
    """Return the weights of each optimizer after steps of which the last follow from a checkpoint."""
    found = {}
    for name, make in OPTIMIZERS.items():
        for first in (0, SAVED_AFTER):
            module = Loss()
            engine, _ = engine_of(rank, world_size, raw, module, optimizer=make(module.parameters()))
            if first:
                engine.load_checkpoint(Path(folder) / name)
            for step in range(first, STEPS):
                if step == SAVED_AFTER and not first:
                    engine.save_checkpoint(Path(folder) / name)
                    break
                engine.backward(engine(inputs(step).tensor_split(world_size)[rank], step))
                engine.step()
        with engine.full_parameters() as weights:
            found[name] = dict(weights)
    return found


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_each_elementwise_optimizer_trains_and_resumes_as_in_one_process(stage: int, tmp_path: Path) -> None:
    """A gradient rounds in another order, in fp64, and Rprop's signs do not depend on that. Scalars of a state (NAdam's
    product of momenta) and values that begin at another number than 0 (Rprop's step sizes) survive a checkpoint.
    """
    (got, *_) = run(by_engine, 2, config_of(stage, clip_grad_norm=None), str(tmp_path))
    for name, make in OPTIMIZERS.items():
        for key, x in by_torch(make).items():
            torch.testing.assert_close(got[name][key], x, rtol=1e-9, atol=1e-12, msg=f"{name}: {key}")
