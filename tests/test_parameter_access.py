"""Whole parameters and gradients by name, clipping by hand, and what torch's own tools are answered."""

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parallel
from parallel.engine.module_engine import ModuleEngine
from tests.harness import run
from tests.parity import Raw
from tests.tables import rows
from tests.test_module_engine import batches, config_of, engine_of, loss_of, plain
from tests.test_user_writes import RATE, inputs, linears, step_of, weights_of

STAGES = (0, 1, 2, 3)
Named = dict[str, Tensor]


def by_torch(max_norms: tuple[float, ...]) -> tuple[dict[str, Tensor | None], list[float], Named]:
    """Return the gradients of three backwards, the norm before each clipping, and the weights after a step."""
    module = plain().double()
    for ids in batches()[0]:
        loss_of(module, ids, step=0).backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    norms = [nn.utils.clip_grad_norm_(module.parameters(), max_norm).item() for max_norm in max_norms]
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    return gradients, norms, {name: p.detach().clone() for name, p in module.named_parameters()}


def by_engine(
    rank: int, world_size: int, raw: Raw, max_norms: tuple[float, ...]
) -> tuple[dict[str, Tensor | None], list[float], Named]:
    module = plain()
    engine, _ = engine_of(rank, world_size, raw, module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
    for i, ids in enumerate(batches()[0]):
        loss = loss_of(engine, ids.tensor_split(world_size)[rank], step=0)
        if i == 1:
            with engine.no_sync():
                engine.backward(loss)
            continue
        engine.backward(loss)
        with engine.full_gradients():  # in the middle of a step it must not disturb what follows
            pass
    with engine.full_gradients() as found:
        gradients = {name: None if x is None else x.clone() for name, x in found.items()}
    norms = [engine.clip_grad_norm_(max_norm).item() for max_norm in max_norms]
    engine.step()
    return gradients, norms, weights_of(engine)


@pytest.mark.parametrize("max_norms", [(), (0.25,), (0.5, 0.125), (float("inf"),)])
def test_gradients_norm_and_clipped_step_are_those_of_one_process(max_norms: tuple[float, ...]) -> None:
    """Sums over two ranks round in another order, in fp64: 1e-12 is a thousand roundings."""
    gradients, norms, weights = by_torch(max_norms or (0.5,))  # the config clips by 0.5
    for stage in STAGES if len(max_norms) < 2 else (1, 3):
        for found, found_norms, found_weights in run(by_engine, 2, config_of(stage), max_norms):
            assert {n for n, x in found.items() if x is None} == {n for n, x in gradients.items() if x is None}
            for name, x in gradients.items():
                torch.testing.assert_close(found[name], x, rtol=1e-12, atol=1e-14)
            assert found_norms == pytest.approx(norms[: len(found_norms)], rel=1e-12)
            for name, y in weights.items():
                torch.testing.assert_close(found_weights[name], y, rtol=1e-12, atol=1e-14)


def scaled_gradients(rank: int, world_size: int, raw: Raw) -> dict[str, Tensor | None]:
    module = linears()
    engine, _ = engine_of(rank, world_size, raw, module)
    engine.backward(engine(inputs(0).tensor_split(world_size)[rank]).float().sum() / 1024)
    with engine.full_gradients() as gradients:
        return dict(gradients)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_full_gradients_have_no_loss_scale_and_the_masters_precision(precision: str) -> None:
    """The sums of inputs, multiples of 1/4, are exact in fp16 and bf16."""
    want = inputs(0).sum(0).expand(4, 6) / 2048
    for found in run(scaled_gradients, 2, config_of(2, precision=precision)):
        assert found["first.weight"] is not None
        assert found["first.weight"].dtype == torch.float32
        assert torch.equal(found["first.weight"], want)


def set_parameters(rank: int, world_size: int, raw: Raw) -> list[str]:
    """Return what is not as it should be where parameters are read and set, whole and by name."""
    wrong: list[str] = []

    def check(name: str, is_right: bool) -> None:
        wrong.extend([] if is_right else [name])

    module = linears()
    engine, _ = engine_of(rank, world_size, raw, module, optimizer=torch.optim.SGD(module.parameters(), lr=RATE))
    want = {name: p.detach().clone() for name, p in linears().named_parameters()}
    got = weights_of(engine)
    check("names", list(got) == list(want))
    check("masters", all(torch.equal(got[n], want[n]) and got[n].dtype == torch.float32 for n in want))
    with engine.full_parameters(module.layers) as part:
        check("names of a part", list(part) == [n for n in want if n.startswith("layers.")])
        check("the module's own", torch.equal(module.layers[1].bias.detach().float(), part["layers.1.bias"].bfloat16()))
        check("state_dict", torch.equal(module.layers.state_dict()["0.bias"].float(), part["layers.0.bias"].bfloat16()))
    with engine.full_parameters(writable=True) as weights:
        weights["first.weight"].fill_(0.3 + rank)
        with torch.no_grad():
            module.layers[0].bias.fill_(0.5 + rank)
        module.layers[1].load_state_dict(dict(weight=torch.ones(4, 6) * 2, bias=torch.arange(4.0)))
    changed = {"first.weight": torch.full((4, 6), 0.3), "layers.0.bias": torch.full((4,), 0.5)}
    changed |= {"layers.1.weight": torch.full((4, 6), 2.0), "layers.1.bias": torch.arange(4.0)}
    got = weights_of(engine)
    check("rank 0's values", all(torch.equal(got[n], x) for n, x in (want | changed).items()))
    try:
        with engine.full_parameters(writable=True) as weights:
            weights["first.weight"].zero_()
            nn.init.zeros_(module.layers[0].bias)
            raise KeyError("of the user")
    except KeyError:
        pass
    got = weights_of(engine)
    check("as before after an error", all(torch.equal(got[n], x) for n, x in (want | changed).items()))
    step_of(engine, 0, rank, world_size)
    moved = 0.3 - RATE * inputs(0).sum(0).expand(4, 6) / world_size
    check("a step after it", torch.equal(weights_of(engine)["first.weight"], moved))
    return wrong


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_are_read_and_set_by_name_and_rank_0s_values_count(stage: int) -> None:
    assert run(set_parameters, 2, config_of(stage, precision="bf16", clip_grad_norm=None)) == [[], []]


def set_offloaded(rank: int, world_size: int, raw: Raw) -> Tensor:
    module = linears()
    engine, _ = engine_of(rank, world_size, raw, module)
    step_of(engine, 0, rank, world_size)
    with engine.full_parameters(writable=True) as weights:
        weights["layers.0.weight"].fill_(0.3)
    with engine.full_parameters() as weights:
        return weights["layers.0.weight"].clone()


@pytest.mark.parametrize("stage", [0, 3])
def test_parameters_on_the_host_and_masters_on_a_disk_are_set_too(tmp_path: Path, stage: int) -> None:
    raw = config_of(stage, precision="bf16")
    raw["zero"] |= dict(tensor_placement_policy="cpu", nvme_dir=str(tmp_path), host_memory=2**20)
    for found in run(set_offloaded, 2, raw):
        assert torch.equal(found, torch.full((4, 6), 0.3))


# -- the rows of the table


def message_of(act: Callable[[], Any]) -> str:
    """Return the message of the error of ours that this raises, or "nothing"."""
    try:
        act()
    except parallel.ColonnadeError as error:
        return str(error)
    return "nothing"


def engine_with(rank: int, world_size: int, stage: int, **train: Any) -> tuple[ModuleEngine, Any, Any]:
    module = linears()
    update = torch.optim.SGD(module.parameters(), lr=RATE)
    raw = config_of(stage, **dict(precision="fp32", clip_grad_norm=None) | train)
    return engine_of(rank, world_size, raw, module, optimizer=update)[0], module, update


def half_a_step(engine: ModuleEngine, rank: int, world_size: int) -> None:
    engine.backward(engine(inputs(0).tensor_split(world_size)[rank]).sum())


def grad_is_refused(rank: int, world_size: int, stage: int) -> list[str]:
    engine, module, update = engine_with(rank, world_size, stage)
    assert all(p.grad is None for p in module.parameters())
    assert nn.utils.clip_grad_norm_(module.parameters(), 1.0) == 0  # there is no gradient yet
    half_a_step(engine, rank, world_size)
    parameters = list(module.parameters())
    acts: list[Callable[[], Any]] = [
        lambda: parameters[0].grad,
        lambda: nn.utils.clip_grad_norm_(parameters, 1.0),
        lambda: nn.utils.clip_grad_value_(parameters, 1.0),
        lambda: nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]),
        lambda: nn.utils.clip_grad_norm_([p for group in update.param_groups for p in group["params"]], 1.0),
        lambda: setattr(parameters[0], "grad", None),
        lambda: setattr(parameters[0], "grad", torch.ones(4, 6)),
    ]
    return [message_of(act) for act in acts]


