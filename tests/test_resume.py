"""Resuming a user's loop equals plain torch without an interruption: optimizers, schedulers, frozen parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

import parallel
from parallel.config import parse
from parallel.engine.context import Place, make_context, use
from parallel.engine.module_engine import ModuleEngine
from parallel.optim.param_groups import WAYS_TO_COMPUTE
from parallel.placement.policy import host_bytes
from parallel.storage.transfer import Tier
from tests.harness import run
from tests.parity import Raw

Make = Callable[[nn.Module], torch.optim.Optimizer]

ROUNDING = 1e-12
"""Relative, in fp64: a few sums in another order, over a handful of steps."""


class Net(nn.Module):
    """A net with two layers that stage 3 gathers on demand, a buffer that training changes, and an extra state."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 1)
        self.register_buffer("seen", torch.zeros(1))
        self.notes: dict[int, str] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.get_buffer("seen").add_(1)
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)  # type: ignore[no-any-return]

    def get_extra_state(self) -> dict[int, str]:
        return self.notes

    def set_extra_state(self, state: dict[int, str]) -> None:
        self.notes = state


def net(width: int = 6) -> Net:
    torch.manual_seed(1)
    return Net(width)


def inputs(step: int) -> Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def config_of(stage: int = 0, **zero: Any) -> Raw:
    return dict(zero=dict(stage=stage) | zero, train=dict(precision="fp64", clip_grad_norm=None, device="cpu"))


def engine_of(
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    raw: Raw | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> ModuleEngine:
    config = parse(raw or config_of(), world_size=world_size)
    use(make_context(config, Place(rank, world_size, rank, world_size)))
    engine, *_ = parallel.initialize(module, optimizer)
    assert isinstance(engine, ModuleEngine)
    return engine


def train(engine: ModuleEngine, first: int, last: int, after: Callable[[], object] = lambda: None) -> None:
    for step in range(first, last):
        x = inputs(step).tensor_split(engine.data.size)[engine.data.rank]
        engine.backward(engine(x).square().mean())
        engine.step()
        after()


def train_in_plain_torch(
    module: nn.Module, optimizer: torch.optim.Optimizer, steps: range, after: Callable[[], object] = lambda: None
) -> None:
    for step in steps:
        module(inputs(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after()


def sums_of(engine: ModuleEngine) -> dict[str, float]:
    """Return, by KIND/NAME, a weighted sum of the elements of each tensor that this rank owns."""
    found: dict[str, float] = {}
    for piece in engine.state_pieces(owned=True):
        places = torch.arange(torch.Size(piece.shape).numel()).view(piece.shape)
        own = places[tuple(slice(*bounds) for bounds in piece.box)]
        found[piece.name] = found.get(piece.name, 0.0) + (piece.data * torch.cos(own.double())).sum().item()
    return found


def sum_in_plain_torch(x: Tensor) -> float:
    return (x.detach() * torch.cos(torch.arange(x.numel()).double()).view(x.shape)).sum().item()


def added(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(part.get(name, 0.0) for part in parts) for name in {n for part in parts for n in part}}


def fields(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    left_out = {"params", *WAYS_TO_COMPUTE}
    return [{k: v for k, v in group.items() if k not in left_out} for group in optimizer.param_groups]


# -- param groups and schedulers ---------------------------------------------------------------------------------------


class Factor:
    """A user's callable for LambdaLR, whose attributes are a part of the scheduler's state."""

    def __init__(self) -> None:
        self.calls: dict[int, float] = {}

    def __call__(self, epoch: int) -> float:
        self.calls[epoch] = 0.5**epoch
        return 0.5**epoch


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.1)


def with_tensor_lr(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.1, dtype=torch.float64), foreach=False)


SCHEDULERS: dict[str, tuple[Make, Callable[[Any], Any]]] = {
    "OneCycleLR": (adamw, lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=10)),
    "OneCycleLR of SGD": (sgd, lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=10)),
    "MultiStepLR": (sgd, lambda o: schedulers.MultiStepLR(o, [2, 4])),
    "LambdaLR": (adamw, lambda o: schedulers.LambdaLR(o, Factor())),
    "ReduceLROnPlateau": (sgd, lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=0.9)),
    "CosineAnnealingWarmRestarts": (adamw, lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2)),
    "CyclicLR": (sgd, lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2)),
    "SequentialLR": (
        adamw,
        lambda o: schedulers.SequentialLR(o, [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.5)], [3]),
    ),
    "StepLR of a tensor lr": (with_tensor_lr, lambda o: schedulers.StepLR(o, 2)),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_resumed_schedule_equals_plain_torchs(kind: str, tmp_path: Path) -> None:
    """Groups once got lr alone back: OneCycleLR went on with the first betas, MultiStepLR without its milestones."""
    optimizer_of, schedule = SCHEDULERS[kind]

    def start(raw: Raw | None) -> tuple[Any, torch.optim.Optimizer, Callable[[], None], Any]:
        module = net().double()
        optimizer = optimizer_of(module)
        scheduler = schedule(optimizer)
        advance = (lambda: scheduler.step(1.0)) if kind == "ReduceLROnPlateau" else scheduler.step
        return module if raw is None else engine_of(module, optimizer, raw=raw), optimizer, advance, scheduler

    module, optimizer, advance, _ = start(None)
    train_in_plain_torch(module, optimizer, range(6), advance)
    wanted = repr(fields(optimizer))

    engine, _, advance, scheduler = start(config_of())
    train(engine, 0, 3, advance)
    engine.save_checkpoint(tmp_path, dict(scheduler=scheduler.state_dict()))
    engine, optimizer, advance, scheduler = start(config_of())
    rate = optimizer.param_groups[0]["lr"]
    scheduler.load_state_dict(engine.load_checkpoint(tmp_path)["scheduler"])
    assert not isinstance(rate, Tensor) or optimizer.param_groups[0]["lr"] is rate
    train(engine, 3, 6, advance)
    assert repr(fields(optimizer)) == wanted
    for name, parameter in module.named_parameters():
        got = sums_of(engine)[f"master/{name}"]
        assert got == pytest.approx(sum_in_plain_torch(parameter), rel=ROUNDING, abs=ROUNDING), name


