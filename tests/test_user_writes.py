"""Values that a user writes into parameters count, or are refused by name on every rank."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
import parallel
from models.shapes import resolve
from parallel.config import parse
from parallel.engine.context import Place, make_context
from parallel.engine.module_engine import ModuleEngine
from parallel.ops.kernels.fingerprint import FEW, fingerprint
from parallel.storage.transfer import Placement, Tier
from tests.harness import run
from tests.parity import Raw
from tests.test_module_engine import config_of, engine_of

RATE = 0.125
STAGES = (0, 1, 2, 3)


class Linears(nn.Module):
    """A module whose gradients do not depend on its weights: a step changes these by RATE times the sums of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4, bias=False)
        self.layers = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.first(x)
        for layer in self.layers:
            total = total + layer(x)
        return total * self.get_buffer("factor")


def linears() -> Any:
    torch.manual_seed(5)
    return Linears()


def inputs(step: int) -> Tensor:
    """Return x[4, 6] of small multiples of 1/4, whose sums are exact in bf16."""
    return torch.randint(-3, 4, (4, 6), generator=torch.Generator().manual_seed(step)).float() / 4


def load(module: nn.Module) -> None:
    state = {name: x.clone() for name, x in module.state_dict().items()}
    module.load_state_dict(state | {"layers.0.bias": torch.arange(4.0), "first.weight": torch.full((4, 6), 0.3)})


def copy_without_grad(module: nn.Module) -> None:
    with torch.no_grad():
        module.get_parameter("layers.1.weight")[1:3].copy_(torch.full((2, 6), -0.7))


def write_data(module: nn.Module) -> None:
    module.get_parameter("first.weight").data.clamp_(-0.1, 0.1)


def swap_rows_of_data(module: nn.Module) -> None:
    data = module.get_parameter("first.weight").data
    data.copy_(data.flip(0))


def write_detached(module: nn.Module) -> None:
    module.get_parameter("layers.0.weight").detach()[0, 0] = 3.0


def write_storage(module: nn.Module) -> None:
    """Write bytes, as a program in C would: neither autograd nor a version sees it."""
    module.get_parameter("layers.0.bias").detach().view(torch.uint8).numpy()[:] = 0


def initialize_again(module: nn.Module) -> None:
    nn.init.constant_(module.get_parameter("layers.1.bias"), 2.0)


def replace_data(module: nn.Module) -> None:
    parameter = module.get_parameter("layers.1.weight")
    parameter.data = parameter.data * 2


WRITES: dict[str, Callable[[nn.Module], None]] = {
    "load_state_dict": load,
    "copy_": copy_without_grad,
    "clamp_ of .data": write_data,
    "rows swapped in .data": swap_rows_of_data,
    "detach()[0, 0] = 3": write_detached,
    "numpy": write_storage,
    "init": initialize_again,
    ".data = ...": replace_data,
}


def step_of(engine: ModuleEngine, step: int, rank: int = 0, world_size: int = 1) -> None:
    engine.backward(engine(inputs(step).tensor_split(world_size)[rank]).sum())
    engine.step()


def weights_of(engine: ModuleEngine) -> dict[str, Tensor]:
    with engine.full_parameters() as weights:
        return {name: x.clone() for name, x in weights.items()}


def expected(precision: torch.dtype, world_size: int) -> list[dict[str, Tensor]]:
    """Return the weights after each write and step by plain torch. Where the parameters are rounded, a write changes
    those elements of the fp32 weights whose roundings it changes.
    """
    module, found = linears(), []
    for step, write in enumerate(WRITES.values()):
        rounded = linears().to(precision)
        for x, y in zip(rounded.parameters(), module.parameters(), strict=True):
            x.data.copy_(y.data)
        before = [x.detach().clone() for x in rounded.parameters()]
        write(rounded)
        for old, x, y in zip(before, rounded.parameters(), module.parameters(), strict=True):
            y.data = torch.where(x.detach() == old, y.data, x.detach().float())
        module.zero_grad()
        (module(inputs(step)).sum() / world_size).backward()
        with torch.no_grad():
            for y in module.parameters():
                assert y.grad is not None
                y -= RATE * y.grad
        found.append({name: x.detach().clone() for name, x in module.named_parameters()})
    return found


