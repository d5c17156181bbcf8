"""Flat buffers of parameters: what lies in them, and when their gradients travel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk, make_chunks
from parallel.chunk.spec import ALIGNMENT, ChunkStorage
from parallel.layout.layout import Layout, ParameterInfo
from parallel.mesh.collectives import Pending, start_all_gather, start_all_reduce
from parallel.mesh.mesh import ALONE, Axis
from parallel.ops.products import write_product
from parallel.optim import gradients
from parallel.pipeline import runner
from parallel.pipeline.p2p import start_receive, start_send
from parallel.storage.transfer import CopyEvent, Placement, Tier
from tests.harness import run
from tests.parity import SHAPE, Raw, batches_of, config_of, engine_of, share_of


def info_of(name: str, *shape: int, layout: Layout | None = None) -> ParameterInfo:
    parameter = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(len(name))))
    return ParameterInfo(name, name.split(".")[0], parameter, layout or Layout(shape, ((),) * len(shape)), (name,))


def test_parameters_become_views_of_one_buffer_and_keep_their_values() -> None:
    infos = [info_of("a.weight", 5, 7), info_of("a.other", 3, 3)]
    values = [info.parameter.detach().clone() for info in infos]
    chunk = Chunk(infos, torch.bfloat16)
    assert chunk.size % ALIGNMENT == 0
    for info, value, master in zip(infos, values, chunk.views(chunk.master), strict=True):
        assert torch.equal(master, value)
        assert torch.equal(info.parameter, value.bfloat16())
        assert info.parameter.untyped_storage().data_ptr() == chunk.parameters.untyped_storage().data_ptr()
        assert info.parameter.storage_offset() % ALIGNMENT == 0
    chunk.master.add_(1.0)
    chunk.write_back().wait()
    assert torch.equal(infos[1].parameter, (values[1] + 1).bfloat16())


def test_masters_wide_enough_are_the_parameters_themselves() -> None:
    info = info_of("a.weight", 4, 4)
    chunk = Chunk([info], torch.float32)
    assert info.parameter.data_ptr() == chunk.master.data_ptr() == chunk.parameters.data_ptr()


def test_chunks_part_by_unit_decay_and_axes() -> None:
    data = Axis("data", 0, 2, (0, 1), None, ALONE.traffic)
    summed = Layout((4, 4), ((), ()), sync=(data,))
    infos = [info_of(name, 4, 4) for name in ("a.v", "a.w", "b.w")]
    infos += [info_of("b.bias", 4), info_of("b.u", 4, 4, layout=summed)]
    names = [[info.name for info in chunk.infos] for chunk in make_chunks(infos, torch.float32)]
    assert names == [["a.v", "a.w"], ["b.w"], ["b.bias"], ["b.u"]]


def test_slices_along_the_first_axis_are_equal_and_cover_the_buffer() -> None:
    for size in (1, 2, 3, 5):
        slices = []
        for rank in range(size):
            axis = Axis("data", rank, size, tuple(range(size)), None, ALONE.traffic)
            chunk = Chunk([info_of("a.w", 7, 11, layout=Layout((7, 11), ((), ()), sync=(axis,)))], torch.float32)
            slices.append(chunk.own_slice(torch.arange(chunk.size)))
        assert len({len(part) for part in slices}) == 1
        assert torch.equal(torch.cat(slices), torch.arange(chunk.size))


def waited(rank: int, world_size: int) -> tuple[list[str], bool]:
    """What happens, in order, when a chunk is made whole that is at home on the host; and whether it is."""
    axis = Axis("data", rank, world_size, tuple(range(world_size)), dist.group.WORLD, ALONE.traffic)
    info = info_of("a.w", 64, 8, layout=Layout((64, 8), ((), ()), sync=(axis,)))
    want = info.parameter.detach().clone()
    chunk = Chunk([info], torch.float32, zero=3, home=ChunkStorage(Placement(Tier.HOST, Tier.HOST)))
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
        patch.object(chunk.copies, "uploading", uploading),
        patch("parallel.chunk.chunk.start_all_gather", gathered),
    ):
        pending = chunk.gather()
        found.append("compute")
        pending.wait()
    return found, torch.equal(info.parameter, want)


def test_a_chunk_comes_up_and_is_gathered_while_the_device_computes() -> None:
    assert run(waited, 2) == [(["behind the copy:", "gather", "compute"], True)] * 2


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty gives
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_padding_of_a_new_gradient_is_zero() -> None:
    chunk = Chunk([info_of("a.v", 5, 7), info_of("a.w", 3)], torch.float32)
    with fresh_memory_is_nan():
        views = chunk.make_gradient(torch.float32)
    for view in views:
        assert view.isnan().all()
        view.zero_()
    assert chunk.gradient is not None
    assert not chunk.gradient.any()


def test_a_parameter_that_no_backward_reaches_has_a_gradient_of_zero() -> None:
    infos = [info_of("a.used", 4), info_of("a.unused", 4)]
    chunk = Chunk(infos, torch.float32)
    sums = gradients.Gradients([chunk])
    sums.begin(1)
    with fresh_memory_is_nan():
        (infos[0].parameter * 3).sum().backward()
        sums.finish()
    assert chunk.gradient is not None
    assert [view.tolist() for view in chunk.views(chunk.gradient)] == [[3.0] * 4, [0.0] * 4]


def events_of_a_step(rank: int, world_size: int, raw: Raw) -> list[str]:
    """What happens in one step, in order: a forward and a gradient of the token embedding, the last to arrive, and the
    start of each chunk's sum over ranks.
    """
    engine, events = engine_of(rank, world_size, raw), []
    units = {chunk.master.numel(): chunk.infos[0].unit for chunk in engine.chunks if chunk.is_matrix}
    embedding = next(info for info in engine.stage.infos if info.name.endswith("embed_tokens.weight"))
    embedding.parameter.register_hook(lambda gradient: events.append("embedding arrives"))
    engine.stage.register_forward_pre_hook(lambda module, inputs: events.append("forward"))

    def started(x: Tensor, axis: Axis, **options: Any) -> Pending:
        if x.numel() in units:
            events.append(f"sum of {units[x.numel()]}")
        return start_all_reduce(x, axis, **options)

    with patch.object(gradients, "start_all_reduce", started):
        engine.train_step(share_of(batches_of(1)[0], engine))
    return events


def test_a_chunk_is_summed_while_the_last_backward_goes_on_and_never_before() -> None:
    raw = config_of({}, model=SHAPE | dict(num_hidden_layers=1), train=dict(micro_batch_size=3))
    assert (
        run(events_of_a_step, 2, raw)
        == [["forward", "embedding arrives", "forward", "sum of layers.0", "embedding arrives", "sum of embed"]] * 2
    )


def products_of_a_step(rank: int, world_size: int, raw: Raw) -> str:
    """What happens in one step, in order: a receive posted, a forward, a send, the product of a weight's gradient."""
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

    engine.stage.register_forward_pre_hook(lambda module, inputs: events.append("f"))
    with (
        patch.object(runner, "start_send", sent),
        patch.object(runner, "start_receive", received),
        patch.object(gradients, "write_product", product),
        patch.object(gradients, "add_product", product),
    ):
        engine.train_step(share_of(batches_of(1)[0], engine))
    return "".join(events)


def test_weights_have_their_gradients_once_the_stage_before_has_its_own() -> None:
    """Three microbatches, and on each of three stages a block of four linears. What is recomputed is not kept. Nothing
    is received before it is needed: what waits on a GPU takes from what computes.
    """
    model = SHAPE | dict(num_hidden_layers=3)
    pipe = dict(pipeline=dict(size=3, layers=[1, 1, 1]))
    first, middle, last = run(products_of_a_step, 3, config_of(pipe, model=model))
    assert first == "fs" * 3 + "rpppp" * 3
    assert middle == "rfs" * 2 + "rspppp" + "rfs" + "rspppp" * 2  # two forwards, then a backward and a forward in turn
    assert last == "rfspppp" * 3
    *_, last = run(products_of_a_step, 3, config_of(pipe, model=model, train=dict(activation_checkpointing="full")))
    assert last == "rfpppps" * 3