def gradients_are_dropped(rank: int, world_size: int, stage: int) -> list[str]:
    engine, module, update = engine_with(rank, world_size, stage)
    before = weights_of(engine)
    drops: list[Callable[[], Any]] = [module.zero_grad, update.zero_grad, engine.zero_grad]
    drops += [lambda: module.zero_grad(set_to_none=False), lambda: update.zero_grad(set_to_none=True)]
    for drop in drops:
        half_a_step(engine, rank, world_size)
        drop()
        engine.step()
    after = weights_of(engine)
    assert all(torch.equal(after[n], before[n]) for n in before)
    return []


def scaler_is_refused(rank: int, world_size: int, stage: int) -> list[str]:
    module = nn.Linear(64, 64)  # large enough for each rank to have a part of it
    update = torch.optim.SGD(module.parameters(), lr=RATE)
    engine, _ = engine_of(rank, world_size, config_of(stage, precision="fp32"), module, optimizer=update)
    scaler = torch.amp.GradScaler("cpu")
    engine.backward(scaler.scale(engine(torch.ones(1, 64)).sum()))
    return [message_of(lambda: scaler.unscale_(update)), message_of(lambda: scaler.step(update))]


def group_is_added(rank: int, world_size: int, stage: int) -> list[str]:
    module = linears()
    update = torch.optim.SGD(module.first.parameters(), lr=RATE)
    raw = config_of(stage, precision="fp32", clip_grad_norm=None)
    engine, _ = engine_of(rank, world_size, raw, module, optimizer=update)
    before = weights_of(engine)
    step_of(engine, 0, rank, world_size)
    assert torch.equal(weights_of(engine)["layers.0.bias"], before["layers.0.bias"])
    update.add_param_group(dict(params=list(module.layers[0].parameters()), lr=2 * RATE))
    step_of(engine, 0, rank, world_size)
    after = weights_of(engine)
    moved = before["layers.0.bias"] - 2 * RATE * 4 / world_size
    assert torch.allclose(after["layers.0.bias"], moved, rtol=0, atol=1e-6)  # two roundings in fp32
    assert torch.equal(after["layers.1.bias"], before["layers.1.bias"])
    other = message_of(lambda: update.add_param_group(dict(params=[nn.Parameter(torch.ones(2))])))
    assert "optimizer.add_param_group: 1 of its parameters are not among those that the engine trains" in other
    return []


