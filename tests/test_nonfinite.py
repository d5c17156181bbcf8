"""Numbers that are not finite: a step that has one changes nothing, and where it began is named on every rank."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.engine.base import EngineBase
from parallel.engine.engine import Engine
from parallel.errors import NonFiniteError
from parallel.optim.loss_scale import LossScale
from parallel.optim.step_counts import MOST_IN_A_ROW, Outcome, StepCounts
from parallel.storage.transfer import Tier
from tests.harness import run
from tests.parity import SHAPE, Batch, Raw, batches_of, config_of, engine_of, share_of
from tests.test_disk import in_small_parts
from tests.test_module_engine import config_of as module_config
from tests.test_module_engine import engine_of as module_engine

NAN = float("nan")
VICTIM = "model.decoder.layers.1.fc1.weight"

LAYOUTS: dict[str, tuple[int, Raw]] = {
    "single": (1, {}),
    "dp2": (2, {}),
    "pp2": (2, dict(pipeline=2)),
    "pp2-interleaved": (2, dict(pipeline=dict(size=2, schedule="interleaved"))),
    "pp2-zbv": (2, dict(pipeline=dict(size=2, schedule="zero_bubble_v"))),
    "dp2-pp2-zbv": (4, dict(pipeline=dict(size=2, schedule="zero_bubble_v"))),
    "1d2": (2, dict(tensor=dict(mode="1d", size=2))),
    "pp2-1d2": (4, dict(pipeline=2, tensor=dict(mode="1d", size=2))),
    "2d4": (4, dict(tensor=dict(mode="2d", size=4))),
    "3d8": (8, dict(tensor=dict(mode="3d", size=8))),
    "context2": (2, dict(context=dict(kind="all_to_all", size=2))),
}
SLOW = pytest.mark.slow


def raw_of(layout: str, precision: str = "fp32", nonfinite: str = "stop", **sections: Any) -> Raw:
    micro = 2 if layout.startswith("dp2") else 4
    train = dict(nonfinite=nonfinite, micro_batch_size=micro) | sections.pop("train", {})
    return config_of(LAYOUTS[layout][1], precision=precision, model=SHAPE, train=train, **sections)


class Spoiler:
    """Puts a NaN into a gradient of this rank, into an activation, or into a weight, in the steps where it is on."""

    def __init__(self, engine: Engine, *, mine: bool) -> None:
        self.engine, self.mine, self.is_on = engine, mine, False
        self.calls = 0

    def gradient(self) -> None:
        """Spoil one number of the gradient of the last parameter that autograd computes by itself."""
        parameter = next(x for x in reversed(self.engine.part.infos) if not x.is_matrix).parameter
        parameter.register_hook(self._spoiled)

    def data(self) -> None:
        """Spoil the output of the first layer in the second microbatch."""
        first = self.engine.part.layers[0]

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            self.calls += torch._C._current_graph_task_id() < 0
            return self._spoiled(output) if self.calls % 3 == 2 else output

        first.register_forward_hook(hook)

    def weight(self) -> None:
        """Spoil one number of a master weight, and what is made of it."""
        for chunk in self.engine.chunks:
            chunk.settle()
            for piece in chunk.spec.pieces(chunk.master):
                if self.mine and piece.name == VICTIM:
                    piece.data.view(-1)[3] = NAN
            chunk.write_back().wait()

    def _spoiled(self, x: Tensor) -> Tensor:
        if not (self.is_on and self.mine):
            return x
        x = x.clone()
        x.view(-1)[1] = NAN
        return x


def bits(engine: EngineBase) -> dict[str, bytes]:
    """Return every bit that a step may change on this rank, but the counters of steps and samples."""
    found = {f"{x.name}{x.box}": x.data.clone() for x in engine.state_pieces()}
    for chunk in engine.chunks:
        found[f"parameters of {chunk.infos[0].name}"] = chunk.parameters.own.clone()
        if not chunk.is_gathered_on_demand:
            found[f"whole parameters of {chunk.infos[0].name}"] = chunk.parameters.whole.clone()
    found["updates"] = torch.tensor([engine.num_updates, *engine.optimizer.counters()["steps"].values()])
    return {name: x.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, x in found.items()}


# -- a step that is left out changes nothing


def with_and_without(rank: int, world_size: int, raw: Raw, optimizer: str = "") -> list[str]:
    """Return the names of all that differs between a run with a step that was left out and one without that step, after
    it and after the step that follows.
    """
    in_small_parts(raw)

    def begun() -> tuple[Engine, Callable[[int], Batch]]:
        engine = engine_of(rank, world_size, raw)
        batches = [share_of(batch, engine) for batch in batches_of(3)]
        return engine, lambda i: batches[i]

    (ours, batch), (theirs, _) = begun(), begun()
    spoiler = Spoiler(ours, mine=rank == world_size - 1)
    spoiler.gradient()
    for engine in (ours, theirs):
        engine.train_step(batch(0))
    before = bits(ours)
    spoiler.is_on = True
    result = ours.train_step(batch(1))
    spoiler.is_on = False
    assert result.skipped
    assert result.grad_norm is None
    assert result.nonfinite_steps == ours.counters()["nonfinite_steps"] == 1
    found = [f"after it {key}" for key, x in bits(ours).items() if before[key] != x]
    numbers = [engine.train_step(batch(2)) for engine in (ours, theirs)]
    assert numbers[0].loss == numbers[1].loss
    assert numbers[0].lr == numbers[1].lr
    after = bits(theirs)
    return found + [f"later {key}" for key, x in bits(ours).items() if after[key] != x]


@pytest.mark.parametrize(
    ("layout", "stage", "precision", "place", "states"),
    [
        pytest.param("single", 0, "fp32", "device", "fp32", marks=pytest.mark.gpu),
        pytest.param("single", 0, "bf16", "host", "bf16", marks=pytest.mark.gpu),
        ("dp2", 3, "bf16", "device", "fp32"),
        *(
            pytest.param(*case, marks=SLOW)
            for case in (
                ("dp2", 0, "fp32", "device", "bf16"),
                ("dp2", 1, "bf16", "device", "bf16"),
                ("dp2", 2, "fp32", "host", "fp32"),
                ("dp2", 3, "fp32", "host", "bf16"),
                ("dp2", 3, "bf16", "host", "fp32"),
                ("pp2", 0, "bf16", "host", "fp32"),
                ("1d2", 0, "fp32", "device", "fp32"),
                ("pp2-1d2", 0, "bf16", "device", "bf16"),
                ("2d4", 0, "fp32", "host", "bf16"),
                ("context2", 0, "fp32", "device", "fp32"),
                ("single", 0, "fp64", "host", "fp32"),
            )
        ),
    ],
)
def test_a_step_that_is_left_out_changes_no_bit(
    layout: str, stage: int, precision: str, place: str, states: str
) -> None:
    zero = dict(stage=stage) | ({} if place == "device" else dict(tensor_placement_policy="cpu"))
    raw = raw_of(layout, precision, "skip", zero=zero, optimizer=dict(state_dtype=states))
    assert run(with_and_without, LAYOUTS[layout][0], raw) == [[]] * LAYOUTS[layout][0]


@pytest.mark.parametrize("micro", [4, 12])
@pytest.mark.parametrize("states", ["fp32", pytest.param("bf16", marks=SLOW)])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=SLOW)])
def test_a_gradient_in_the_memory_of_parameters_and_states_on_a_disk_are_left_out_too(
    tmp_path: Path, precision: str, states: str, micro: int
) -> None:
    """The gradient of a single microbatch is stored in the parameters' memory on the host, which must be restored."""
    zero = dict(
        tensor_placement_policy="cpu", host_memory="100KiB" if micro == 12 else "140KiB", nvme_dir=str(tmp_path)
    )
    raw = raw_of(
        "single", precision, "skip", zero=zero, optimizer=dict(state_dtype=states), train=dict(micro_batch_size=micro)
    )
    assert run(on_disk, 1, raw) == [True]
    assert run(with_and_without, 1, raw) == [[]]


