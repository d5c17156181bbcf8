"""Stage 3 is stage 2 for every graph: a backward that reaches a layer in any way trains as in plain torch, or what it
needs is refused by name.
"""

import copy
import io
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import parallel
from parallel.engine.module_engine import ModuleEngine
from tests.graphs import CASES, WIDTH, Case, InPlaceOnInput, Stack
from tests.harness import run
from tests.once import once
from tests.parity import Raw, whole
from tests.patience import patient, wait_until
from tests.tables import Row, rows
from tests.test_module_engine import config_of, engine_of

RANKS = 2


def setting_of(stage: int, placement: str = "cuda", **train: Any) -> Raw:
    zero = dict(stage=stage, tensor_placement_policy=placement)
    return config_of(stage, clip_grad_norm=None, **train) | dict(zero=zero)


SETTINGS: dict[str, Raw] = {
    "stage 2": setting_of(2),
    "stage 3": setting_of(3),
    "stage 0, offloaded": setting_of(0, "cpu"),
    "stage 3, offloaded": setting_of(3, "cpu"),
    "stage 3, planned": setting_of(3, "auto"),
    "stage 3, recomputed": setting_of(3, activation_checkpointing="full"),
    "stage 3, recomputed from the host": setting_of(3, activation_checkpointing="offload"),
}
CHANGES_INPUTS = {"in place on an input", "a buffer"}  # recomputation is impossible, in plain torch too


def share_of(rank: int) -> Tensor:
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x.chunk(RANKS)[rank]


def made(make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    module = make()
    return module, torch.optim.SGD(module.parameters(), lr=0.1)


def by_torch(case: Case) -> tuple[dict[str, Tensor], float]:
    """Return the weights after a step of plain torch in one process, and the norm of the gradient."""
    module, optimizer = made(case.make)
    module.double()
    for rank in range(RANKS):
        case.loop(module, lambda loss, **more: (loss / RANKS).backward(**more), share_of(rank))
    norm = nn.utils.clip_grad_norm_(module.parameters(), float("inf"))
    optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}, norm.item()


Found = tuple[dict[str, Tensor], float | str | None]
"""The weights after a step, and the norm of the gradient or, in place of it, an error."""


def by_engine(rank: int, world_size: int, setting: str, names: list[str]) -> list[Found]:
    """Return the same for each case, by an engine."""
    found: list[Found] = []
    for name in names:
        module, optimizer = made(CASES[name].make)
        engine, _ = engine_of(rank, world_size, SETTINGS[setting], module, optimizer=optimizer)
        try:
            CASES[name].loop(engine, engine.backward, share_of(rank))
            norm = engine.step().grad_norm
            found.append((whole(engine, [chunk.master for chunk in engine.chunks]), norm))
        except Exception as error:
            found.append(({}, f"{type(error).__name__}: {error}"))
    return found


@cache
def trained(setting: str) -> dict[str, Found]:
    """Return the weights and the norm of each case. The ranks are started once for all of them."""
    names = [name for name in CASES if "recomputed" not in setting or name not in CHANGES_INPUTS]
    found = once(f"graphs, {setting}", partial(run, by_engine, RANKS, setting, names))
    return dict(zip(names, found[0], strict=True))


def assert_as_in_plain_torch(setting: str, name: str) -> None:
    """All numbers are fp64, in which these small sums differ by a few last bits."""
    (got, norm), (want, wanted_norm) = trained(setting)[name], by_torch(CASES[name])
    assert norm == pytest.approx(wanted_norm, rel=1e-12), f"{setting}: {name}"
    for key, weight in want.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-11, atol=1e-11, msg=f"{setting}: {name}: {key}")


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_graph_trains_as_in_plain_torch(setting: str) -> None:
    for name in trained(setting):
        assert_as_in_plain_torch(setting, name)


# -- what is refused ---------------------------------------------------------------------------------------------------


class Direct(Stack):
    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = layer.forward(x)
        return y


class UsesWeights(Stack):
    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, layer.get_parameter("weight"))