def state_dict_of_an_optimizer(rank: int, world_size: int, stage: int) -> list[str]:
    _, _, update = engine_with(rank, world_size, stage)
    return [message_of(update.state_dict), message_of(lambda: update.load_state_dict({}))]


def copies(rank: int, world_size: int, stage: int) -> list[str]:
    """Return what is wrong with copies of a module: each must be plain, independent, and compute as the module did."""
    engine, module, _ = engine_with(rank, world_size, stage, activation_checkpointing="full")
    step_of(engine, 0, rank, world_size)
    with torch.no_grad():
        want = engine(inputs(1))
    copied = copy.deepcopy(module)
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in copied.modules())
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    averaged = torch.optim.swa_utils.AveragedModel(module)
    averaged.update_parameters(module)
    made = dict(
        deepcopy=copied,
        pickle=pickle.loads(pickle.dumps(module)),
        load=torch.load(saved, weights_only=False),
        averaged=averaged.module,
    )
    before = weights_of(engine)
    wrong = []
    for name, other in made.items():
        right = all(type(p) is nn.Parameter for p in other.parameters()) and torch.equal(other(inputs(1)), want)
        other(inputs(2)).sum().backward()
        right &= all(p.grad is not None for p in other.parameters())
        torch.optim.SGD(other.parameters(), lr=1.0).step()
        wrong += [] if right else [name]
    after = weights_of(engine)
    wrong += [] if all(torch.equal(after[n], before[n]) for n in before) else ["they share memory"]
    step_of(engine, 1, rank, world_size)
    assert not wrong
    return []


def copies_in_stage_3(rank: int, world_size: int, stage: int) -> list[str]:
    engine, module, _ = engine_with(rank, world_size, 3)
    step_of(engine, 0, rank, world_size)
    messages = [message_of(lambda: copy.deepcopy(module)), message_of(lambda: pickle.dumps(module.layers[0]))]
    messages.append(message_of(lambda: torch.optim.swa_utils.AveragedModel(module)))
    with torch.no_grad():
        want = engine(inputs(1))
    with engine.full_parameters() as weights:
        other = copy.deepcopy(module)
        assert all(torch.equal(p, weights[n]) for n, p in other.named_parameters())
    assert torch.equal(other(inputs(1)), want)
    return messages