def on_disk(rank: int, world_size: int, raw: Raw) -> bool:
    in_small_parts(raw)
    return any(chunk.placement.states is Tier.DISK for chunk in engine_of(rank, world_size, raw).chunks)


@pytest.mark.slow
def test_a_compiled_step_is_left_out_too() -> None:
    assert run(with_and_without, 1, raw_of("single", "fp32", "skip", train=dict(compile=True))) == [[]]


def overflown(rank: int, world_size: int, raw: Raw) -> list[tuple[bool, float, int]]:
    """Return whether each step was skipped, the scale after it, and the steps counted; a gradient is always NaN."""
    engine = engine_of(rank, world_size, raw)
    spoiler = Spoiler(engine, mine=True)
    spoiler.gradient()
    spoiler.is_on, engine.loss_scale.scale = True, 4.0
    found = []
    for batch in batches_of(3):
        result = engine.train_step(share_of(batch, engine))
        found.append((result.skipped, engine.loss_scale.scale, result.nonfinite_steps))
    return found


def test_an_overflow_of_fp16_is_the_scales_business_until_the_scale_is_one() -> None:
    assert run(overflown, 1, raw_of("single", "fp16", "skip")) == [[(True, 2.0, 0), (True, 1.0, 0), (True, 1.0, 1)]]


