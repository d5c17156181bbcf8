"""The host is ahead of its GPU: a step waits for it once, and what it does between two steps takes little time."""

import statistics
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import models
import parallel
from models.build import have_kernels
from models.shape import ModelShape
from models.shapes import resolve, shape_of
from parallel.chunk.parameters import ParameterBuffer
from parallel.chunk.user_writes import UserWrites
from parallel.chunk.writes import Writes
from parallel.config import Config
from parallel.modules.parameters import OriginalParameters
from parallel.ops.kernels import table
from parallel.storage.transfer import ON_DEVICE, HostCopy, Placement, Tier, to_device
from parallel.tensor.norms import LayerNorm
from training.batch_ahead import BatchAhead
from training.metrics import Meter

CUDA = torch.device("cuda")
MODEL = dict(name="opt-tiny", num_hidden_layers=2, dropout=0.0)


def engine_of(**train: Any) -> parallel.Engine:
    """Return an engine of a small model on the device of this machine, after one step."""
    raw = dict(model=MODEL, data=dict(sequence_length=16), train=dict(global_batch_size=2, micro_batch_size=2) | train)
    context = parallel.launch_from_torch(raw, resolve=resolve)
    engine = parallel.Engine(models.build(context), context)
    engine.train_step(batch())
    return engine


def batch() -> dict[str, torch.Tensor]:
    """Return a batch of two samples."""
    return {"input_ids": torch.arange(32).view(2, 16) + 4}


@pytest.mark.gpu
def test_a_step_waits_for_its_device_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the number of writes into parameters, counted before its forward, and for loss and norm."""
    engine = engine_of()
    waits: list[int] = []
    wait = HostCopy.wait

    def counted(copy: HostCopy) -> torch.Tensor:
        waits.append(copy._copy.numel())
        return wait(copy)

    monkeypatch.setattr(HostCopy, "wait", counted)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        engine.train_step(batch())
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    assert waits == [1, 2]


class Labelled(Tensor):
    """A tensor of a user's own class."""


def read_only() -> Tensor:
    values = np.arange(12.0).reshape(3, 4)
    values.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch cannot mark its tensor
        return torch.from_numpy(values)


GIVEN: dict[str, Callable[[], Tensor]] = {
    "expanded": lambda: torch.arange(4).expand(3, -1),
    "a number for all": lambda: torch.tensor(2.0).expand(3, 4),
    "transposed": lambda: torch.rand(4, 3).t(),
    "images": lambda: torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "every second column": lambda: torch.rand(3, 8)[:, ::2],
    "overlapping windows": lambda: torch.rand(10).unfold(0, 4, 2),
    "a scalar": lambda: torch.tensor(3),
    "empty": lambda: torch.empty(0, 4),
    "conjugated": lambda: torch.rand(3, 4, dtype=torch.complex64).conj(),
    "read-only": read_only,
    "of a subclass": lambda: torch.rand(3, 4).as_subclass(Labelled),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)], layout=torch.jagged),
}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Return a GPU. Without one, tensors stay where they are, and are pinned with torch's own operations."""

    def pinned(x: Tensor) -> Tensor:
        assert x.layout == torch.strided, "not every version of torch can pin it"
        storage = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).untyped_storage()
        return x.new_empty(0).set_(storage, 0, x.shape, x.stride()).copy_(x)

    def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x if args == (CUDA,) else there(x, *args, **kwargs)

    there = Tensor.to
    if not torch.cuda.is_available():
        monkeypatch.setattr(Tensor, "pin_memory", pinned)
        monkeypatch.setattr(Tensor, "to", to)
    return CUDA


@pytest.mark.parametrize("case", GIVEN)
def test_a_tensor_of_any_strides_is_copied_to_the_device(case: str, cuda: torch.device) -> None:
    """Its elements may share memory on the host. Strides without gaps stay: kernels of images depend on them."""
    x = GIVEN[case]()
    moved = to_device(x, cuda)
    assert type(moved) is type(x)
    for one, other in zip(x.unbind(), moved.unbind(), strict=True) if x.is_nested else [(x, moved)]:
        torch.testing.assert_close(other.cpu(), one, rtol=0.0, atol=0.0)
    if case in ("transposed", "images"):
        assert moved.stride() == x.stride()