def copy_of_an_engine(rank: int, world_size: int, stage: int) -> list[str]:
    engine, *_ = engine_with(rank, world_size, stage)
    return [message_of(lambda: copy.deepcopy(engine)), message_of(lambda: pickle.dumps(engine))]


def triple(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(3)


def read(parameter: Tensor) -> None:
    assert parameter.grad is not None


def hooks(rank: int, world_size: int, stage: int) -> list[str]:
    module = linears()
    seen: list[Tensor] = []
    module.first.weight.register_hook(lambda gradient: gradient * 2)
    module.layers[0].bias.register_post_accumulate_grad_hook(triple)
    module.layers[1].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    engine, _ = engine_of(rank, world_size, config_of(stage, precision="fp32"), module)
    module.layers[0].weight.register_hook(lambda gradient: gradient * 5)
    half_a_step(engine, rank, world_size)
    with engine.full_gradients() as gradients:
        total = inputs(0).sum(0).expand(4, 6) / world_size
        want = {"first.weight": 2 * total, "layers.0.weight": 5 * total}
        want["layers.0.bias"] = torch.full((4,), 3 * 4 / world_size)
        for name, x in want.items():
            torch.testing.assert_close(gradients[name], x, rtol=0, atol=0)
    assert torch.equal(seen[0], torch.full((4,), 4.0 / world_size))
    engine.step()
    module.layers[1].weight.register_post_accumulate_grad_hook(read)
    assert "the engine keeps the gradients" in message_of(lambda: half_a_step(engine, rank, world_size))
    return []


def freezing(rank: int, world_size: int, stage: int) -> list[str]:
    engine, module, _ = engine_with(rank, world_size, stage)
    before = weights_of(engine)
    module.first.requires_grad_(False)
    step_of(engine, 0, rank, world_size)
    between = weights_of(engine)
    module.first.requires_grad_(True)
    step_of(engine, 0, rank, world_size)
    after = weights_of(engine)
    assert not torch.equal(between["layers.0.bias"], before["layers.0.bias"])
    assert torch.equal(between["first.weight"], before["first.weight"])
    assert not torch.equal(after["first.weight"], between["first.weight"])
    return []


def misused_contexts(rank: int, world_size: int, stage: int) -> list[str]:
    engine, module, _ = engine_with(rank, world_size, stage)

    def nest() -> None:
        with engine.full_parameters(), engine.full_parameters():
            pass

    def compute() -> None:
        with engine.full_parameters():
            engine(inputs(0))

    def save() -> None:
        with engine.full_parameters():
            engine.step()

    def write() -> None:
        with engine.full_parameters() as weights:
            weights["first.weight"].zero_()

    def fail() -> None:
        with engine.full_parameters(writable=True) as weights:
            weights["first.weight"].zero_()
            if rank == world_size - 1:
                raise ValueError("on one rank")

    before = weights_of(engine)
    found = [message_of(act) for act in (nest, compute, save)]
    assert "values were set in it, and are dropped" in message_of(write)
    with pytest.raises(ValueError, match="on one rank"):
        fail()
    with pytest.raises(parallel.ModelError, match="not a part of the model"), engine.full_parameters(linears()):
        pass
    handle = module.first.register_forward_hook(lambda *_: engine.full_parameters().__enter__())
    found.append(message_of(lambda: engine(inputs(0))))
    handle.remove()
    half_a_step(engine, rank, world_size)
    assert "norm_type=1.0 is not known. Use 2.0." in message_of(lambda: engine.clip_grad_norm_(1.0, norm_type=1.0))
    assert "max_norm=-1.0 is not a number" in message_of(lambda: engine.clip_grad_norm_(-1.0))
    engine.clip_grad_norm_(1.0)
    assert "a backward after engine.clip_grad_norm_" in message_of(lambda: half_a_step(engine, rank, world_size))
    engine.zero_grad()
    after = weights_of(engine)
    assert all(torch.equal(after[n], before[n]) for n in before)
    step_of(engine, 0, rank, world_size)
    return found


def casts(rank: int, world_size: int, stage: int) -> list[str]:
    engine, module, _ = engine_with(rank, world_size, stage)
    module.half()
    return [message_of(lambda: engine(inputs(0)))]


def writes_that_count(rank: int, world_size: int, stage: int) -> list[str]:
    """Do what `test_user_writes` does for every write, with one of them."""
    engine, module, _ = engine_with(rank, world_size, stage, precision="bf16")
    nn.init.constant_(module.first.weight, 0.5)
    module.layers[0].bias.data.clamp_(0.0, 0.0)
    step_of(engine, 0, rank, world_size)
    weights = weights_of(engine)
    assert torch.equal(weights["first.weight"], 0.5 - RATE * inputs(0).sum(0).expand(4, 6) / world_size)
    assert torch.equal(weights["layers.0.bias"], torch.full((4,), -RATE * 4 / world_size))
    return []


def writes_that_differ(rank: int, world_size: int, stage: int) -> list[str]:
    engine, module, _ = engine_with(rank, world_size, stage, precision="bf16")
    nn.init.constant_(module.first.weight, float(rank))
    return [message_of(lambda: engine(inputs(0)))]


def writes_in_stage_3(rank: int, world_size: int, stage: int) -> list[str]:
    engine, module, _ = engine_with(rank, world_size, 3)
    step_of(engine, 0, rank, world_size)
    messages = [message_of(lambda: nn.init.constant_(module.first.weight, 1.0))]
    return [*messages, message_of(lambda: module.load_state_dict({}))]


def optimizers(rank: int, world_size: int, stage: int) -> list[str]:
    """Return the messages about optimizers that are refused; `test_optimizers` has those that work."""

    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            pass

    module = linears()
    made = [
        torch.optim.Adafactor(module.parameters()),
        torch.optim.LBFGS(module.parameters()),
        torch.optim.SparseAdam(module.parameters()),
        torch.optim.Muon([module.first.weight]),
    ]
    raw = config_of(stage)
    found = [message_of(lambda: engine_of(rank, world_size, raw, linears(), optimizer=x)) for x in made]  # noqa: B023
    own = linears()
    return [*found, message_of(lambda: engine_of(rank, world_size, raw, own, optimizer=Own(own.parameters(), lr=RATE)))]


CHECKS: dict[str, Callable[[int, int, int], list[str]]] = {
    "`load_state_dict`, `p.copy_()`, `nn.init`, `p.data = x`, `p.data.clamp_()` and the like, the same on every rank": (
        writes_that_count
    ),
    "a write of other values, or on some ranks only": writes_that_differ,
    "a write in stage 3, or where parameters are on the host": writes_in_stage_3,
    "`engine.full_parameters()` within itself, or a forward or a step within it": misused_contexts,
    "`p.grad`, `clip_grad_norm_` and the like of torch, between a backward and the step": grad_is_refused,
    "`zero_grad()` of the model, the optimizer or the engine": gradients_are_dropped,
    "`torch.amp.GradScaler`": scaler_is_refused,
    "`p.register_hook`, and hooks after accumulation that were there before `initialize`": hooks,
    "`p.requires_grad_(False)` after `initialize`, and back": freezing,
    "`copy.deepcopy(model)`, `pickle`, `torch.save(model)`, `AveragedModel(model)`, in stages 0 to 2": copies,
    "the same in stage 3": copies_in_stage_3,
    "`copy.deepcopy(engine)`": copy_of_an_engine,
    "`model.half()`, `model.to(...)`": casts,
    "Adafactor, LBFGS, Muon, SparseAdam, and classes with a `step` of their own": optimizers,
    "`optimizer.add_param_group`": group_is_added,
    "`optimizer.state_dict()`, `optimizer.load_state_dict()`": state_dict_of_an_optimizer,
}
PAGE, HEADING = "docs/library.md", "Hands on parameters"
ROWS = {row.what: row.answer for row in rows(PAGE, HEADING)}


def all_checks(rank: int, world_size: int, stage: int) -> dict[str, list[str]]:
    return {what: check(rank, world_size, stage) for what, check in CHECKS.items()}


def test_every_row_of_the_table_has_a_check() -> None:
    assert list(ROWS) == list(CHECKS)


@pytest.mark.parametrize("stage", [0, 2])
def test_every_row_of_the_table_is_answered_in_its_words_on_every_rank(stage: int) -> None:
    """The messages of a refusal have the words that its row quotes. What is supported has been checked without one."""
    for found in run(all_checks, 2, stage):
        for what, messages in found.items():
            quotes = re.findall(r"`([^`]*)`", ROWS[what]) if ROWS[what].startswith("refused: ") else []
            assert bool(quotes) == bool(messages), what
            for message in messages:
                assert any(quote in message for quote in quotes), f"{what}: {message}"
            for quote in quotes:
                assert any(quote in message for message in messages), f"{what}: no message has {quote!r}"