def test_ten_steps_in_a_row_end_the_run_and_an_update_begins_the_count_anew() -> None:
    steps = StepCounts("skip")
    assert [steps.count(NAN, 1.0) for _ in range(9)] == [Outcome.LEFT_OUT] * 9
    assert steps.count(1.0, 1.0) is Outcome.UPDATED
    assert [steps.count(1.0, torch.inf) for _ in range(9)] == [Outcome.LEFT_OUT] * 9
    assert steps.count(1.0, NAN) is Outcome.STOPS
    assert (steps.num_left_out, steps.in_a_row) == (19, MOST_IN_A_ROW)
    fresh = StepCounts("skip")
    fresh.restore(steps.state())
    assert fresh == steps


def test_a_loss_that_is_not_finite_is_never_the_scales_business() -> None:
    steps = StepCounts("stop", LossScale.for_precision("fp16"))
    assert steps.count(NAN, NAN) is Outcome.STOPS
    assert steps.loss_scale.scale == 2.0**16
    assert steps.count(1.0, NAN) is Outcome.OVERFLOW
    assert steps.loss_scale.scale == 2.0**15


# -- where it began is named


def stopped(rank: int, world_size: int, raw: Raw, plant: str, victim: int) -> tuple[str, bool, int, int]:
    """Return the error of a step with a NaN on rank `victim`, whether nothing has changed, and the numbers of steps."""
    engine = engine_of(rank, world_size, raw)
    engine.writes.stop()  # as in a run; otherwise replicas that have different weights are refused before
    spoiler = Spoiler(engine, mine=rank == victim)
    engine.train_step(share_of(batches_of(1)[0], engine))
    engine.loss_scale.scale = 1.0  # where it cannot fall, an fp16 gradient is no overflow
    getattr(spoiler, plant)()
    spoiler.is_on = True
    before, text = bits(engine), ""
    try:
        engine.train_step(share_of(batches_of(2)[1], engine))
    except NonFiniteError as error:
        text = str(error)
    return text, before == bits(engine), engine.num_steps, engine.num_updates