def test_the_gradient_of_an_expanded_input_comes_back_from_the_device(cuda: torch.device) -> None:
    x = torch.rand(4, requires_grad=True)
    to_device(x.expand(3, -1), cuda).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3.0] * 4


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_host_that_trains_opt_125m_waits_for_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that waits for the loss is ahead of its GPU, which then has no gap in which it waits for the host.

    Half of the steps at least: the host is shared with others.
    """
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("a batch of 32 needs a larger GPU")
    raw = dict(
        model=dict(name="opt-125m", dropout=0.0),
        data=dict(sequence_length=1024),
        train=dict(global_batch_size=32, micro_batch_size=32, precision="bf16"),
    )
    context = parallel.launch_from_torch(raw, resolve=resolve)
    engine = parallel.Engine(models.build(context), context)
    given = {"input_ids": torch.randint(4, 50_000, (32, 1024))}
    waits: list[float] = []
    wait = HostCopy.wait

    def timed(copy: HostCopy) -> torch.Tensor:
        begun = time.perf_counter()
        found = wait(copy)
        waits.append(time.perf_counter() - begun)
        return found

    for _ in range(5):
        engine.train_step(given)
    monkeypatch.setattr(HostCopy, "wait", timed)
    begun = time.perf_counter()
    for _ in range(20):
        engine.train_step(given)
    step = (time.perf_counter() - begun) / 20
    assert len(waits) == 40, "a step waits twice"
    assert statistics.median(waits[1::2]) > step / 100, (statistics.median(waits[1::2]), step)


def test_parameters_are_compared_one_by_one_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at hundreds of parameters would take milliseconds, for which a GPU that has updated waits."""
    engine = engine_of()
    looks: list[str] = []
    first_change, shows = OriginalParameters._first_change, ParameterBuffer.shows

    def shown(buffer: ParameterBuffer, parameter: nn.Parameter) -> bool:
        looks.append("parameter")
        return shows(buffer, parameter)

    def changed(original: OriginalParameters) -> str:
        looks.append("tree")
        return first_change(original)

    monkeypatch.setattr(ParameterBuffer, "shows", shown)
    monkeypatch.setattr(OriginalParameters, "_first_change", changed)
    engine.train_step(batch())
    assert not looks
    weight = next(engine.module.parameters())
    weight.data = weight.detach().clone()
    engine.train_step(batch())
    assert "parameter" in looks


@pytest.mark.parametrize("change", ["another name", "another parameter", "one more"])
def test_a_change_of_the_tree_is_refused(change: str) -> None:
    engine = engine_of()
    module: Any = next(part for part in engine.module.modules() if isinstance(part, LayerNorm))
    if change == "another name":
        weight, bias = module._parameters.pop("weight"), module._parameters.pop("bias")
        module._parameters.update(other=weight, bias=bias)
    if change == "another parameter":
        module.weight = nn.Parameter(module.weight.detach().clone())
    if change == "one more":
        module.more = nn.Parameter(torch.zeros(1))
    found = ""
    try:
        engine.train_step(batch())
    except (parallel.ModelError, AttributeError) as error:  # the latter is of a layer whose weight has another name
        found = str(error)
    assert "is not the parameter it was" in found