def write_and_step(rank: int, world_size: int, raw: Raw, states: Tier) -> list[dict[str, Tensor]]:
    """Return the weights after each write and step by an engine with its optimizer states on this tier."""
    module = linears()
    engine, _ = engine_of(rank, world_size, raw, module, optimizer=torch.optim.SGD(module.parameters(), lr=RATE))
    for chunk in engine.chunks:
        engine.optimizer.move(chunk, Placement(chunk.placement.parameters, states))
    found = []
    for step, write in enumerate(WRITES.values()):
        if raw["zero"]["stage"] == 3 and world_size > 1:
            with engine.full_parameters(writable=True):
                write(module)
        else:
            write(module)
        step_of(engine, step, rank, world_size)
        found.append(weights_of(engine))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("world_size", "states"), [(1, Tier.DEVICE), (2, Tier.DEVICE), (2, Tier.HOST)])
def test_what_is_written_counts_as_in_plain_torch(world_size: int, states: Tier, precision: str) -> None:
    """Sums of inputs and RATE are exact, so that a weight is subject to one rounding in fp32: equal to the last bit."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    want = expected(dtype, world_size)
    for stage in STAGES if world_size > 1 else (0,):
        for got in run(write_and_step, world_size, config_of(stage, precision=precision, clip_grad_norm=None), states):
            for ours, theirs, name in zip(got, want, WRITES, strict=True):
                for key, x in ours.items():
                    assert torch.equal(x, theirs[key]), f"stage {stage}: {key} after {name}"


class Clamping(Linears):
    """A module that limits its weights in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.weight.clamp_(-0.25, 0.25)
        return super().forward(x)


class ClampingLayer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.25, 0.25)
        return super().forward(x)


def clamping() -> Any:
    torch.manual_seed(5)
    module = Clamping()
    module.layers = nn.ModuleList([ClampingLayer(6, 4), nn.Linear(6, 4)])
    return module


def clamp_in_forward(rank: int, world_size: int, raw: Raw) -> dict[str, Tensor]:
    module = clamping()
    engine, _ = engine_of(rank, world_size, raw, module, optimizer=torch.optim.SGD(module.parameters(), lr=RATE))
    for step in range(3):
        step_of(engine, step, rank, world_size)
    return weights_of(engine)


def test_what_a_forward_writes_into_its_own_weights_counts_in_every_stage() -> None:
    """Stage 3 gathers each layer's weights again for the backward: they must be what the forward has written.

    The sums are exact in fp32, so the weights are equal to the last bit.
    """
    module = clamping()
    for step in range(3):
        module.zero_grad()
        (module(inputs(step)).sum() / 2).backward()
        with torch.no_grad():
            for x in module.parameters():
                assert x.grad is not None
                x -= RATE * x.grad
    for stage in STAGES:
        for got in run(clamp_in_forward, 2, config_of(stage, precision="fp32", clip_grad_norm=None)):
            for name, x in module.named_parameters():
                assert torch.equal(got[name], x), f"stage {stage}: {name}"


def write_within_a_step(rank: int, world_size: int, raw: Raw) -> list[str]:
    """Return what differs where a user writes between forward, backward and step, and where files are written after."""
    found = []
    module = linears()
    engine, _ = engine_of(rank, world_size, raw, module, optimizer=torch.optim.SGD(module.parameters(), lr=RATE))
    engine.backward(engine(inputs(0)).sum())
    with torch.no_grad():
        module.first.weight.fill_(0.5)
    engine.step()
    want = 0.5 - RATE * inputs(0).sum(0).expand(4, 6)
    found += [] if torch.equal(weights_of(engine)["first.weight"], want) else ["between backward and step"]
    module.first.weight.data.fill_(0.25)
    pieces = [piece for piece in engine.weights() if piece.name == "first.weight"]
    found += [] if all((piece.data == 0.25).all() for piece in pieces) else ["before a save"]
    module.get_buffer("factor").fill_(2.0)
    module.get_buffer("factor").data.mul_(1.5)
    step_of(engine, 1, rank, world_size)
    want = 0.25 - RATE * 3 * inputs(1).sum(0).expand(4, 6) / world_size
    found += [] if torch.equal(weights_of(engine)["first.weight"], want) else ["a buffer"]
    return found


def test_what_is_written_within_a_step_or_before_a_save_counts_and_so_do_buffers() -> None:
    for stage in (0, 2):
        raw = config_of(stage, precision="bf16", clip_grad_norm=None)
        assert run(write_within_a_step, 2, raw) == [[], []]