FAST = [
    ("single", 0, "fp32", "weight", 0),
    ("dp2", 3, "bf16", "gradient", 1),
    ("dp2", 3, "fp32", "weight", 1),
    ("pp2", 0, "fp32", "data", 0),
    ("1d2", 0, "fp16", "weight", 1),
    ("pp2-interleaved", 0, "fp32", "weight", 1),  # in stage 1; stage 2, on rank 0, has its output
]
PLANTS = ("data", "gradient", "weight")
REST = [
    *product(["dp2"], range(4), ["fp32", "bf16", "fp16"], PLANTS, [1]),
    *product(["pp2"], [0], ["bf16"], ["gradient"], [1]),
    *product(["pp2"], [0], ["bf16"], ["weight"], [0]),
    *product(["pp2-interleaved", "pp2-zbv"], [0], ["fp32"], PLANTS[:2], [0]),
    *product(["dp2-pp2-zbv"], [3], ["bf16"], ["weight"], [3]),
    *product(["1d2"], [0], ["fp32"], PLANTS[1:], [1]),
    *product(["pp2-1d2"], [0], ["fp16"], ["gradient"], [3]),
    *product(["pp2-1d2"], [0], ["fp16"], ["weight"], [1]),
    *product(["2d4"], [0], ["fp32"], PLANTS, [2]),
    *product(["3d8"], [0], ["fp32"], PLANTS[1:], [5]),
    *product(["context2"], [0], ["fp32"], ["gradient", "data"], [1]),
]
CASES = [*FAST, *(pytest.param(*case, marks=SLOW) for case in REST if case not in FAST)]


@pytest.mark.parametrize(("layout", "stage", "precision", "plant", "victim"), CASES)
def test_what_is_not_finite_is_named_on_every_rank_and_nothing_has_changed(
    layout: str, stage: int, precision: str, plant: str, victim: int
) -> None:
    raw = raw_of(layout, precision, zero=dict(stage=stage))
    results = run(stopped, LAYOUTS[layout][0], raw, plant, victim)
    texts = {text for text, *_ in results}
    assert len(texts) == 1, texts
    (text,) = texts
    assert all(same and (steps, updates) == (2, 1) for _, same, steps, updates in results)
    assert text.startswith("step 2: ")
    if plant == "weight":
        assert "in the forward of layers.1.feed_forward.up: its weight" in text
        assert f"{VICTIM} is not finite (1 of " in text
    elif plant == "data":
        assert "microbatch 1, in the forward of embed: its output is not finite, though" in text
    else:
        assert "in the backward of " in text
        assert "the gradient of model.decoder." in text
        assert " is not finite (1 of " in text
    is_everywhere = plant == "weight" and layout.startswith("dp2") and stage == 0
    if is_everywhere or (layout, plant) == ("2d4", "data"):
        assert "on rank" in text
    else:
        assert f"it began on rank {victim} on " in text


def finite_again(rank: int, world_size: int, raw: Raw) -> str:
    """Return the error of a step whose gradient is spoiled in its first run alone, as by a fault of a device."""
    engine = engine_of(rank, world_size, raw)
    spoiler = Spoiler(engine, mine=rank == 0)
    spoiler.gradient()
    spoiler.is_on, update = True, engine.optimizer.step

    def step(*arguments: Any) -> None:
        spoiler.is_on = False
        update(*arguments)

    patched: Any = engine.optimizer
    patched.step = step
    with pytest.raises(NonFiniteError) as raised:
        engine.train_step(share_of(batches_of(1)[0], engine))
    return str(raised.value)


def test_a_step_that_is_finite_in_its_second_run_points_to_the_machine() -> None:
    (text,) = run(finite_again, 1, raw_of("single"))
    assert "the step was finite when it was run again, which points to memory or a device that fails" in text
    assert "The first time the gradients of head on rank 0 were not finite" in text


def with_a_huge_gradient(rank: int, world_size: int, raw: Raw) -> str:
    engine = engine_of(rank, world_size, raw)
    parameter = next(x for x in reversed(engine.part.infos) if not x.is_matrix).parameter
    parameter.register_hook(lambda x: torch.full_like(x, 1e30))
    with pytest.raises(NonFiniteError) as raised:
        engine.train_step(share_of(batches_of(1)[0], engine))
    return str(raised.value)


def test_a_norm_that_is_too_large_for_its_numbers_is_told_from_a_gradient_that_is_not_finite() -> None:
    (text,) = run(with_a_huge_gradient, 1, raw_of("single"))
    assert "every gradient is finite, and the norm of all is larger than" in text


# -- a module of the user's own