def two_groups(module: nn.Module, kind: str, *, altered: bool = False) -> torch.optim.Optimizer:
    """Return an optimizer of two groups; `altered` changes every hyperparameter: a checkpoint must bring them back."""
    first, rest = [[p for n, p in module.named_parameters() if n.startswith("first") is x] for x in (True, False)]
    if kind == "SGD":
        more = dict(momentum=0.9, dampening=0.1, maximize=False, rank="slow")
        other = dict(momentum=0.0, dampening=0.0, maximize=True, rank="fast")
        chosen = other if altered else more
        return torch.optim.SGD([dict(params=first, weight_decay=0.2), dict(params=rest, **chosen)], lr=0.1)
    options: Any = dict(lr=0.3, betas=(0.5, 0.6), eps=1e-2) if altered else dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    groups = [dict(params=first, weight_decay=0.5 * altered), dict(params=rest, amsgrad=not altered, tag={1: altered})]
    return getattr(torch.optim, kind)(groups, **options)  # type: ignore[no-any-return]


def resumed_in(rank: int, world_size: int, case: tuple[str, tuple[int, int], Raw], folder: Path) -> dict[str, float]:
    """Return the sums after two steps in one stage, a checkpoint, and two more in the other stage."""
    kind, stages, zero = case
    where: Any = dict(rank=rank, world_size=world_size)
    module = net().double()
    engine = engine_of(module, two_groups(module, kind), raw=config_of(stages[0]), **where)
    engine.save_checkpoint(folder / "before")  # it must change nothing
    module.notes[3] = "three"
    train(engine, 0, 2)
    engine.save_checkpoint(folder)
    saved = repr(fields(engine.optimizer.inner))  # type: ignore[union-attr]

    module = net().double()
    for parameter in module.parameters():
        parameter.data.zero_()
    optimizer = two_groups(module, kind, altered=True)
    if "nvme_dir" in zero:
        disk = folder / f"disk{rank}"
        disk.mkdir()
        host = host_bytes(engine.placement_manager.initial.sizes, 0, 0, 0)  # room for no states
        zero = zero | dict(nvme_dir=str(disk), host_memory=host)
    engine = engine_of(module, optimizer, raw=config_of(stages[1], **zero), **where)
    assert ({chunk.placement.states for chunk in engine.chunks} >= {Tier.DISK}) == ("nvme_dir" in zero)
    engine.load_checkpoint(folder)
    assert module.notes == {3: "three"}
    assert repr(fields(optimizer)) == saved
    train(engine, 2, 4)
    return sums_of(engine)