class Transforms(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.func.grad(lambda x: F.linear(x, self.weight).square().sum())(x)
        return y


class Spoils(InPlaceOnInput):
    """The layer before needs its output, which is changed in place."""

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        return super().call(layer, x.exp())


class Parts(Stack):
    """The ranks call their layers in different orders."""

    def forward(self, x: Tensor) -> Tensor:
        first = parallel.current().place.rank
        return self.layers[1 - first](self.layers[first](x)).sum()  # type: ignore[no-any-return]


READS: dict[str, Callable[[nn.Parameter], Any]] = {
    "print": lambda p: print(p),
    "format": lambda p: f"{p}",
    ".data": lambda p: p.data,
    ".detach()": lambda p: p.detach(),
    ".numpy()": lambda p: p.numpy(force=True),
    ".tolist()": lambda p: p.tolist(),
    "torch.equal": lambda p: torch.equal(p, p),
    "torch.save": lambda p: torch.save(p, io.BytesIO()),
    "deepcopy": copy.deepcopy,
    "zero_": lambda p: nn.init.zeros_(p),
    ".data =": lambda p: setattr(p, "data", torch.zeros(WIDTH, WIDTH)),
    "LSTM": lambda p: torch.lstm_cell(torch.ones(1, WIDTH), (torch.ones(1, 1), torch.ones(1, 1)), p, p),
    "a Function": lambda p: Copy.apply(p),  # type: ignore[no-untyped-call]
    "foreach": lambda p: torch._foreach_mul([p], 2.0),
    "out": lambda p: torch.add(torch.ones(()), 1.0, out=p),
}
"""Ways to the values of a parameter."""


class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def forward_and_backward(engine: ModuleEngine) -> None:
    engine.backward(engine(share_of(engine.data.rank)))


def is_refused(read: Callable[[nn.Parameter], Any], parameter: nn.Parameter) -> bool:
    try:
        read(parameter)
    except Exception as error:
        words = ("is used while", "cannot be copied or pickled")
        return isinstance(error, parallel.ModelError) and any(word in str(error) for word in words)
    return False


def reads(engine: ModuleEngine) -> None:
    """Read the values in every way, in a layer and outside of all; describe the parameter in ways that are allowed."""
    for name in ("layers.1.weight", "first.weight"):
        assert engine.module.get_parameter(name).grad is None
    forward_and_backward(engine)
    for name in ("layers.1.weight", "first.weight"):
        parameter = engine.module.get_parameter(name)
        if ways := [way for way, read in READS.items() if not is_refused(read, parameter)]:
            raise RuntimeError(f"{name} was read: {', '.join(ways)}")
        assert parameter.shape == (WIDTH, WIDTH)
        assert parameter.requires_grad
        assert torch.zeros_like(parameter).abs().sum() == 0
    engine.module.get_parameter("layers.1.weight").tolist()


def sum_a_parameter(engine: ModuleEngine) -> None:
    engine.module.get_parameter("first.weight").sum()


def transform_around(engine: ModuleEngine) -> None:
    torch.func.grad(engine)(share_of(engine.data.rank))


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[ModuleEngine], None]]] = {
    "`layer.forward(x)`, which passes over the hooks of a module, or another of its methods": (
        Direct,
        forward_and_backward,
    ),
    "a layer's parameter in the forward of its parent": (UsesWeights, forward_and_backward),
    "the values of a layer's parameter elsewhere: printed, copied, saved or set": (Stack, reads),
    "the values of any other parameter between two steps": (
        Stack,
        sum_a_parameter,
    ),
    "`torch.func.grad`, `vjp`, `jacrev` or `hessian` in a model": (
        lambda: Stack(lambda: Transforms(WIDTH, WIDTH)),
        forward_and_backward,
    ),
    "the same around an engine": (Stack, transform_around),
    "layers in an order that differs between ranks": (Parts, forward_and_backward),
    "a tensor changed in place that a backward needs": (Spoils, forward_and_backward),
}


def refusals(rank: int, world_size: int) -> list[tuple[str, str]]:
    """Return the message of each refusal, and that of a usual step after it where the model can do one."""
    found = []
    for make, act in REFUSED.values():
        module, optimizer = made(make)
        engine, _ = engine_of(rank, world_size, SETTINGS["stage 3"], module, optimizer=optimizer)
        message = message_of(act, engine)
        engine.zero_grad()
        found.append((message, message_of(forward_and_backward, engine) if make is Stack else ""))
    return found


def message_of(act: Callable[[ModuleEngine], None], engine: ModuleEngine) -> str:
    try:
        act(engine)
    except Exception as error:
        return str(error)
    return ""


@cache
def refused() -> list[list[tuple[str, str]]]:
    return run(refusals, RANKS)


# -- the document ------------------------------------------------------------------------------------------------------

TRAINED: dict[str, tuple[str, ...]] = {
    "a loss that reaches a layer past its outputs: on the layer itself, in a list, in a global": (
        *("a loss on a layer", "losses of layers alone", "a list"),
    ),
    "lists and dicts that a layer or the model is given, and changes": ("a list", "inputs of the model"),
    "in place on an input or an output of a layer, or on a view of one": (
        *("in place on an input", "in place on an output", "a buffer"),
    ),
    "outputs of any class; an input that is returned; nothing": (
        *("dataclasses", "plain objects", "an input returned", "a buffer"),
    ),
    "layers called several times, in another order each time, beside each other, or not at all": (
        *("layers called twice", "another order", "branches"),
    ),
    "second and higher derivatives: a gradient penalty, forces, Hessians": (
        *("a penalty", "a third derivative", "a Hessian", "a derivative after a backward"),
        *("a derivative in the forward", "a derivative in a layer"),
    ),
    "`torch.vmap`, `torch.func.jvp` and forward-mode derivatives": ("vmap", "forward mode"),
    "`torch.utils.checkpoint`, of either kind: around layers, around all, within one": (
        *("checkpoint", "reentrant checkpoint", "one checkpoint", "a checkpoint in a layer"),
        *("a penalty of checkpoints", "a penalty of checkpoints in layers"),
    ),
    "an `autograd.Function` of yours that keeps parameters": ("a Function",),
    "`weight_norm`, `parametrize`, hooks on layers": ("weight_norm", "parametrize", "hooks"),
    "`nn.LSTM`, `nn.GRU`, `nn.MultiheadAttention`, parameters seen as complex numbers": (
        *("LSTM and GRU", "attention", "complex numbers"),
    ),
    "frozen layers with trained parts beside them": ("adapters",),
    "a retained graph; forwards ahead of their backwards; errors that are caught": (
        *("a retained graph", "forwards ahead", "errors"),
    ),
}
TABLE = rows("docs/library.md", "Graphs in stage 3")


