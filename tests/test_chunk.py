"""Chunks: what is in their buffers, and when their gradients are summed."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.chunk import accumulator
from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import ALIGNMENT, ChunkSpec, ChunkStorage, specs_of
from parallel.layout import sources
from parallel.layout.layout import Layout, ParameterInfo
from parallel.mesh.collectives import Pending, start_all_gather, start_all_reduce
from parallel.mesh.mesh import ALONE, Axis
from parallel.ops.products import write_product
from parallel.optim import chunk_sum, gradients
from parallel.pipeline import runner
from parallel.pipeline.p2p import start_receive, start_send
from parallel.storage.disk import Disk
from parallel.storage.transfer import CopyEvent, Placement, Tier
from tests.harness import run
from tests.parity import SHAPE, Raw, batches_of, config_of, engine_of, share_of


def info_of(name: str, *shape: int, layout: Layout | None = None) -> ParameterInfo:
    parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(len(name))))
    layout = layout or Layout(shape, ((),) * len(shape))
    return ParameterInfo(name, name.split(".")[0], parameter, layout, sources.whole(name, layout.shape))


def test_parameters_become_views_of_one_buffer_and_keep_their_values() -> None:
    infos = [info_of("a.weight", 5, 7), info_of("a.other", 3, 3)]
    values = [info.parameter.detach().clone() for info in infos]
    chunk = Chunk(ChunkSpec(infos, torch.bfloat16))
    assert chunk.size % ALIGNMENT == 0
    for info, value, master in zip(infos, values, chunk.spec.views(chunk.master), strict=True):
        assert torch.equal(master, value)
        assert torch.equal(info.parameter, value.bfloat16())
        assert info.parameter.untyped_storage().data_ptr() == chunk.parameters.whole.untyped_storage().data_ptr()
        assert info.parameter.storage_offset() % ALIGNMENT == 0
    chunk.master.add_(1.0)
    chunk.write_back().wait()
    assert torch.equal(infos[1].parameter, (values[1] + 1).bfloat16())


def test_master_weights_are_the_parameters_themselves_where_both_have_one_dtype() -> None:
    info = info_of("a.weight", 4, 4)
    chunk = Chunk(ChunkSpec([info], torch.float32))
    assert info.parameter.data_ptr() == chunk.master.data_ptr() == chunk.parameters.whole.data_ptr()


def test_parameters_share_a_chunk_where_unit_decay_and_axes_are_the_same() -> None:
    data = Axis("data", 0, 2, (0, 1), None, ALONE.traffic)
    summed = Layout((4, 4), ((), ()), sync=(data,))
    infos = [info_of(name, 4, 4) for name in ("a.v", "a.w", "b.w")]
    infos += [info_of("b.bias", 4), info_of("b.u", 4, 4, layout=summed)]
    names = [[info.name for info in spec.infos] for spec in specs_of(infos, torch.float32)]
    assert names == [["a.v", "a.w"], ["b.w"], ["b.bias"], ["b.u"]]


def test_slices_along_the_first_axis_are_equal_and_cover_the_buffer() -> None:
    for size in (1, 2, 3, 5):
        slices = []
        for rank in range(size):
            axis = Axis("data", rank, size, tuple(range(size)), None, ALONE.traffic)
            info = info_of("a.w", 7, 11, layout=Layout((7, 11), ((), ()), sync=(axis,)))
            spec = ChunkSpec([info], torch.float32)
            slices.append(spec.counted_slice(torch.arange(spec.size)))
        assert len({len(part) for part in slices}) == 1
        assert torch.equal(torch.cat(slices), torch.arange(spec.size))


def events_of_a_gather(rank: int, world_size: int) -> tuple[list[str], bool]:
    """Gather a chunk whose parameters are on the host. Return the events in order, and whether the values are right."""
    axis = Axis("data", rank, world_size, tuple(range(world_size)), dist.group.WORLD, ALONE.traffic)
    info = info_of("a.w", 64, 8, layout=Layout((64, 8), ((), ()), sync=(axis,)))
    want = info.parameter.detach().clone()
    chunk = Chunk(ChunkSpec([info], torch.float32, zero=3), ChunkStorage(Placement(Tier.HOST, Tier.HOST)))
    found: list[str] = []

    @contextmanager
    def uploading() -> Iterator[None]:
        found.append("behind the copy:")
        yield

    def gathered(*given: Any, **options: Any) -> Pending:
        found.append("gather")
        return start_all_gather(*given, **options)

    with (
        patch.object(CopyEvent, "wait", lambda arrival: found.append("wait")),
        patch.object(chunk.memory.copies, "on_upload_stream", uploading),
        patch("parallel.chunk.parameters.start_all_gather", gathered),
    ):
        pending = chunk.gather()
        found.append("compute")
        pending.wait()
    return found, torch.equal(info.parameter, want)


def test_a_chunk_is_uploaded_and_gathered_while_the_device_computes() -> None:
    assert run(events_of_a_gather, 2) == [(["behind the copy:", "gather", "compute"], True)] * 2


PLACEMENTS = [Placement(parameters, states) for parameters in (Tier.DEVICE, Tier.HOST) for states in Tier]


def wrong_after_moves(rank: int, world_size: int, dtype: torch.dtype, zero: int, folder: Path) -> list[str]:
    """Move a chunk from every placement to every other, each time after a gradient has reused the parameters' memory
    where it may. Return the moves after which `sharing` is wrong, or values are.
    """
    axis = Axis("data", rank, world_size, tuple(range(world_size)), dist.group.WORLD, ALONE.traffic)
    info = info_of("a.w", 64, 8, layout=Layout((64, 8), ((), ()), sync=(axis,)))
    values = info.parameter.detach().clone()
    disk = Disk(str(folder), rank, torch.device("cpu"))
    spec = ChunkSpec([info], dtype, zero=zero)
    chunk, wrong = Chunk(spec, ChunkStorage(disk=disk)), []
    want = spec.own_slice(values.flatten())
    for before, after in product(PLACEMENTS, PLACEMENTS):
        for placement in (before, after):
            chunk.gradient.begin(1)
            chunk.store_gradient(torch.zeros_like(chunk.parameters.own))
            chunk.move_to(placement)
            assert chunk.placement == placement
            own, whole = (x.untyped_storage().data_ptr() for x in (chunk.parameters.own, chunk.parameters.whole))
            shared = own == whole, chunk.master.data_ptr() == chunk.parameters.own.data_ptr()
            is_whole = chunk.parameters.is_whole
            if (chunk.sharing.slice_is_view, chunk.sharing.masters_are_slice) != shared or is_whole != shared[0]:
                wrong.append(f"{before} to {after}: {chunk.sharing}, but {shared}")
            chunk.settle()
            if chunk.is_gathered_on_demand:
                chunk.gather().wait()
            if not torch.equal(chunk.master, want) or not torch.equal(info.parameter, values.to(dtype)):
                wrong.append(f"{before} to {after}: other values")
            if chunk.is_gathered_on_demand:
                chunk.release()
    return wrong


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_shares_the_memory_that_its_sharing_names_wherever_it_moves(
    dtype: torch.dtype, zero: int, tmp_path: Path
) -> None:
    assert run(wrong_after_moves, 2, dtype, zero, tmp_path) == [[], []]


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_padding_of_a_new_gradient_is_zero() -> None:
    chunk = Chunk(ChunkSpec([info_of("a.v", 5, 7), info_of("a.w", 3)], torch.float32))
    with fresh_memory_is_nan():
        views = chunk.gradient.accumulator.views()
    for view in views:
        assert view.isnan().all()
        view.zero_()
    assert not chunk.gradient.accumulator.take().any()


def test_a_parameter_that_no_backward_reaches_has_a_gradient_of_zero() -> None:
    infos = [info_of("a.used", 4), info_of("a.unused", 4)]
    chunk = Chunk(ChunkSpec(infos, torch.float32))
    sums = gradients.Gradients([chunk])
    sums.begin(1)
    with fresh_memory_is_nan():
        (infos[0].parameter * 3).sum().backward()
        sums.finish()
    assert chunk.gradient.total is not None
    assert [view.tolist() for view in chunk.spec.views(chunk.gradient.total)] == [[3.0] * 4, [0.0] * 4]


def events_of_a_step(rank: int, world_size: int, raw: Raw) -> list[str]:
    """Return the events of one step in order: a forward, the arrival of a gradient of the token embedding, from the
    head at first and from the lookup at last, and the launch of each chunk's sum over ranks.
    """
    engine, events = engine_of(rank, world_size, raw), []
    units = {chunk.master.numel(): chunk.infos[0].unit for chunk in engine.chunks if chunk.spec.is_matrix}
    engine.part.register_forward_pre_hook(lambda module, inputs: events.append("forward"))

    def started(x: Tensor, axis: Axis, **options: Any) -> Pending:
        if x.numel() in units:
            events.append(f"sum of {units[x.numel()]}")
        return start_all_reduce(x, axis, **options)

    def arrived(info: ParameterInfo, gradient: Tensor) -> None:
        if info.name.endswith("table.weight"):
            events.append("embedding arrives")

    with patch.object(chunk_sum, "start_all_reduce", started), engine.gradients.watching(arrived):
        engine.train_step(share_of(batches_of(1)[0], engine))
    return events


def test_a_chunk_is_summed_during_the_last_backward_and_never_before() -> None:
    raw = config_of({}, model=SHAPE | dict(num_hidden_layers=1), train=dict(micro_batch_size=3))
    first = ["forward", "embedding arrives", "embedding arrives"]
    last = ["forward", "embedding arrives", "sum of layers.0", "embedding arrives", "sum of embed"]
    assert run(events_of_a_step, 2, raw) == [first + last] * 2


def products_of_a_step(rank: int, world_size: int, raw: Raw) -> str:
    """Return the events of one step in order, a letter each: r for a receive that is posted, f for a forward, s for a
    send, p for the product that is the gradient of a weight.
    """
    engine, events = engine_of(rank, world_size, raw), []

    def sent(*arguments: Any) -> Pending:
        events.append("s")
        return start_send(*arguments)

    def received(*arguments: Any) -> Pending:
        events.append("r")
        return start_receive(*arguments)

    def product(*arguments: Tensor) -> None:
        events.append("p")
        write_product(*arguments)

    engine.part.register_forward_pre_hook(lambda module, inputs: events.append("f"))
    with (
        patch.object(runner, "start_send", sent),
        patch.object(runner, "start_receive", received),
        patch.object(accumulator, "write_product", product),
        patch.object(accumulator, "add_product", product),
    ):
        engine.train_step(share_of(batches_of(1)[0], engine))
    return "".join(events)


def test_gradients_of_weights_are_computed_after_the_gradient_for_the_stage_before_is_sent() -> None:
    """There are three microbatches, and a block of four linears on each of three stages. With recomputation products
    are not deferred, since that would keep what was recomputed. Nothing is received before it is needed: on a GPU, a
    receive that waits takes multiprocessors from computation.
    """
    model = SHAPE | dict(num_hidden_layers=3)
    pipe = dict(pipeline=dict(size=3, layers=[1, 1, 1]))
    first, middle, last = run(products_of_a_step, 3, config_of(pipe, model=model))
    assert first == "fs" * 3 + "rpppp" * 3
    assert middle == "rfs" * 2 + "rspppp" + "rfs" + "rspppp" * 2  # two forwards, then a backward and a forward in turn
    assert last == "rfspppp" * 3
    *_, last = run(products_of_a_step, 3, config_of(pipe, model=model, train=dict(activation_checkpointing="full")))
    assert last == "rfpppps" * 3