@pytest.mark.parametrize("is_made", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp8"])
def test_a_frozen_parameter_of_a_split_model_is_refused(precision: str, is_made: bool) -> None:
    """Its gradient would be computed all the same, and its momentum would move it."""
    train = dict(global_batch_size=2, precision=precision, fp8_min_elements=0)
    raw = dict(model=MODEL, data=dict(sequence_length=16), train=train)
    context = parallel.launch_from_torch(raw, resolve=resolve)
    part = models.build(context)
    engine = parallel.Engine(part, context) if is_made else None
    for name in ("layers.1.attention.qkv.weight", "head.norm.bias"):
        next(info for info in part.infos if info.name == name).parameter.requires_grad_(False)
    found = ""
    try:
        (engine or parallel.Engine(part, context)).train_step(batch())
    except parallel.ModelError as error:
        found = str(error)
    assert "requires_grad is False of layers.1.attention.qkv.weight, head.norm.bias. Leave it True." in found


@pytest.mark.slow
def test_a_parameter_that_an_optimizer_is_not_given_keeps_its_value() -> None:
    """The refusal of frozen parameters says that it does."""
    raw = dict(model=MODEL, data=dict(sequence_length=16), train=dict(global_batch_size=2, precision="bf16"))
    context = parallel.launch_from_torch(raw, resolve=resolve)
    part = models.build(context)
    others = list(part.parameters())[1:]
    engine = parallel.Engine(part, context, torch.optim.AdamW(others, lr=1e-2))
    before = [x.clone() for x in part.parameters()]
    engine.train_step(batch())
    assert [torch.equal(x, y) for x, y in zip(part.parameters(), before, strict=True)] == [True] + [False] * len(others)


def test_a_parameter_that_is_transposed_in_its_own_memory_has_been_written() -> None:
    """Its address and its shape are those that it had."""
    engine, other = engine_of(), engine_of()
    square, same = (
        next(x for x in e.module.parameters() if x.ndim == 2 and x.shape[0] == x.shape[1]) for e in (engine, other)
    )
    square.data = square.data.t()
    with torch.no_grad():
        same.copy_(same.t().clone())
    assert engine.train_step(batch()) == other.train_step(batch())
    torch.testing.assert_close(square, same, rtol=0, atol=0)


def test_a_chunk_that_has_been_moved_to_the_device_is_watched_from_then_on() -> None:
    """Fingerprints are noted before a plan moves chunks, and those of parameters on the host are not."""
    engine = engine_of()
    chunk = next(chunk for chunk in engine.chunks if not chunk.spec.is_matrix)
    engine.optimizer.move(chunk, Placement(Tier.HOST, Tier.HOST))
    engine.writes.note()
    engine.optimizer.move(chunk, ON_DEVICE)
    engine.writes.note_moved()
    assert not engine.writes.changed().item()
    chunk.infos[0].parameter.data.add_(1)  # torch's count of writes does not show it
    assert engine.writes.changed().item()


def test_a_part_of_a_model_in_evaluation_mode_is_in_training_mode_in_a_step() -> None:
    engine = engine_of()
    modules = list(engine.module.modules())
    for module in (modules[-1], engine.module):
        module.eval()
        engine.train_step(batch())
        assert all(module.training for module in modules)


@pytest.mark.parametrize(
    ("device", "dtype", "compiles"),
    [("cuda", torch.bfloat16, False), ("cuda", torch.float64, True), ("cpu", torch.bfloat16, True)],
)
def test_blocks_that_have_kernels_are_not_compiled_to_train(
    device: str, dtype: torch.dtype, compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's compiler makes slower kernels than those in the table; a GPU without Triton has none of these."""
    context: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
    monkeypatch.setattr(table, "has_triton", lambda: True)
    assert have_kernels(context, 768) is not compiles
    monkeypatch.setattr(table, "has_triton", lambda: False)
    assert not have_kernels(context, 768)


# -- between the loss of a step and the next step ----------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Notes the operations that torch dispatches, without views, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and "view" not in function._schema.name:
            self.names.append(function._schema.name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_a_batch_goes_to_a_device_by_one_copy(micro_batch_size: int) -> None:
    """However many tensors and microbatches it has: each launch takes a GPU as long as some layer's kernels."""
    engine = engine_of(micro_batch_size=micro_batch_size)
    mask, documents = torch.ones(2, 16, dtype=torch.int64), torch.arange(16).div(5).long().expand(2, -1)
    mask[0, 12:] = 0
    given = batch() | dict(attention_mask=mask, document_ids=documents, position_ids=torch.arange(16).expand(2, -1))
    given["labels"] = given["input_ids"] + 1
    staged, _ = engine.batches.staged(given, engine.num_samples)
    with Launches() as launches:
        moved = staged.on(torch.device("cpu"), copied=True)
        staged.copy_to(moved)
        microbatches = moved.microbatches
    assert launches.names == ["aten::_to_copy", "aten::copy_"]
    assert len(microbatches) == 2 // micro_batch_size
    for name in ("input_ids", "attention_mask", "position_ids"):
        torch.testing.assert_close(torch.cat([getattr(one, name) for one in microbatches]), given[name], rtol=0, atol=0)
    labels = torch.cat([one.labels for one in microbatches])
    torch.testing.assert_close(labels[:, :-1], given["labels"][:, 1:], rtol=0, atol=0)
    assert labels[:, -1].tolist() == [-100, -100]
    places = [x.data_ptr() - moved.memory.data_ptr() for x in moved.whole.tensors]
    assert not any(place % 16 for place in places)


def test_a_step_looks_once_whether_parameters_are_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of()
    looks: list[ParameterBuffer] = []
    shows_all = ParameterBuffer.shows_all

    def shown(buffer: ParameterBuffer) -> bool:
        looks.append(buffer)
        return bool(shows_all.__get__(buffer))

    monkeypatch.setattr(ParameterBuffer, "shows_all", property(shown))
    engine.train_step(batch())
    assert looks == [chunk.parameters for chunk in engine.chunks]


def test_a_program_in_which_nobody_writes_looks_at_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a device asked whether somebody has written into one."""
    engine = engine_of()
    engine.writes.stop()
    monkeypatch.setattr(ParameterBuffer, "shows_all", property(lambda buffer: pytest.fail("it has looked")))
    monkeypatch.setattr(Writes, "changed", lambda writes: pytest.fail("it has asked"))
    monkeypatch.setattr(UserWrites, "is_any", lambda writes: pytest.fail("it has looked"))
    engine.train_step(batch())


def test_the_batch_of_the_next_step_is_read_while_the_device_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, events = engine_of(), list[str]()
    update, wait = type(engine)._update, HostCopy.wait

    def updated(*args: Any) -> None:
        update(*args)
        events.append("update is launched")

    def waited(copy: HostCopy) -> torch.Tensor:
        events.append(f"wait for {copy._copy.numel()} in {engine.stopwatch.phase}")
        return wait(copy)

    monkeypatch.setattr(type(engine), "_update", updated)
    monkeypatch.setattr(HostCopy, "wait", waited)

    def read() -> None:
        events.append(f"sample {engine.num_samples} in {engine.stopwatch.phase}")

    engine.train_step(batch(), next_batch=read)
    assert events == ["wait for 1 in update", "update is launched", "sample 4 in data", "wait for 2 in update"]


def test_a_step_whose_user_raises_an_error_meanwhile_is_counted() -> None:
    """Its update has been launched: a checkpoint of these weights with the counts before it would train them again."""
    engine = engine_of()
    with pytest.raises(OSError, match="no next batch"):
        engine.train_step(batch(), next_batch=Mock(side_effect=OSError("no next batch")))
    assert (engine.num_steps, engine.num_updates, engine.num_samples) == (2, 2, 4)


def test_a_batch_that_cannot_be_read_ahead_is_read_by_the_step_that_needs_it() -> None:
    reads: list[int] = []

    def training(first: int) -> dict[str, torch.Tensor]:
        reads.append(first)
        if reads.count(first) == 1 and first == 8:
            raise OSError("the file system is away")
        return {"first": torch.tensor(first)}

    loader: Any = SimpleNamespace(training=training)
    batches = BatchAhead(loader)
    assert batches.take(0)["first"] == 0
    batches.read(4)
    assert batches.take(4)["first"] == 4
    batches.read(8)
    assert batches.take(8)["first"] == 8
    batches.read(12)
    assert batches.take(16)["first"] == 16  # not those of another step
    assert reads == [0, 4, 8, 8, 12, 16]


def test_the_metrics_of_a_step_read_no_config_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing the model's section took the host longer than all else between two steps."""
    engine, parsed = engine_of(), list[Config]()

    def shape(config: Config) -> ModelShape:
        parsed.append(config)
        return shape_of(config)

    monkeypatch.setattr("training.metrics.shape_of", shape)
    meter = Meter(engine.config, 1, engine.mesh.device)
    result = engine.train_step(batch())
    lines = [meter.line(step, result, 0.5, samples=2 * step) for step in (1, 2)]
    assert lines[0]["tflops"] == lines[1]["tflops"] > 0
    assert len(parsed) == 1