PLACES: tuple[tuple[str, tuple[int, int], Raw], ...] = (
    ("Adam", (1, 3), dict(tensor_placement_policy="cpu")),
    ("AdamW", (3, 0), {}),
    ("SGD", (0, 2), dict(tensor_placement_policy="cpu")),
    ("Adam", (2, 3), dict(tensor_placement_policy="cpu", nvme_dir="")),
)


def resumed_in_all(rank: int, world_size: int, folder: Path) -> list[dict[str, float]]:
    found = []
    for i, case in enumerate(PLACES):
        (folder / str(i)).mkdir(exist_ok=True)
        found.append(resumed_in(rank, world_size, case, folder / str(i)))
    return found


def test_every_field_of_every_group_resumes_in_every_stage_and_placement_as_in_plain_torch(tmp_path: Path) -> None:
    """amsgrad's third state, dampening and maximize among them.

    SGD's first step is not dampened, and a checkpoint before it once changed that.
    """
    for (kind, _, _), *parts in zip(PLACES, *run(resumed_in_all, 2, tmp_path), strict=True):
        module = net().double()
        optimizer = two_groups(module, kind)
        train_in_plain_torch(module, optimizer, range(4))
        got = added(parts)
        for name, parameter in module.named_parameters():
            want = sum_in_plain_torch(parameter)
            assert got[f"master/{name}"] == pytest.approx(want, rel=1e-10, abs=1e-10), (kind, name)
            for state in ("exp_avg", "max_exp_avg_sq", "momentum_buffer"):
                if isinstance(x := optimizer.state[parameter].get(state), Tensor):
                    assert got[f"{state}/{name}"] == pytest.approx(sum_in_plain_torch(x), rel=1e-10, abs=1e-10)


# -- frozen parameters -------------------------------------------------------------------------------------------------

FROZEN = ("first.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias")


def freeze(module: nn.Module, *, frozen: bool) -> nn.Module:
    for name in FROZEN:
        module.get_parameter(name).requires_grad_(not frozen)
    return module


def thaw_or_freeze(rank: int, world_size: int, folder: Path) -> list[dict[str, float]]:
    """Return the sums of runs that froze or trained some parameters for two steps, and did the other for two more."""
    found = []
    where: Any = dict(rank=rank, world_size=world_size)
    for i, (stage, policy, passes, before) in enumerate(FREEZES):
        module = freeze(net().double(), frozen=before)
        engine = engine_of(module, adam_of_all(module) if passes else None, raw=raw_of(stage, policy), **where)
        train(engine, 0, 2)
        engine.save_checkpoint(folder / str(i))
        module = freeze(net().double(), frozen=not before)
        for parameter in module.parameters():
            parameter.data.fill_(-1.0)
        other = (stage + 1 + i) % 4
        engine = engine_of(module, adam_of_all(module) if passes else None, raw=raw_of(other, policy), **where)
        engine.load_checkpoint(folder / str(i))
        train(engine, 2, 4)
        found.append(sums_of(engine))
    return found


def raw_of(stage: int, policy: str = "cuda") -> Raw:
    raw = config_of(stage, tensor_placement_policy=policy)
    rates = dict(kind="constant", warmup_steps=0)
    return raw | dict(optimizer=dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0), lr_scheduler=rates)


def adam_of_all(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)


FREEZES = [
    (stage, policy, passes, before)
    for stage, policy, passes in ((0, "cuda", True), (1, "cpu", False), (2, "cuda", False), (3, "cpu", True))
    for before in (True, False)
]


def test_what_is_frozen_is_saved_and_what_is_thawed_starts_with_new_states(tmp_path: Path) -> None:
    """The reference is one optimizer of plain torch, which skips parameters without a gradient."""
    for (stage, policy, _, before), *parts in zip(FREEZES, *run(thaw_or_freeze, 2, tmp_path), strict=True):
        module = freeze(net().double(), frozen=before)
        optimizer = adam_of_all(module)
        train_in_plain_torch(module, optimizer, range(2))
        freeze(module, frozen=not before)
        train_in_plain_torch(module, optimizer, range(2, 4))
        got = added(parts)
        assert got["buffer/seen"] == 4
        for name, parameter in module.named_parameters():
            want = sum_in_plain_torch(parameter)
            assert got[f"master/{name}"] == pytest.approx(want, rel=1e-10), (stage, policy, before, name)