class Regression(nn.Module):
    """Two linears with dropout between them; the loss is a mean over samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.drop, self.last = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.drop(self.first(x).relu())).squeeze(-1)
        return found


def squared(output: Tensor, labels: Tensor) -> Tensor:
    return ((output - labels) ** 2).mean()


def module_stopped(rank: int, world_size: int, stage: int, plant: str, own_loop: bool) -> tuple[str, bool]:
    """Return the error of a step of a module engine, and whether nothing has changed."""
    raw = module_config(stage, precision="fp32", micro_batch_size=2)
    engine, _ = module_engine(rank, world_size, raw, Regression(), criterion=squared)
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.randn(4, 4, generator=generator), torch.randn(4, generator=generator)
    engine.train_step(dict(x=x, labels=y))
    if plant == "data" and rank == world_size - 1:
        x[3, 1] = NAN
    if plant == "weight":
        with engine.full_parameters(writable=True) as weights:
            weights["last.weight"][0, 2] = NAN
    before, text = bits(engine), ""
    try:
        if own_loop:
            engine.backward(squared(engine(x), y))
            engine.step()
        else:
            engine.train_step(dict(x=x, labels=y))
    except NonFiniteError as error:
        text = str(error)
    return text, before == bits(engine)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=SLOW), 3])
def test_the_steps_of_a_module_name_where_it_began(stage: int) -> None:
    for text, same in run(module_stopped, 2, stage, "data", False):
        assert same
        assert "it began on rank 1 on " in text
        assert "microbatch 1, in the forward of the model: its input is not finite" in text


@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_a_loop_of_the_users_own_is_told_which_gradients_and_which_weights_are_not_finite(stage: int) -> None:
    for text, same in run(module_stopped, 2, stage, "weight", True):
        assert same
        assert text.startswith("step 2: the loss is nan and the gradient's norm is nan: the gradients of ")
        assert " are not finite. Weights: rank 0: last.weight is not finite (1 of " in text
    for text, same in run(module_stopped, 2, stage, "data", True):
        assert same
        assert "All weights are finite" in text


def lost(rank: int, world_size: int) -> tuple[str, bool]:
    """Return the error of a step whose loss is NaN on the last rank, while all gradients are finite."""
    raw = module_config(0, precision="fp32", micro_batch_size=2)
    engine, _ = module_engine(rank, world_size, raw, Regression())
    x, before, text = torch.randn(4, 4), bits(engine), ""
    try:
        engine.backward(engine(x).float().mean() + (NAN if rank == world_size - 1 else 0.0))
        engine.step()
    except NonFiniteError as error:
        text = str(error)
    return text, before == bits(engine)


def test_a_loss_that_is_not_finite_stops_a_step_whose_gradient_is() -> None:
    for text, same in run(lost, 2):
        assert same
        assert text.startswith("step 1: the loss is nan: every gradient is finite. All weights are finite.")


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "fused AdamW": lambda x: torch.optim.AdamW(x, lr=1e-2, fused=True),
    "AdamW": lambda x: torch.optim.AdamW(x, lr=1e-2),
    "fused SGD": lambda x: torch.optim.SGD(x, lr=1e-2, momentum=0.9, fused=True),
    "SGD": lambda x: torch.optim.SGD(x, lr=1e-2, momentum=0.9, dampening=0.1),
    "Adagrad": lambda x: torch.optim.Adagrad(x, lr=1e-2),
}


def optimizer_skips(rank: int, world_size: int, name: str, policy: str) -> list[str]:
    """Return the names of all that differs from a run without the steps that were left out: the first and the third."""
    raw = module_config(0, precision="fp32", nonfinite="skip")
    raw["zero"] = dict(tensor_placement_policy=policy)
    found = []
    for spoils in (True, False):
        module = Regression().eval()
        optimizer = OPTIMIZERS[name](list(module.parameters()))
        engine, _ = module_engine(rank, world_size, raw, module, optimizer=optimizer)
        generator = torch.Generator().manual_seed(1)
        skipped = []
        for step in range(4):
            x, y = torch.randn(4, 4, generator=generator), torch.randn(4, generator=generator)
            if step in (0, 2) and not spoils:
                continue
            engine.backward(squared(engine(x * (NAN if step in (0, 2) else 1.0)), y))
            skipped.append(engine.step().skipped)
        assert skipped == ([True, False] * 2 if spoils else [False] * 2)
        found.append(bits(engine))
    return [key for key in found[0] if found[0][key] != found[1][key]]


@pytest.mark.parametrize("policy", ["cuda", pytest.param("cpu", marks=SLOW)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_torchs_keeps_its_states_in_a_step_that_is_left_out(name: str, policy: str) -> None:
    assert run(optimizer_skips, 1, name, policy) == [[]]


# -- weights


SPOILED = {"master": "1.bias", "exp_avg": "1.bias", "buffer": "1.running_mean"}


def refused(rank: int, world_size: int, folder: Path, kind: str) -> list[str]:
    """Return the errors of a save, an export and a load of a module with a NaN in a buffer, a weight or a moment."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    engine, _ = module_engine(
        rank,
        world_size,
        module_config(3, precision="fp32", micro_batch_size=2),
        module,
        criterion=lambda y, t: y.mean(),
    )
    engine.train_step(dict(input=torch.randn(2, 3), labels=torch.ones(2)))
    good = engine.save_checkpoint(folder)
    named = {piece.name: piece.data for piece in engine.state_pieces() if piece.data.numel()}
    if f"{kind}/{SPOILED[kind]}" in named and rank == (0 if kind == "buffer" else 1):
        named[f"{kind}/{SPOILED[kind]}"].view(-1)[0] = NAN
    texts = []
    engine.steps.num_steps += 1
    for action in (
        lambda: engine.save_checkpoint(folder),
        lambda: engine.save_pretrained(folder / "export"),
        lambda: engine.check_finite("So it is.", states=True),
    ):
        try:
            action()
            texts.append("")
        except NonFiniteError as error:
            texts.append(str(error))
    engine.load_checkpoint(folder)
    engine.check_finite("It never is.", states=True)
    assert good.exists()
    assert not (folder / "export").exists() or kind == "exp_avg"
    return texts


