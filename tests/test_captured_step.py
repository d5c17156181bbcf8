"""Steps that a graph replays: they are the steps that run as usual, to the bit, and whoever looks on sees all of them.

On a CPU a graph is `RerunGraph`; the tests on a GPU have CUDA's.
"""

import enum
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models
import parallel
from models import rotary
from models.attention import AttentionOptions
from models.layer import Block, FeedForward
from models.rotary import Rotary
from models.shapes import resolve
from parallel.chunk.writes import Writes
from parallel.engine import captured_step
from parallel.engine.captured_step import problem_of_capture
from parallel.engine.replica_batches import ReplicaBatches
from parallel.engine.step_code import StepCode
from parallel.errors import DataError, ModelError
from parallel.modules.parameters import OriginalParameters
from parallel.ops.captured import CALLS_BEFORE, CudaGraph, graphs_of, is_capturing
from parallel.ops.clock import Clock
from parallel.placement.memory_report import MemoryUse
from parallel.tensor.residual import Addend, output_of
from tests.rerun_graph import RerunGraph

Fields = dict[str, Any]
Batch = dict[str, Tensor]
Made = list[RerunGraph]

LENGTH, VOCABULARY = 16, 250
SLOW = pytest.mark.slow
DYNAMIC = dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0)

CASES: dict[str, tuple[Fields, Fields, str]] = {
    "dropout": (dict(name="opt-tiny", dropout=0.1), {}, "input_ids"),
    "bf16": (dict(name="opt-tiny", dropout=0.1), dict(precision="bf16"), "input_ids"),
    "fp8": (dict(name="opt-tiny", dropout=0.1), dict(precision="fp8", fp8_min_elements=0), "input_ids"),
    "recomputed": (dict(name="opt-tiny", dropout=0.1), dict(activation_checkpointing="full"), "input_ids"),
    "one microbatch": (dict(name="opt-tiny", dropout=0.1), dict(micro_batch_size=4, precision="bf16"), "input_ids"),
    "llama": (dict(name="llama-tiny"), {}, "input_ids"),
    "positions": (dict(name="llama-tiny"), {}, "position_ids"),
    "documents": (dict(name="llama-tiny"), {}, "document_ids"),
    "dynamic": (dict(name="llama-tiny", max_position_embeddings=LENGTH, rope_parameters=DYNAMIC), {}, "input_ids"),
    "padding": (dict(name="opt-tiny", dropout=0.1), {}, "attention_mask"),
}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Let engines of this test have graphs also on a CPU, and return those that they make there."""
    graphs: Made = []

    def new() -> RerunGraph:
        graphs.append(RerunGraph())
        return graphs[-1]

    monkeypatch.setattr(captured_step, "graphs_of", lambda device: graphs_of(device) or new)
    monkeypatch.setattr(rotary, "is_capturing", lambda device: is_capturing(device) or RerunGraph.is_capturing)
    return graphs


def engine_of(model: Fields | None = None, *, captures: bool = True, **train: Any) -> parallel.Engine:
    """Return an engine of a small model on the device of this machine. Without `captures` it never has a graph."""
    raw = dict(
        model=dict(num_hidden_layers=2) | (model or dict(name="opt-tiny", dropout=0.0)),
        data=dict(sequence_length=LENGTH),
        train=dict(global_batch_size=4, micro_batch_size=2, steps=30) | train,
        optimizer=dict(lr=1e-2),
    )
    context = parallel.launch_from_torch(raw, resolve=resolve)
    engine = parallel.Engine(models.build(context), context)
    if not captures:
        engine.captured_step.problem = "it is compared with one that does"
    return engine


def batch_of(number: int, *, key: str = "input_ids", samples: int = 4, length: int = LENGTH) -> Batch:
    """Return the batch of a step, of which each has other tokens, and other values of the optional key."""
    generator = torch.Generator().manual_seed(number)
    batch = {"input_ids": torch.randint(4, VOCABULARY, (samples, length), generator=generator)}
    if key == "position_ids":
        batch[key] = (torch.arange(length) + number).expand(samples, -1)
    elif key == "document_ids":  # the longest has 9 tokens in each step, and each sample has two
        ends = (torch.arange(samples) + number) % 2 + 7
        batch[key] = (torch.arange(length) >= ends.unsqueeze(1)).long()
    elif key == "attention_mask":  # the same number of labels in each step
        batch[key] = torch.ones(samples, length, dtype=torch.int64)
        batch[key][number % samples, length - 5 :] = 0
        batch["labels"] = torch.where(batch[key] == 1, batch["input_ids"], -100)
    return batch


def weights(engine: parallel.Engine) -> list[Tensor]:
    return [chunk.master.clone() for chunk in engine.chunks]


def blocks_of(engine: parallel.Engine) -> list[Block]:
    return [module for module in engine.part.modules() if isinstance(module, Block)]


def has_graph(engine: parallel.Engine) -> bool:
    return engine.captured_step._captured is not None


def train(engine: parallel.Engine, batches: list[Batch]) -> list[tuple[float, float | None]]:
    """Return loss and norm of each step."""
    results = [engine.train_step(batch) for batch in batches]
    return [(result.loss, result.grad_norm) for result in results]


def assert_same(one: parallel.Engine, other: parallel.Engine) -> None:
    assert all(map(torch.equal, weights(one), weights(other)))


@pytest.mark.parametrize(
    "case", [case if case in ("dropout", "fp8") else pytest.param(case, marks=SLOW) for case in CASES]
)
def test_replayed_steps_are_the_steps_that_run_as_usual(case: str, made: Made) -> None:
    model, fields, key = CASES[case]
    batches = [batch_of(number, key=key) for number in range(CALLS_BEFORE + 4)]
    usual, captured = engine_of(model, captures=False, **fields), engine_of(model, **fields)
    assert train(captured, batches) == train(usual, batches)
    assert_same(captured, usual)
    first_steps = CALLS_BEFORE + (case == "fp8")  # the first one has no scales
    assert [graph.replays for graph in made] == [len(batches) - first_steps]


# -- the engine's state ------------------------------------------------------------------------------------------------


PARTS = ("chunks", "gradients", "gatherer", "scaling", "optimizer", "steps", "writes")


def described(x: object, path: str, seen: set[int]) -> Iterator[tuple[str, object]]:
    """Yield all values that an object of ours refers to, with their paths."""
    if isinstance(x, Tensor):
        yield path, (x.dtype, tuple(x.shape), x.detach().contiguous().view(-1).view(torch.uint8).tolist())
        yield f"{path}.grad", x.is_leaf and x.grad is None
    elif isinstance(x, str | int | float | bool | None | enum.Enum | torch.dtype):
        yield path, x
    elif id(x) not in seen:
        seen.add(id(x))
        inner = parts_of(x)
        if inner:
            yield f"{path} has", len(inner)
        for name, value in inner.items():
            yield from described(value, f"{path}.{name}", seen)


def parts_of(x: object) -> dict[object, object]:
    """Return what an object contains; nothing of one that is not ours."""
    if isinstance(x, dict):
        return dict(enumerate(x.values()))
    if isinstance(x, list | tuple | set):
        return dict(enumerate(x))
    if not type(x).__module__.startswith("parallel.") or not hasattr(x, "__dict__"):
        return {}
    # The addresses of views, and what is free on the host, are others for each engine.
    return {name: value for name, value in vars(x).items() if name not in ("_views", "watch", "watcher")}


@pytest.mark.parametrize("case", [pytest.param("one microbatch", marks=SLOW), "fp8"])
def test_a_replay_leaves_the_engine_as_a_step_that_runs_as_usual_does(case: str, made: Made) -> None:
    """Every attribute of every object of the engine has the same value between backward and update."""
    model, fields, _ = CASES[case]
    engines = [engine_of(model, captures=False, **fields), engine_of(model, **fields)]
    found = []
    for engine in engines:
        train(engine, [batch_of(number) for number in range(CALLS_BEFORE + 2)])
        engine.part.train()
        staged, _ = engine.batches.staged(batch_of(77), engine.num_samples)
        loss = engine.captured_step(staged, engine.scaling is not None)
        assert all(chunk.gradient.total is not None for chunk in engine.chunks)
        state = {name: getattr(engine, name) for name in PARTS}
        state |= dict(loss=loss, plans=engine.passes.plans, traffic=engine.mesh.traffic, phase=engine.stopwatch.phase)
        found.append(dict(described(state, "engine", set())))
    assert made[0].replays >= 2
    assert found[0].keys() == found[1].keys()
    assert not [path for path, value in found[0].items() if found[1][path] != value]
    assert len(found[0]) > 1000  # it has looked into them


@pytest.mark.parametrize(
    "case", ["llama", "dynamic", *[pytest.param(x, marks=SLOW) for x in ("fp8", "recomputed", "documents")]]
)
def test_a_graph_reads_nothing_that_could_be_freed(case: str, made: Made) -> None:
    """Whatever it has not made is a parameter, a scale, the batch in its own memory, or an attribute of a module."""
    model, fields, key = CASES[case]
    engine = engine_of(model, **fields)
    train(engine, [batch_of(number, key=key) for number in range(CALLS_BEFORE + 2)])
    work = engine.captured_step._captured
    assert work is not None
    stays = [chunk.parameters.whole for chunk in engine.chunks]
    stays += work[1].batch.whole.tensors
    stays += [] if engine.scaling is None else [engine.scaling.amax, engine.scaling.scales, engine.scaling.inverses]
    attributes = [value for module in engine.part.modules() for value in vars(module).values()]
    attributes += [x for value in attributes if isinstance(value, list) for x in value]
    attributes += [value.rotary for value in attributes if isinstance(value, AttentionOptions)]
    stays += [x for x in attributes if isinstance(x, Tensor)]
    stays += [x._inv_freq for x in attributes if isinstance(x, Rotary)]
    known = {x.untyped_storage().data_ptr() for x in stays}
    assert not [x for address, x in made[0].outside.items() if address not in known]


# -- when there is a graph ---------------------------------------------------------------------------------------------


def test_a_step_of_another_size_runs_as_usual_between_replays(made: Made) -> None:
    """The next graph takes the place of the first, and computes the positions of its own tokens."""
    small = {5, 6, *range(8, 8 + 2 * CALLS_BEFORE + 2)}
    batches = [batch_of(number, samples=2 if number in small else 4) for number in range(17)]
    llama = dict(name="llama-tiny")
    usual, captured = engine_of(llama, captures=False), engine_of(llama)
    assert train(captured, batches) == train(usual, batches)
    assert_same(captured, usual)
    assert [graph.replays for graph in made] == [3, 2]  # of the steps 3, 4, 7; and 14, 15
    assert not made[0].operations


@SLOW
def test_lengths_that_change_every_few_steps_are_not_captured_each_time(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph of the first length is replayed whenever it comes again. One that is replayed often has paid."""
    engine = engine_of()
    lengths = [length for _ in range(6) for length in (16, 8, 12) for _ in range(CALLS_BEFORE + 2)]
    train(engine, [batch_of(number, length=length) for number, length in enumerate(lengths)])
    assert [graph.replays for graph in made] == [2 + 5 * (CALLS_BEFORE + 2)]
    monkeypatch.setattr(captured_step, "REPLAYS_THAT_PAY", made[0].replays + 1)
    lengths = [*[16] * 2, *[8] * (CALLS_BEFORE + 1)]
    train(engine, [batch_of(number, length=length) for number, length in enumerate(lengths)])
    assert [graph.replays for graph in made][1:] == [1]