def momentum_after_a_write(rank: int, world_size: int, raw: Raw) -> dict[str, Tensor]:
    """Return the weights after a write between two steps with momentum, whose buffers must stay as they are."""
    module = linears()
    update = torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.5)
    engine, _ = engine_of(rank, world_size, raw, module, optimizer=update)
    step_of(engine, 0, rank, world_size)
    nn.init.zeros_(module.first.weight)
    step_of(engine, 1, rank, world_size)
    return weights_of(engine)


def test_the_optimizers_states_stay_as_they_are_where_weights_are_written() -> None:
    gradients = [inputs(step).sum(0).expand(4, 6) for step in (0, 1)]
    for got in run(momentum_after_a_write, 1, config_of(0, precision="bf16", clip_grad_norm=None)):
        assert torch.equal(got["first.weight"], -RATE * (gradients[1] + 0.5 * gradients[0]))


def refusals(rank: int, world_size: int, raw: Raw, names: Sequence[str] = ()) -> dict[str, str]:
    """Return the messages of this rank for writes that cannot count."""
    found = {}
    for name in names or REFUSED:
        write, module = REFUSED[name], linears()
        engine, _ = engine_of(rank, world_size, raw, module, optimizer=torch.optim.SGD(module.parameters(), lr=RATE))
        step_of(engine, 0, rank, world_size)
        found[name] = "nothing"
        try:
            write(engine, rank)
            step_of(engine, 1, rank, world_size)
        except parallel.ModelError as error:
            found[name] = str(error)
    return found


def write_other_values(engine: ModuleEngine, rank: int) -> None:
    nn.init.constant_(engine.module.get_parameter("layers.0.bias"), float(rank))


def write_on_one_rank(engine: ModuleEngine, rank: int) -> None:
    if rank == 0:
        nn.init.constant_(engine.module.get_parameter("layers.0.bias"), 3.0)


def write_other_data(engine: ModuleEngine, rank: int) -> None:
    engine.module.get_parameter("layers.1.bias").data.fill_(rank)


def write_data_on_one_rank(engine: ModuleEngine, rank: int) -> None:
    if rank == 1:
        engine.module.get_parameter("layers.1.bias").data[2] = 9.0


REFUSED: dict[str, Callable[[ModuleEngine, int], None]] = {
    "other values": write_other_values,
    "one rank": write_on_one_rank,
    "other values, .data": write_other_data,
    "one rank, .data": write_data_on_one_rank,
}


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16")])
def test_ranks_that_write_different_values_are_refused_by_the_parameters_name(stage: int, precision: str) -> None:
    for found in run(refusals, 2, config_of(stage, precision=precision, clip_grad_norm=None)):
        assert "layers.0.bias: ranks have written different values" in found["other values"]
        assert "rank 0: a forward after a write into layers.0.bias; rank 1: a forward" in found["one rank"]
        assert "layers.1.bias: ranks have written different values" in found["other values, .data"]
        assert "layers.1.bias: ranks have written different values" in found["one rank, .data"]


def test_writes_into_parameters_without_values_are_refused_where_they_are_done() -> None:
    """Every rank refuses its own writes: the two that all ranks do are tried."""
    raw = config_of(3, precision="bf16", clip_grad_norm=None)
    for found in run(refusals, 2, raw, ["other values", "other values, .data"]):
        for name, message in found.items():
            assert "layers." in message, name
            assert "is used while" in message, name
            assert "engine.full_parameters(writable=True)" in message, name


@pytest.mark.gpu
def test_a_fingerprint_sees_each_element_and_each_change_of_places() -> None:
    """Lengths below and above the number of words that are weighted one by one, in three dtypes.

    If it weighted words of 64 bits, it would not see that an even number of fp64 numbers has changed its signs: in
    sum, that adds a multiple of 2**64.
    """
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size in (64, 8 * FEW + 64 * 7):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            flat = torch.randn(size, generator=generator).to(device, dtype)
            before = int(fingerprint(flat))
            assert int(fingerprint(flat.clone())) == before
            for i in torch.randint(0, size, (20,), generator=generator).tolist():
                changed = flat.clone()
                changed[i] = -changed[i]
                assert int(fingerprint(changed)) != before
            assert int(fingerprint(-flat)) != before
            for rows in (2, 4, 16):
                matrix = flat.view(rows, -1)
                assert int(fingerprint(matrix.flip(0).flatten())) != before
                assert int(fingerprint(matrix.flip(1).flatten())) != before


