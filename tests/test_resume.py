"""Resuming a user's loop equals plain torch without an interruption, and nothing is left out silently."""

import json
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

import parallel
from parallel.checkpoint.values import decode, encode
from parallel.config import parse
from parallel.engine.context import Place, make_context, use
from parallel.engine.module_engine import ModuleEngine
from parallel.errors import CheckpointError
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


# -- values ------------------------------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "keys": {1: "a", "1": "b", None: "c", 2.5: "d", (1, 2): "e", True and "yes": "f"},
    "a key with a mark": {"$tensor": 0},
    "numbers": [0, -1, 2**200, 2**3000, 1.5, float("inf"), -float("inf"), 1j, True, None, "é\ud800", b"\x00\xff"],
    "containers": [
        (1, (2,)),
        {3, 1},
        frozenset([1]),
        [],
        {},
        (),
        Counter({2: 1}),
        OrderedDict(b=1, a=2),
        deque([1], 3),
    ],
    "a default": defaultdict(list, {1: [2]}),
    "numpy": [np.float32(0.1), np.int64(3), np.bool_(True), np.datetime64("2026-01-01"), np.str_("text")],
    "torch": [torch.Size([1, 2]), torch.bfloat16, torch.device("cpu")],
    "random": random.Random(3).getstate(),
}
TENSORS = [
    torch.arange(6.0).view(2, 3).t(),
    torch.tensor(2.0, dtype=torch.bfloat16),
    torch.zeros(0, 3),
    torch.tensor([1, 2**16 - 1], dtype=torch.uint16),
    torch.tensor([1 + 2j]),
    torch.tensor([True]),
]
ARRAYS = [np.arange(6, dtype=np.uint16).reshape(2, 3), np.zeros((0, 2)), np.array(3.0), np.array(["ab", "c"])]


def test_values_come_back_equal_and_of_the_same_types() -> None:
    encoded = encode(VALUES)
    got = decode(json.loads(json.dumps(encoded.json)), encoded.tensors)
    assert got == VALUES
    assert repr(got) == repr(VALUES)  # which tells 1 from True and from numpy's 1
    encoded = encode(dict(tensors=TENSORS, arrays=ARRAYS, nan=[float("nan"), np.float64("nan")]))
    got = decode(json.loads(json.dumps(encoded.json)), encoded.tensors)
    for ours, theirs in zip(got["tensors"], TENSORS, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(ours, theirs)
    for x, y in zip(got["arrays"], ARRAYS, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert (x == y).all()
        x[...] = y  # it can be written to
    assert all(x != x for x in got["nan"])


class Own:
    """A class of the user's."""


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (dict(scheduler=dict(lr_lambdas=[lambda step: 1.0])), 'extra["scheduler"]["lr_lambdas"][0]'),
        ({5: Own()}, "extra[5]"),
        ({"a": {Own(): 1}}, 'extra["a"]'),
        (dict(x=torch.ones(2).to_sparse()), 'extra["x"]'),
        (dict(x=torch.ones(2, device="meta")), 'extra["x"]'),
        (dict(x=np.array([Own()])), 'extra["x"]'),
        (dict(x=type("Text", (str,), {})("x")), 'extra["x"]'),
    ],
)
def test_what_cannot_be_stored_is_refused_by_its_path(value: Any, path: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        encode(dict(extra=value))
    assert str(refusal.value).startswith(path)


def test_a_value_that_contains_itself_is_refused() -> None:
    items: list[Any] = []
    items.append(items)
    with pytest.raises(CheckpointError, match=r"extra\[0\]: it contains itself"):
        encode(dict(extra=items))


@pytest.mark.parametrize("json", [{"$code": "x"}, {"$dtype": "load"}, {"$array": ["|O", [1], 0]}, {"$tensor": 9}])
def test_values_of_a_damaged_file_are_refused(json: Any) -> None:
    with pytest.raises(CheckpointError, match="is damaged"):
        decode({"x": json}, [torch.zeros(8, dtype=torch.uint8)])


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
    """Of a group only lr was once restored: OneCycleLR went on with the first betas, MultiStepLR without milestones."""
    optimizer_of, schedule = SCHEDULERS[kind]

    def start(raw: Raw | None) -> tuple[Any, torch.optim.Optimizer, Callable[[], None], Any]:
        module = net().double()
        optimizer = optimizer_of(module)
        scheduler = schedule(optimizer)
        advance = (lambda: scheduler.step(1.0)) if kind == "ReduceLROnPlateau" else scheduler.step
        return module if raw is None else engine_of(module, optimizer, raw=raw), optimizer, advance, scheduler

    want: list[Any] = []
    module, optimizer, advance, _ = start(None)
    train_in_plain_torch(module, optimizer, range(6), lambda: (advance(), want.append(fields(optimizer))))
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