def test_steps_with_other_numbers_of_labels_are_not_captured(made: Made) -> None:
    """The number is in the launches, by the factor of the loss."""
    usual, captured = engine_of(captures=False), engine_of()
    batches = [batch_of(number) for number in range(CALLS_BEFORE + 3)]
    for number, batch in enumerate(batches):
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][0, : number + 1] = -100
    assert train(captured, batches) == train(usual, batches)
    assert not made


def test_evaluations_and_checkpoints_between_replays_change_nothing(tmp_path: Path, made: Made) -> None:
    """Loading one does not either, and an evaluation of another length has tables of positions of its own."""
    usual, captured = engine_of(dict(name="llama-tiny"), captures=False), engine_of(dict(name="llama-tiny"))
    losses = []
    for engine, folder in ((usual, tmp_path / "usual"), (captured, tmp_path / "captured")):
        losses.append(train(engine, [batch_of(number) for number in range(5)]))
        losses[-1].append((engine.evaluate([batch_of(50, length=LENGTH // 2)]), None))
        losses[-1] += train(engine, [batch_of(5)])
        engine.save_checkpoint(folder)
        losses[-1] += train(engine, [batch_of(6)])
        engine.load_checkpoint(folder)
        losses[-1] += train(engine, [batch_of(number) for number in (6, 7)])
    assert losses[0] == losses[1]
    assert_same(captured, usual)
    assert [graph.replays for graph in made] == [6]


@SLOW
def test_a_step_that_is_left_out_changes_nothing_for_the_replays_after_it(made: Made) -> None:
    usual, captured = (engine_of(captures=captures, nonfinite="skip") for captures in (False, True))
    losses = []
    for engine in (usual, captured):
        losses.append(train(engine, [batch_of(number) for number in range(5)]))
        norm = next(chunk for chunk in engine.chunks if not chunk.spec.is_matrix).infos[0].parameter
        kept = norm.detach().clone()
        with torch.no_grad():
            norm.fill_(float("inf"))
        assert engine.train_step(batch_of(5)).skipped
        with torch.no_grad():
            norm.copy_(kept)
        losses[-1] += train(engine, [batch_of(number) for number in range(6, 9)])
    assert losses[0] == losses[1]
    assert_same(captured, usual)
    assert [graph.replays for graph in made] == [6]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (dict(world_size=2), "ranks communicate within a step"),
        (dict(zero=dict(stage=3)), "parameters are gathered on demand"),
        (dict(zero=dict(tensor_placement_policy="auto")), "parameters are gathered on demand"),
        (dict(train=dict(activation_checkpointing="offload")), "inputs of layers are copied to the host"),
    ],
)
def test_some_configs_are_never_captured(changed: Fields, problem: str) -> None:
    world = changed.pop("world_size", 1)
    raw = dict(model=dict(name="opt-tiny"), data=dict(sequence_length=LENGTH)) | changed
    config = parallel.config.parse(raw, world_size=world, resolve=resolve, batches=False)
    assert problem_of_capture(config, world) == problem
    assert not problem_of_capture(engine_of().config, 1)


@SLOW
def test_a_hook_of_an_optimizer_may_keep_the_gradients_of_a_step(made: Made) -> None:
    context = engine_of().context
    part = models.build(context)
    optimizer = torch.optim.SGD(part.parameters(), lr=1e-2)
    kept = list[Tensor]()

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        kept.append(next(x.grad for x in optimizer.param_groups[0]["params"] if x.grad is not None))

    optimizer.register_step_post_hook(keep)
    train(parallel.Engine(part, context, optimizer), [batch_of(number) for number in range(CALLS_BEFORE + 3)])
    assert not any(torch.equal(one, other) for one, other in pairwise(kept))
    assert not made


# -- somebody who looks on ---------------------------------------------------------------------------------------------


def a_forward_hook(engine: parallel.Engine, calls: list[str]) -> None:
    engine.part.layers[1].register_forward_hook(lambda module, inputs, y: calls.append("hook"))


def a_hook_of_the_part(engine: parallel.Engine, calls: list[str]) -> None:
    engine.part.register_forward_pre_hook(lambda module, inputs: calls.append("hook"))


def a_hook_of_a_gradient(engine: parallel.Engine, calls: list[str]) -> None:
    def counted(gradient: Tensor) -> None:
        calls.append("hook")

    next(info for info in engine.part.infos if not info.is_matrix).parameter.register_hook(counted)


def a_function_in_place_of_a_method(engine: parallel.Engine, calls: list[str]) -> None:
    layer = engine.part.layers[1]
    before = layer.forward

    def forward(*inputs: Any) -> Any:
        calls.append("hook")
        return before(*inputs)

    layer.forward = forward


def a_hook_after_a_gradient(engine: parallel.Engine, calls: list[str]) -> None:
    parameter = next(info for info in engine.part.infos if not info.is_matrix).parameter
    parameter.register_post_accumulate_grad_hook(lambda parameter: calls.append("hook"))


@pytest.mark.parametrize(
    "attach",
    [
        a_forward_hook,
        pytest.param(a_hook_of_the_part, marks=SLOW),
        pytest.param(a_hook_of_a_gradient, marks=SLOW),
        pytest.param(a_hook_after_a_gradient, marks=SLOW),
        pytest.param(a_function_in_place_of_a_method, marks=SLOW),
    ],
)
def test_a_hook_is_called_in_each_step(attach: Callable[[parallel.Engine, list[str]], None], made: Made) -> None:
    engine, calls = engine_of(micro_batch_size=4), list[str]()
    train(engine, [batch_of(number) for number in range(CALLS_BEFORE + 1)])
    assert made[0].replays == 1
    attach(engine, calls)
    train(engine, [batch_of(number) for number in range(2 * CALLS_BEFORE + 2)])
    assert (len(calls), [graph.replays for graph in made]) == (2 * CALLS_BEFORE + 2, [2])  # the last one in vain


@SLOW
def test_a_profiler_and_a_mode_see_the_operations_of_each_step(made: Made) -> None:
    engine = engine_of()
    train(engine, [batch_of(number) for number in range(CALLS_BEFORE + 1)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.train_step(batch_of(7))
    names = {event.key for event in profile.key_averages()}
    assert sum(name.startswith(("forward", "backward")) for name in names) == 4  # of two microbatches
    with FlopCounterMode(display=False) as flops:
        engine.train_step(batch_of(8))
    assert flops.get_total_flops() > 0
    assert made[0].replays == 1
    with engine.stopwatch.recording() as marks:
        engine.train_step(batch_of(9))
    assert sum(phase == "forward" for phase, *_ in marks) == 2
    engine.train_step(batch_of(10))
    assert made[0].replays == 2


def a_number(engine: parallel.Engine, patch: pytest.MonkeyPatch) -> None:
    for block in blocks_of(engine):
        block.dropout = 0.25


def a_word(engine: parallel.Engine, patch: pytest.MonkeyPatch) -> None:
    for block in blocks_of(engine):
        assert isinstance(block.feed_forward, FeedForward)
        block.feed_forward.activation = "gelu"


def a_list(engine: parallel.Engine, patch: pytest.MonkeyPatch) -> None:
    for block in blocks_of(engine):
        block.dropout_keys[0] = block.dropout_keys[0] + 1


def a_module(engine: parallel.Engine, patch: pytest.MonkeyPatch) -> None:
    """The new one has the same parameters under the same names, which the engine can follow."""

    class Squared(FeedForward):
        def addend(self, x: Any) -> Addend:
            return output_of(self.down, self.up(x).relu().square())

    block = blocks_of(engine)[0]
    squared = Squared.__new__(Squared)
    vars(squared).update(vars(block.feed_forward))
    block.feed_forward = squared


def a_method(engine: parallel.Engine, patch: pytest.MonkeyPatch) -> None:
    before = Block.forward
    patch.setattr(Block, "forward", lambda self, x, batch: 1.5 * before(self, x, batch))


@pytest.mark.parametrize(
    "change", [a_module, *[pytest.param(x, marks=SLOW) for x in (a_number, a_word, a_list, a_method)]]
)
def test_what_is_changed_counts_from_the_next_step_on(
    change: Callable[[parallel.Engine, pytest.MonkeyPatch], None], made: Made
) -> None:
    """A new graph is made then; but none while there is another method, which may do more than a graph does. The old
    one is replayed once more, in vain, while the host finds out.
    """
    batches = [batch_of(number) for number in range(CALLS_BEFORE + 2)]
    model = dict(name="opt-tiny", dropout=0.5)
    results = []
    for captures in (False, True):
        engine = engine_of(model, captures=captures)
        results.append(train(engine, batches))
        with pytest.MonkeyPatch.context() as patch:
            change(engine, patch)
            results[-1] += train(engine, batches + batches[:CALLS_BEFORE])
    assert results[0] == results[1]
    assert [graph.replays for graph in made] == ([3] if change is a_method else [3, 2])


def test_a_graph_is_launched_before_the_host_looks_at_anything_but_the_batch(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks while the device computes. Writes into parameters are looked for beside the graph."""
    engine, seen = engine_of(), list[str]()
    train(engine, [batch_of(number) for number in range(CALLS_BEFORE + 1)])
    for owner, name in (
        *((RerunGraph, "replay"), (RerunGraph, "beside"), (Writes, "take_replaced"), (OriginalParameters, "change")),
        *((Writes, "changed"), (StepCode, "key"), (ReplicaBatches, "staged")),
    ):
        member = getattr(owner, name)

        def noted(*args: Any, name: str = name, member: Callable[..., Any] = member, **options: Any) -> Any:
            seen.append(name)
            return member(*args, **options)

        monkeypatch.setattr(owner, name, noted)
    engine.train_step(batch_of(4))
    assert seen == ["staged", "replay", "take_replaced", "change", "beside", "changed", "key"]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp8", marks=SLOW)])
def test_what_is_found_after_a_graph_was_launched_has_its_work_done_again(precision: str, made: Made) -> None:
    """New values of a parameter, in memory of their own; a hook; and a frozen parameter, which is refused."""
    fields: Fields = dict(precision=precision) | (dict(fp8_min_elements=0) if precision == "fp8" else {})
    results = []
    for captures in (False, True):
        engine = engine_of(captures=captures, **fields)
        parameter = engine.chunks[0].infos[0].parameter
        results.append(train(engine, [batch_of(number) for number in range(CALLS_BEFORE + 3)]))
        parameter.data = 1.5 * parameter.data
        results[-1] += train(engine, [batch_of(6)])
        hook = blocks_of(engine)[0].register_forward_hook(lambda module, inputs, y: 2 * y)
        results[-1] += train(engine, [batch_of(7)])
        hook.remove()
        results[-1] += train(engine, [batch_of(8), batch_of(9)])
        parameter.requires_grad_(False)
        with pytest.raises(ModelError, match="requires_grad"):
            engine.train_step(batch_of(10))
        parameter.requires_grad_(True)
        results[-1] += train(engine, [batch_of(10), batch_of(11)])
    assert results[0] == results[1]
    num_usual = CALLS_BEFORE + (precision == "fp8") + 1  # and that with a hook
    assert [graph.replays for graph in made] == [12 - num_usual + 3]


def test_what_was_launched_for_a_step_that_was_refused_is_not_that_of_a_later_one(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes before the later one came after the graph: work beside it would not see them."""
    engine, seen = engine_of(), list[str]()
    train(engine, [batch_of(number) for number in range(CALLS_BEFORE + 1)])
    parameter = engine.chunks[0].infos[0].parameter
    parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="requires_grad"):
        engine.train_step(batch_of(4))
    assert made[0].replays == 2
    parameter.requires_grad_(True)

    def beside(graph: RerunGraph) -> AbstractContextManager[object]:
        seen.append("beside")
        return nullcontext()

    monkeypatch.setattr(RerunGraph, "beside", beside)
    engine.train_step(batch_of(5, samples=2))
    assert not seen
    engine.train_step(batch_of(6))
    engine.train_step(batch_of(7))
    assert seen == ["beside"]


# -- the next step, launched at the end of one -------------------------------------------------------------------------


def without_writes(*, captures: bool, **train: Any) -> parallel.Engine:
    """Return an engine between whose steps no code of a user runs, as in `colonnade train`."""
    engine = engine_of(captures=captures, **train)
    engine.writes.stop()
    return engine


def _itself(batch: Batch | None) -> Batch | None:
    return batch


def train_ahead(engine: parallel.Engine, batches: list[Batch]) -> list[tuple[float, float | None]]:
    """Do as `train`; each step but the last reads the batch of the next."""
    following = [*batches[1:], None]
    results = [
        engine.train_step(one, next_batch=partial(_itself, x)) for one, x in zip(batches, following, strict=True)
    ]
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize("writes", [True, False])
def test_the_next_step_is_launched_before_this_one_returns_if_nobody_writes_in_between(
    writes: bool, made: Made
) -> None:
    usual, captured = engine_of(captures=False), engine_of()
    if not writes:
        captured.writes.stop()
    batches, launched = [batch_of(number) for number in range(CALLS_BEFORE + 4)], list[int]()
    results = train(usual, batches)
    for number, batch in enumerate(batches):
        following = batches[number + 1] if number + 1 < len(batches) else None
        result = captured.train_step(batch, next_batch=partial(_itself, following))
        assert (result.loss, result.grad_norm) == results[number]
        launched.append(made[0].replays if made else 0)
    assert_same(captured, usual)
    assert launched == ([0, 0, 0, 1, 2, 3, 4] if writes else [0, 0, 0, 2, 3, 4, 4])
    if not writes:
        assert made[0].replays == 4  # none of them was in vain


@SLOW
@pytest.mark.parametrize("case", CASES)
def test_steps_that_are_launched_ahead_are_the_steps_that_run_as_usual(case: str, made: Made) -> None:
    model, fields, key = CASES[case]
    batches = [batch_of(number, key=key) for number in range(CALLS_BEFORE + 4)]
    usual, captured = engine_of(model, captures=False, **fields), engine_of(model, **fields)
    captured.writes.stop()
    assert train_ahead(captured, batches) == train(usual, batches)
    assert_same(captured, usual)
    assert [graph.replays for graph in made] == [len(batches) - CALLS_BEFORE - (case == "fp8")]


def another_batch(engine: parallel.Engine, folder: Path, following: Batch) -> Batch:
    return batch_of(77)


def a_write_into_the_batch(engine: parallel.Engine, folder: Path, following: Batch) -> Batch:
    following["input_ids"][0, 0] = 5
    return following


def a_key_of_the_batch(engine: parallel.Engine, folder: Path, following: Batch) -> Batch:
    following["labels"] = following["input_ids"].flip(1)
    return following


def a_tensor_of_the_batch(engine: parallel.Engine, folder: Path, following: Batch) -> Batch:
    following["input_ids"] = following["input_ids"].flip(1)
    return following


def an_evaluation(engine: parallel.Engine, folder: Path, following: Batch) -> Batch:
    engine.evaluate([batch_of(50, length=LENGTH // 2), following])
    return following


def a_checkpoint(engine: parallel.Engine, folder: Path, following: Batch) -> Batch:
    engine.save_checkpoint(folder)
    engine.load_checkpoint(folder)
    return following


def an_older_state(engine: parallel.Engine, folder: Path, following: Batch) -> Batch:
    engine.load_state_dict(torch.load(folder / "state.pt"))
    return following


def a_state_of_another_run(engine: parallel.Engine, folder: Path, following: Batch) -> Batch:
    """It has taken as many samples."""
    state = engine.state_dict()
    engine.load_state_dict(state | {"tensors": {key: 1.5 * x for key, x in state["tensors"].items()}})
    return following


def other_weights(engine: parallel.Engine, folder: Path, following: Batch) -> Batch:
    engine.load_weights(folder / "first")
    return following


def a_batch_that_is_refused(engine: parallel.Engine, folder: Path, following: Batch) -> Batch:
    for bad in ({"input_ids": torch.tensor([[1]])}, {"input_ids": batch_of(3)["input_ids"] + VOCABULARY * 10}):
        with pytest.raises(DataError):
            engine.train_step(bad)
    return following


def a_profiler(engine: parallel.Engine, folder: Path, following: Batch) -> Batch:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        engine.train_step(following)
    return batch_of(78)


RARE_BETWEEN = (
    another_batch,
    a_key_of_the_batch,
    a_tensor_of_the_batch,
    a_checkpoint,
    a_batch_that_is_refused,
    a_profiler,
)
BETWEEN = [
    *(an_older_state, a_state_of_another_run, other_weights, a_write_into_the_batch, an_evaluation),
    *(pytest.param(x, marks=SLOW) for x in RARE_BETWEEN),
]


@pytest.mark.parametrize("between", BETWEEN)
def test_what_comes_between_two_steps_counts_though_the_next_is_launched(
    between: Callable[[parallel.Engine, Path, Batch], Batch], tmp_path: Path, made: Made
) -> None:
    """All that an engine can do between two steps, and what may happen to a batch that it has read ahead."""
    results = []
    for captures in (False, True):
        engine, folder = without_writes(captures=captures), tmp_path / str(captures)
        batches, step = [batch_of(number) for number in range(CALLS_BEFORE + 4)], train_ahead if captures else train
        results.append(step(engine, batches[:2]))
        engine.save_checkpoint(folder / "first")
        torch.save(engine.state_dict(), folder / "state.pt")
        results[-1] += step(engine, batches[2:-1])
        next_batch = partial(_itself, batches[1]) if captures else None
        results[-1].append((engine.train_step(batches[-1], next_batch=next_batch).loss, None))
        assert (engine.captured_step._early is not None) == captures
        last = between(engine, folder, batches[1])
        results[-1] += step(engine, [last, batch_of(20), batch_of(21)])
        results[-1].append((sum(float(x.double().sum()) for x in weights(engine)), None))
    assert results[0] == results[1]


def pause_of(engine: parallel.Engine, patch: pytest.MonkeyPatch) -> Callable[[], object]:
    """Return what lets a second pass: on a CPU alone, where each replay of a graph sets the marks in it anew."""
    if engine.mesh.device.type == "cuda":
        return partial(time.sleep, 1)
    now, in_graph, replay = [0.0], list[list[float]](), RerunGraph.replay

    def mark_in_graph() -> list[float]:
        in_graph.append(now.copy())
        return in_graph[-1]

    def replay_and_mark(graph: RerunGraph) -> None:
        replay(graph)
        for mark in in_graph:
            mark[0] = now[0]

    def pause() -> None:
        now[0] += 1

    patch.setattr(RerunGraph, "replay", replay_and_mark)
    engine.stopwatch._clock = Clock(now.copy, lambda one: True, lambda one, other: other[0] - one[0], mark_in_graph)
    return pause


@pytest.mark.parametrize("discarded", [False, pytest.param(True, marks=SLOW)])
def test_the_time_between_two_steps_is_that_of_neither_though_the_next_is_launched(
    discarded: bool, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, entered = without_writes(captures=True), list[str]()
    pause = pause_of(engine, monkeypatch)
    engine.stopwatch._on_phase = entered.append
    batches = [batch_of(number) for number in range(CALLS_BEFORE + 3)]
    train_ahead(engine, batches[:-1])
    found = []
    for _ in range(2):
        found.append(engine.train_step(batches[-1], next_batch=lambda: batches[-1]).phases)
        assert engine.captured_step._early is not None
        assert entered[-1] == ""  # a rank that hangs, or has no room, is not in a step
        pause()
    last = batch_of(77) if discarded else batches[-1]
    for phases in (*found[1:], engine.train_step(last).phases):
        assert sum(phases.values()) < 0.9
        assert min(phases.values()) >= 0


@SLOW
@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("between", [an_older_state, other_weights, an_evaluation, a_checkpoint, another_batch])
def test_what_comes_between_two_steps_of_a_gpu_counts_though_the_next_is_launched(
    between: Callable[[parallel.Engine, Path, Batch], Batch], tmp_path: Path
) -> None:
    test_what_comes_between_two_steps_counts_though_the_next_is_launched(between, tmp_path, [])


class _Counting(nn.Module):
    """A layer with a buffer that each forward writes."""

    count: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("count", torch.zeros((), device=next(layer.parameters()).device))

    def forward(self, *inputs: Any) -> Any:
        self.count += 1
        return self.layer(*inputs) * (1 + self.count / 64)


class _Random(nn.Module):
    """A layer that draws from torch's generator."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> Any:
        return nn.functional.dropout(self.layer(*inputs), 0.1)


class _Merging(Block):
    """A block whose weights are others in evaluation mode, as those of an adapter that is merged may be."""

    def train(self, mode: bool = True) -> "_Merging":
        if mode is not self.training:
            next(self.parameters()).data.mul_(0.5 if mode else 2.0)
        return super().train(mode)


def with_layer(engine: parallel.Engine, layer: Callable[[nn.Module], nn.Module]) -> parallel.Engine:
    """Return the engine, whose first block is within this layer."""
    first, block, *others = engine.part.stages[0]
    engine.part.stages[0] = (first, layer(block), *others)
    return engine


@pytest.mark.parametrize("layer", [_Counting, pytest.param(_Random, marks=SLOW)])
def test_a_graph_that_does_more_than_compute_is_not_launched_in_vain(
    layer: Callable[[nn.Module], nn.Module], made: Made
) -> None:
    """A second replay would count twice: in a buffer, and in the state of torch's generator."""
    results = []
    for captures in (False, True):
        torch.manual_seed(0)
        engine = with_layer(engine_of(captures=captures), layer)
        parameter = engine.chunks[0].infos[0].parameter
        results.append(train(engine, [batch_of(number) for number in range(CALLS_BEFORE + 3)]))
        parameter.data = 1.5 * parameter.data
        results[-1] += train(engine, [batch_of(6), batch_of(7)])
    assert results[0] == results[1]
    assert [graph.replays for graph in made] == [5]


@SLOW
def test_new_memory_of_a_buffer_counts_from_the_next_step_on(made: Made) -> None:
    """A graph reads the old memory, which stays until the host has looked: the graph may have been launched by then."""
    results = []
    for captures in (False, True):
        engine = with_layer(engine_of(captures=captures), _Counting)
        layer = engine.part.stages[0][1]
        assert isinstance(layer, _Counting)
        results.append(train(engine, [batch_of(number) for number in range(CALLS_BEFORE + 3)]))
        storage = StorageWeakRef(layer.count.untyped_storage())
        layer.count.data = layer.count.data + 30
        if captures:
            made[0].forget()
            assert not storage.expired()
        results[-1] += train(engine, [batch_of(6), batch_of(7)])
    assert results[0] == results[1]


@SLOW
@pytest.mark.parametrize("whole", [True, False])
def test_a_layer_that_is_another_one_in_evaluation_mode_is_in_training_mode_in_each_step(
    whole: bool, made: Made
) -> None:
    results = []
    for captures in (False, True):
        engine = engine_of(captures=captures)
        blocks_of(engine)[0].__class__ = _Merging
        results.append(train(engine, [batch_of(number) for number in range(CALLS_BEFORE + 3)]))
        (engine if whole else blocks_of(engine)[0]).eval()
        results[-1] += train(engine, [batch_of(6), batch_of(7)])
    assert results[0] == results[1]


@SLOW
def test_a_step_with_two_mistakes_has_the_same_error_whether_it_is_replayed_or_not(made: Made) -> None:
    engine = engine_of()
    train(engine, [batch_of(number) for number in range(CALLS_BEFORE + 2)])
    engine.chunks[0].infos[0].parameter.requires_grad_(False)
    for _ in range(2):
        with pytest.raises(ModelError, match="requires_grad"):
            engine.train_step({"input_ids": torch.tensor([[1]])})


@pytest.mark.parametrize("fails", ["early", pytest.param("late", marks=SLOW)])
def test_the_seconds_of_a_step_that_fails_are_those_of_no_later_one(
    fails: str, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph may set the marks anew that such a step has left, and a phase would be negative."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    engine = engine_of()
    train(engine, [batch_of(number) for number in range(CALLS_BEFORE + 2)])
    if fails == "early":
        engine.chunks[0].infos[0].parameter.requires_grad_(False)

    def next_batch() -> None:
        raise OSError

    with pytest.raises(ModelError if fails == "early" else OSError):
        engine.train_step(batch_of(5), next_batch=next_batch)
    now[0] += 1000
    engine.chunks[0].infos[0].parameter.requires_grad_(True)
    assert not any(engine.train_step(batch_of(6, samples=2)).phases.values())


def test_a_setting_of_torch_is_in_the_key_and_a_mode_prevents_replays() -> None:
    code = engine_of().captured_step.code
    usual = code.key()
    assert usual is not None
    cuda = torch.backends.cuda
    settings: list[tuple[Any, str, Any]] = [
        (cuda.matmul, "fp32_precision", "tf32"),  # an older function for it raises an error then
        (cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    ]
    for owner, name, value in settings:
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            assert code.key() not in (usual, None), name
        finally:
            setattr(owner, name, before)
    with sdpa_kernel([SDPBackend.MATH]):
        assert code.key() not in (usual, None)
    modes: list[Any] = [
        torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode(),
        torch.autograd.set_detect_anomaly(True),
        torch.autograd.graph.save_on_cpu(),
        FlopCounterMode(display=False),
        torch.device("meta"),
    ]
    for mode in modes:
        with mode:
            assert code.key() is None, mode
    assert code.key() == usual


# -- no graph after all ------------------------------------------------------------------------------------------------


class _Waiting(nn.Module):
    """A layer that reads a number from the device."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> Any:
        y = self.layer(*inputs)
        assert y.detach().float().sum().item() < 1e9
        return y


def waiting(engine: parallel.Engine) -> parallel.Engine:
    """Return the engine, of whose layers one waits for the device."""
    first, *others = engine.part.stages[0]
    engine.part.stages[0] = (_Waiting(first), *others)
    return engine


@SLOW
@pytest.mark.gpu
def test_a_step_that_waits_for_the_device_runs_as_usual(made: Made, caplog: pytest.LogCaptureFixture) -> None:
    batches = [batch_of(number) for number in range(CALLS_BEFORE + 4)]
    usual, captured = engine_of(captures=False), waiting(engine_of())
    assert train(captured, batches) == train(usual, batches)
    assert_same(captured, usual)
    assert captured.captured_step.problem
    assert not has_graph(captured)
    assert len([record for record in caplog.records if "not captured in a CUDA graph" in record.message]) == 1


@SLOW
def test_a_capture_that_fails_without_a_word_is_not_the_end(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(graph: RerunGraph, function: Callable[[], Any]) -> None:
        function()
        raise RuntimeError

    monkeypatch.setattr(RerunGraph, "capture", capture)
    batches = [batch_of(number) for number in range(CALLS_BEFORE + 3)]
    usual, captured = engine_of(captures=False), engine_of()
    assert train(captured, batches) == train(usual, batches)
    assert captured.captured_step.problem == "RuntimeError"
    assert len(made) == 1


@SLOW
def test_without_room_for_as_much_again_nothing_is_captured(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RerunGraph, "num_bytes", property(lambda graph: 100, lambda graph, size: None), raising=False)
    monkeypatch.setattr(captured_step, "use_of", lambda memory, device: MemoryUse(99))
    batches = [batch_of(number) for number in range(CALLS_BEFORE + 3)]
    usual, captured = engine_of(captures=False), engine_of()
    assert train(captured, batches) == train(usual, batches)
    assert_same(captured, usual)
    assert "not as much is free" in captured.captured_step.problem
    assert len(made) == 1


def test_other_work_gets_the_memory_of_a_graph_if_little_is_free(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of another size, or an evaluation; the step is captured again after it.

    The gradients of the last step, which its update has dropped, keep no part of that memory.
    """
    free = 1000
    monkeypatch.setattr(captured_step, "use_of", lambda memory, device: MemoryUse(free))
    engine = engine_of()
    batches = [batch_of(number) for number in range(2 * CALLS_BEFORE + 1)]
    for work in (lambda: engine.evaluate([batch_of(3)]), lambda: engine.train_step(batch_of(3, samples=2))):
        train(engine, batches)
        made[-1].num_bytes = 500
        work()
        assert has_graph(engine)
        train(engine, batches)
        storages = [StorageWeakRef(x.untyped_storage()) for x in made[-1].memory]
        free = 400
        work()
        assert not has_graph(engine)
        made[-1].forget()
        assert storages
        assert all(storage.expired() for storage in storages)
        free = 1000
    assert len(made) == 2


@SLOW
def test_work_that_needs_more_than_what_is_free_is_done_again_without_the_graph(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A longer step, and an evaluation of a longer sample: without a graph there had been room for them."""
    before = Block.forward

    def forward(block: Block, x: Tensor, batch: Any) -> Tensor:
        if batch.length > LENGTH and has_graph(captured) and block is blocks_of(captured)[1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return before(block, x, batch)

    monkeypatch.setattr(Block, "forward", forward)
    usual, captured = engine_of(captures=False), engine_of()
    found: list[list[Any]] = []
    for engine in (usual, captured):
        found.append(train(engine, [batch_of(number) for number in range(CALLS_BEFORE + 1)]))
        found[-1] += train(engine, [batch_of(7, length=2 * LENGTH)])
        found[-1] += train(engine, [batch_of(number) for number in range(2 * CALLS_BEFORE + 1)])
        found[-1].append(engine.evaluate([batch_of(1), batch_of(2, length=2 * LENGTH)]))
    assert found[0] == found[1]
    assert_same(captured, usual)
    assert [graph.replays for graph in made] == [1, 1]


def test_the_update_after_a_replay_gets_the_memory_if_somebody_has_taken_what_was_free(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a second model. The gradients are still there, and steps are captured again once there is room."""
    free = 1000
    monkeypatch.setattr(captured_step, "use_of", lambda memory, device: MemoryUse(free))
    batches = [batch_of(number) for number in range(3 * CALLS_BEFORE + 4)]
    usual, captured = engine_of(captures=False), engine_of()
    found = train(captured, batches[: CALLS_BEFORE + 1])
    free, made[0].num_bytes = 400, 500
    found += train(captured, batches[CALLS_BEFORE + 1 : CALLS_BEFORE + 2])
    assert not has_graph(captured)
    free = 1000
    found += train(captured, batches[CALLS_BEFORE + 2 :])
    assert found == train(usual, batches)
    assert_same(captured, usual)
    assert [graph.replays for graph in made] == [2, 2]


# -- CUDA's graphs -----------------------------------------------------------------------------------------------------


def distance(one: parallel.Engine, other: parallel.Engine) -> float:
    """Return the distance of the weights of two engines, relative to the norm of all of them."""
    pairs = list(zip(weights(one), weights(other), strict=True))
    squares = sum(float((a - b).double().square().sum()) for a, b in pairs)
    return math.sqrt(squares / sum(float(a.double().square().sum()) for a, _ in pairs))


@SLOW
@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("case", CASES)
def test_replays_of_a_gpu_are_the_steps_that_run_as_usual(case: str) -> None:
    """Twelve steps, with an evaluation and a step of another size in between, have the same bits.

    Where two runs without a graph have not, since attention adds in no certain order, the run with a graph is no more
    than ten times as far from one of them as the other is.
    """
    model, fields, key = CASES[case]
    batches = [
        batch_of(number, key=key, samples=8 if number == 8 and key == "input_ids" else 4) for number in range(12)
    ]
    usual, again, captured = (engine_of(model, captures=captures, **fields) for captures in (False, False, True))
    losses = []
    for engine in (usual, again, captured):
        losses.append(train(engine, batches[:7]))
        losses[-1].append((engine.evaluate([batch_of(50, length=LENGTH // 2)]), None))
        losses[-1] += train(engine, batches[7:])
    assert has_graph(captured), captured.captured_step.problem
    if losses[0] == losses[1] and not distance(usual, again):
        assert losses[2] == losses[0]
        assert_same(captured, usual)
    else:
        assert distance(usual, captured) <= 10 * distance(usual, again)


@SLOW
@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_checkpoint_and_a_step_that_is_left_out_between_replays_of_a_gpu(tmp_path: Path) -> None:
    usual, captured = (engine_of(captures=captures, nonfinite="skip") for captures in (False, True))
    losses = []
    for engine, folder in ((usual, tmp_path / "usual"), (captured, tmp_path / "captured")):
        losses.append(train(engine, [batch_of(number) for number in range(6)]))
        engine.save_checkpoint(folder)
        norm = next(chunk for chunk in engine.chunks if not chunk.spec.is_matrix).infos[0].parameter
        with torch.no_grad():
            norm.fill_(float("inf"))
        assert engine.train_step(batch_of(6)).skipped
        engine.load_checkpoint(folder)
        losses[-1] += train(engine, [batch_of(number) for number in range(6, 12)])
    assert has_graph(captured), captured.captured_step.problem
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0.0)
    assert distance(usual, captured) < 1e-5


@SLOW
@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_work_beside_a_graph_of_a_gpu_sees_no_write_after_it() -> None:
    """It begins before the graph has ended, and reads late; nobody waits for it on the host."""
    device = torch.device("cuda")
    x, seen, y = (torch.zeros(2**20, device=device) for _ in range(3))
    graph = CudaGraph(device)
    graph.capture(lambda: [y.add_(1) for _ in range(1000)])
    torch.cuda.synchronize()
    x.fill_(1)
    graph.replay()
    with graph.beside():
        torch.cuda._sleep(10**8)
        seen.copy_(x)
    x.fill_(2)
    assert seen.unique().tolist() == [1]
    assert y.unique().tolist() == [1000]
    assert not graph.draws


@SLOW
@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("layer", [_Counting, _Random])
def test_a_graph_of_a_gpu_that_does_more_than_compute_is_not_launched_in_vain(
    layer: Callable[[nn.Module], nn.Module],
) -> None:
    states = []
    for captures in (False, True):
        torch.manual_seed(0)
        engine = with_layer(engine_of(captures=captures), layer)
        train(engine, [batch_of(number) for number in range(CALLS_BEFORE + 3)])
        assert has_graph(engine) is captures, engine.captured_step.problem
        parameter = engine.chunks[0].infos[0].parameter
        parameter.data = 1.5 * parameter.data
        train(engine, [batch_of(6), batch_of(7)])
        states.append((torch.cuda.get_rng_state().tolist(), [x.tolist() for x in engine.part.stages[0][1].buffers()]))
    assert states[0] == states[1]


@SLOW
@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_the_memory_of_a_graph_is_that_of_a_step_and_is_given_back() -> None:
    """A graph needs what a step needs, with a tenth for another order of allocations; what it had is free after it."""
    model = dict(name="opt-125m", dropout=0.0)
    engine = engine_of(model, precision="bf16", micro_batch_size=4)
    train(engine, [batch_of(0)])  # the first update makes the moments
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train(engine, [batch_of(number) for number in range(1, CALLS_BEFORE)])
    of_a_step = torch.cuda.max_memory_allocated() - before
    train(engine, [batch_of(number) for number in range(3)])
    assert has_graph(engine), engine.captured_step.problem
    work = engine.captured_step._captured
    assert work is not None
    assert work[1].graph.num_bytes < 1.1 * of_a_step + 2**28  # and the workspaces of libraries
    del work
    reserved = torch.cuda.memory_reserved()
    engine.captured_step.drop()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved - of_a_step / 2


@SLOW
@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_step_of_small_kernels_takes_less_than_half_the_time() -> None:
    """24 layers of hidden size 256: the host needs milliseconds for kernels that take microseconds."""
    model = dict(name="opt-tiny", num_hidden_layers=24, hidden_size=256, dropout=0.0)
    seconds = {}
    for captures in (False, True):
        engine = engine_of(model, captures=captures, precision="bf16", micro_batch_size=4)
        batch = batch_of(1)
        train(engine, [batch] * (CALLS_BEFORE + 3))
        assert has_graph(engine) is captures, engine.captured_step.problem
        times = []
        for _ in range(20):
            begun = time.perf_counter()
            engine.train_step(batch)
            times.append(time.perf_counter() - begun)
        seconds[captures] = statistics.median(times)
    assert seconds[True] < seconds[False] / 2, seconds


@SLOW
@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_the_phases_of_a_replay_are_measured() -> None:
    engine = engine_of(precision="bf16", micro_batch_size=4)
    found = [engine.train_step(batch_of(number)).phases for number in range(CALLS_BEFORE + 6)]
    assert has_graph(engine), engine.captured_step.problem
    for phases in found[-4:]:
        assert phases["forward"] > 0
        assert phases["backward"] > 0
        assert all(seconds >= 0 for seconds in phases.values())