def write_into_a_stage(rank: int, world_size: int, raw: Raw) -> tuple[bool, list[str]]:
    """Return whether this rank saves what was written into a stage of a split model, and what is wrong with a step."""
    config = parse(raw, world_size=world_size, resolve=resolve)
    context = make_context(config, Place(rank, world_size, rank, world_size))
    torch.set_num_threads(1)
    engine = parallel.Engine(models.build(context), context)
    tokens = torch.randint(4, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    engine.train_step(dict(input_ids=tokens))
    parameters = dict(engine.module.named_parameters())
    wrong = []
    name, norm = next((n, p) for n, p in parameters.items() if p.ndim == 1)
    nn.init.constant_(norm, 0.625)  # exact in bf16
    is_saved = any((piece.data == 0.625).all() for piece in engine.weights())
    norm.data.fill_(0.375)
    engine.train_step(dict(input_ids=tokens))  # by a learning rate of 0, and vectors do not decay
    if not (norm == 0.375).all():
        wrong.append(f"{name} is not kept")
    norm.data.fill_(float(rank))
    uses: list[Callable[[], object]] = [
        lambda: engine.evaluate([dict(input_ids=tokens)]),  # its loss would be of a model that is on no rank
        lambda: engine.train_step(dict(input_ids=tokens)),
    ]
    for use in uses:
        try:
            use()
            wrong.append("different values")
        except parallel.ModelError as error:
            wrong += [] if "ranks have written different values" in str(error) else [str(error)]
    return is_saved, wrong


@pytest.mark.parametrize("stage", [0, 2])
def test_what_is_written_into_a_stage_of_a_split_model_counts_too(stage: int) -> None:
    model = dict(name="opt-tiny", num_hidden_layers=2, vocab_size=61)
    raw = dict(model=model, zero=dict(stage=stage), optimizer=dict(lr=0.0))
    raw |= dict(train=dict(precision="bf16", global_batch_size=4, micro_batch_size=1, device="cpu"))
    saved, wrong = zip(*run(write_into_a_stage, 2, raw), strict=True)
    assert any(saved)
    assert wrong == ([], [])


def cast(layer: nn.Module) -> None:
    layer.get_parameter("attention_norm.weight").data = torch.ones(128)


def replace(layer: nn.Module) -> None:
    layer.get_submodule("attention_norm").weight = nn.Parameter(torch.ones(128, dtype=torch.bfloat16))


def reshape(layer: nn.Module) -> None:
    bias = layer.get_parameter("attention.qkv.bias")
    bias.data = bias.data.T


def share(layer: nn.Module) -> None:
    """Have one parameter show another's memory, in the same buffer: it takes over the values, and no more."""
    first, second = (layer.get_parameter(f"{name}_norm.weight") for name in ("attention", "feed_forward"))
    first.data = second.data.fill_(0.625)


def change_a_stage(rank: int, world_size: int) -> list[str]:
    """Return what is said of each change to the parameters of a split model."""
    model, train = dict(name="opt-tiny", num_hidden_layers=1), dict(precision="bf16", device="cpu", global_batch_size=2)
    context = make_context(parse(dict(model=model, train=train), world_size=1, resolve=resolve), Place())
    found = []
    for change in (cast, replace, reshape, share):
        engine = parallel.Engine(models.build(context), context)
        layer = engine.part.layers[1]
        change(layer)
        try:
            engine.train_step(dict(input_ids=torch.ones(2, 8, dtype=torch.int64)))
            found.append("")
        except (parallel.ModelError, RuntimeError) as error:  # torch's own, if nothing is refused
            found.append(str(error))
    layer.get_parameter("feed_forward_norm.weight").data.fill_(0.5)
    return [*found, str(layer.get_parameter("attention_norm.weight").mean().item() > 0.6)]


def test_a_split_model_whose_parameters_are_not_the_engines_any_more_is_refused() -> None:
    """Such a model was once trained on without any message: its parameter stayed as it was for ever."""
    (found,) = run(change_a_stage, 1)
    cure = "Change a model before parallel.Engine, not after."
    assert found == [
        f"model: layers.1.attention_norm.weight moved: its memory is not the engine's any more. {cure}",
        f"model: layers.1.attention_norm.weight is not the parameter it was. {cure}",
        f"model: layers.1.attention.qkv.bias moved: its memory is not the engine's any more. {cure}",
        "",
        "True",
    ]