@pytest.mark.parametrize("kind", ["master", "exp_avg", "buffer"])
def test_what_is_not_finite_is_neither_saved_nor_exported_and_an_infinite_mask_is(tmp_path: Path, kind: str) -> None:
    for saved, exported, checked in run(refused, 2, tmp_path, kind):
        what = "exp_avg of 1.bias" if kind == "exp_avg" else SPOILED[kind]
        assert f"after step 2 {what} is not finite (1 of " in saved
        assert saved.endswith("It is not saved, and earlier checkpoints stay.")
        assert bool(exported) == (kind != "exp_avg")
        assert checked.endswith("So it is.")
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step*"))] == ["step_000001"]


def statistics_of_left_out_steps(rank: int, world_size: int, folder: Path) -> None:
    """Check that running statistics are after a step that is left out as before it, also those that a user has set."""
    norm = nn.BatchNorm1d(3)
    engine, _ = module_engine(rank, world_size, module_config(2, precision="fp32", nonfinite="skip"), norm)
    bad = torch.full((4, 3), torch.nan)

    def step(x: Tensor) -> bool:
        for part in x.chunk(2):
            engine.backward(engine(part).square().mean())
        return engine.step().skipped

    assert not step(torch.randn(4, 3))
    with torch.no_grad():
        norm.running_var.mul_(2.0)  # type: ignore[union-attr]
    before = [x.clone() for x in norm.buffers() if x.is_floating_point()]
    assert step(bad)
    assert all(torch.equal(x, y) for x, y in zip(before, norm.buffers(), strict=False))
    engine.save_checkpoint(folder)
    assert not step(torch.randn(4, 3))
    engine.load_checkpoint(folder)
    assert step(bad)
    assert all(torch.equal(x, y) for x, y in zip(before, norm.buffers(), strict=False))


def test_a_step_that_is_left_out_leaves_no_nan_in_running_statistics(tmp_path: Path) -> None:
    """The weights stayed as they were, but no checkpoint could be saved from then on, and every evaluation was NaN."""
    run(statistics_of_left_out_steps, 2, tmp_path)