def test_each_row_of_the_document_has_a_check_and_each_check_a_row() -> None:
    assert [row.what for row in TABLE] == [*TRAINED, *REFUSED]
    assert {name for names in TRAINED.values() for name in names} == set(CASES)


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_what_the_document_says_of_graphs_is_so(row: Row) -> None:
    if row.what in TRAINED:
        assert row.answer == "as in stage 2"
        for name in TRAINED[row.what]:
            assert_as_in_plain_torch("stage 3", name)
        return
    words = row.answer.split("`")[1]
    for messages in refused():
        message, after = messages[list(REFUSED).index(row.what)]
        assert words in message
        assert after == ""


def appended(rank: int, world_size: int) -> tuple[list[float], float | None]:
    setting = SETTINGS["stage 3, recomputed from the host"]
    module, optimizer = made(CASES["a list"].make)
    engine, _ = engine_of(rank, world_size, setting, module, optimizer=optimizer)
    forward_and_backward(engine)
    return [loss.item() for loss in module.losses], engine.step().grad_norm  # type: ignore[union-attr]


def test_a_layer_whose_inputs_are_offloaded_appends_to_the_users_list() -> None:
    """Recomputation calls a layer again with a copy of the list: the user's has one loss of each layer."""
    norm = by_torch(CASES["a list"])[1]
    for losses, found in run(appended, RANKS):
        assert len(losses) == 3
        assert found == pytest.approx(norm, rel=1e-12)


# -- memory ------------------------------------------------------------------------------------------------------------


def kept(rank: int, world_size: int, names: list[str]) -> list[tuple[int, int]]:
    """Return how many buffers of whole layers have memory, for each case: after a forward, before its backward, and
    after a second one's backward.
    """
    found = []
    for name in names:
        module, optimizer = made(CASES[name].make)
        engine, _ = engine_of(rank, world_size, SETTINGS["stage 3"], module, optimizer=optimizer)
        buffers: list[StorageWeakRef] = []
        for chunk in engine.chunks:
            if chunk.infos[0].unit:
                shown = chunk.parameters.on_show
                chunk.parameters.on_show = _recording(shown, chunk, buffers)
        loss = engine(share_of(rank))
        after_forward = _alive(buffers)
        engine.backward(loss)
        del loss
        engine.backward(engine(share_of(rank)))
        assert len(buffers) >= 3 * len(list(module.children()))
        found.append((after_forward, _alive(buffers)))
    return found


def _alive(buffers: list[StorageWeakRef]) -> int:
    """Return the number of buffers that have memory; a thread of gloo may let go of one a moment later."""
    wait_until(lambda: all(buffer.expired() for buffer in buffers), patient(1.0))
    return sum(not buffer.expired() for buffer in buffers)


def recomputed(rank: int, world_size: int) -> list[int]:
    """Return the number of times that the layers are called in a step: each around a checkpoint of the user's own."""
    module, optimizer = made(CASES["checkpoint"].make)
    engine, _ = engine_of(rank, world_size, SETTINGS["stage 3"], module, optimizer=optimizer)
    calls: list[int] = []
    for layer in module.get_submodule("layers").children():
        layer.register_forward_pre_hook(lambda layer, inputs: calls.append(1))
    loss = engine(share_of(rank))
    before = len(calls)
    engine.backward(loss)
    return [before, len(calls)]


def test_a_checkpoint_around_a_layer_still_decides_what_is_kept() -> None:
    """It keeps nothing but inputs, so that each layer is called once more in the backward."""
    assert run(recomputed, RANKS) == [[3, 6]] * RANKS


def _recording(shown: Callable[[bool], None], chunk: Any, buffers: list[StorageWeakRef]) -> Callable[[bool], None]:
    def record(is_whole: bool) -> None:
        if is_whole:
            buffers.append(StorageWeakRef(chunk.parameters.whole.untyped_storage()))
        shown(is_whole)

    return record


def test_a_graph_keeps_no_memory_of_layers_that_are_released() -> None:
    names = ["a loss on a layer", "attention", "LSTM and GRU", "a Function", "dataclasses", "checkpoint"]
    assert run(kept, RANKS, names)[0] == [(0, 0)] * len(names)
