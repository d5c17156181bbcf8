"""An update of offloaded states that goes on while the next forward begins: every layer gets its updated parameters."""

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import ChunkSpec, ChunkStorage
from parallel.config import OptimizerConfig
from parallel.layout import sources
from parallel.layout.layout import Layout, ParameterInfo
from parallel.mesh.mesh import ALONE
from parallel.modules.full_parameters import WholeChunk
from parallel.optim import launch_queue, shared_update, streaming
from parallel.optim.adamw import AdamW
from parallel.optim.shared_update import SharedUpdate
from parallel.placement.plan_state import PlanLifecycle
from parallel.storage.transfer import ON_DEVICE, CopyEvent, Placement, Tier
from parallel.zero.gatherer import Unit
from tests.parity import batches_of, engine_of, share_of
from tests.test_placement import raw_of

ON_HOST = Placement(Tier.HOST, Tier.HOST)
DEVICE = torch.device("cuda" if torch.cuda.device_count() else "cpu")
SHAPE, LAYERS = (512, 256), 6


def chunk_in(unit: str, index: int, placement: Placement) -> Chunk:
    """Return a chunk of a matrix in bf16, with master weights in fp32."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(index)) * 0.02
    layout = Layout(SHAPE, ((), ()), sync=(ALONE,))
    name = f"{unit}.weight"
    info = ParameterInfo(name, unit, nn.Parameter(weight.to(DEVICE)), layout, sources.whole(name, SHAPE))
    return Chunk(ChunkSpec([info], torch.bfloat16), ChunkStorage(placement))


def parameters_after_updates(
    placement: Placement, share: float, *, waits: bool, moments: Literal["fp32", "bf16"]
) -> list[Tensor]:
    """Return the parameters of all chunks as a forward finds them after each of some updates, and at last the states.

    `waits`: each update is waited for. The last chunk is of the root.
    """
    chunks = [chunk_in(f"layers.{i}", i, placement) for i in range(LAYERS)]
    chunks[-1].is_of_root = True
    optimizer = AdamW(chunks, OptimizerConfig(state_dtype=moments))
    optimizer.host_share = share
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(4):
        for chunk in chunks:
            chunk.gradient.begin(1)
            chunk.store_gradient(torch.randn(chunk.size, generator=generator).to(DEVICE, torch.bfloat16))
        optimizer.step(torch.tensor(0.5, dtype=torch.float64, device=DEVICE), 1e-3)
        if waits:
            for chunk in chunks:
                chunk.settle()
        for chunk in [chunks[-1], *chunks[:-1]]:
            if not chunk.is_gathered_on_demand:
                found.append(chunk.parameters.whole.clone())
                continue
            chunk.gather().wait()
            found.append(chunk.parameters.whole.clone())
            chunk.release()
    return [*found, *(piece.data.clone() for pieces in optimizer.pieces().values() for piece in pieces)]


@pytest.mark.gpu
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_forward_that_does_not_wait_for_an_update_finds_what_it_has_written(
    share: float, moments: Literal["fp32", "bf16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are smaller than chunks, so that one chunk may be updated on both sides. The host is the slower side."""
    in_place = shared_update.update_in_place

    def slowly(*given: object) -> float:
        time.sleep(0.02)
        return in_place(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(shared_update, "update_in_place", slowly)
    monkeypatch.setattr(streaming, "PART", 2**15)
    monkeypatch.setattr(shared_update, "HOST_PART", 2**13)
    of = partial(parameters_after_updates, share=share, moments=moments)
    found, want = of(ON_HOST, waits=False), of(ON_HOST, waits=True)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    if not share:
        on_device = of(ON_DEVICE, waits=True)
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, on_device, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("root", [0, 1])
def test_a_forward_begins_while_the_host_updates_later_layers(root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread waits for a flag that is set when the root has been gathered: the root streams, wherever it is."""
    flag = threading.Event()
    in_place = shared_update.update_in_place

    def later(*given: object) -> float:
        assert flag.wait(20), "a forward waits for the host"
        time.sleep(0.1)  # who reads the states by then does not wait for them
        return in_place(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(shared_update, "update_in_place", later)
    chunks = [chunk_in(f"layers.{i}", i, ON_HOST) for i in range(2)]
    chunks[root].is_of_root = True
    optimizer = AdamW(chunks, OptimizerConfig())
    optimizer.host_share = 0.5
    for chunk in chunks:
        chunk.gradient.begin(1)
        chunk.store_gradient(torch.ones(chunk.size, device=DEVICE, dtype=torch.bfloat16))
    before = [chunk.master.clone() for chunk in chunks]
    optimizer.step(torch.tensor(1.0, device=DEVICE), 1e-3)
    chunks[root].gather().wait()
    assert not torch.equal(chunks[root].parameters.whole.cpu(), before[root].bfloat16()), "the root is as before"
    flag.set()
    for chunk, masters in zip(chunks, before, strict=True):
        chunk.settle()
        assert not (chunk.master == masters).any(), "an element has not been updated yet"


@pytest.mark.parametrize("placement", [Placement(Tier.DEVICE, Tier.HOST), ON_HOST], ids=["states", "all"])
def test_a_host_buffer_is_freed_after_the_update_that_reads_it(placement: Placement) -> None:
    """Its gradient was of several microbatches, in fp32, and that of the next step is of one, in bf16. The update of
    that step may begin only now on a device: it was given copies from a buffer that nobody kept.
    """
    chunk, alive = chunk_in("layers.0", 0, placement), list[bool]()
    chunk.gradient.begin(2)
    chunk.store_gradient(torch.ones(chunk.size, device=DEVICE))
    chunk.settle()
    assert chunk.gradient.host_buffer is not None
    before = weakref.ref(chunk.gradient.host_buffer)
    chunk.gradient.drop()
    chunk.gradient.begin(1)
    with patch.object(CopyEvent, "synchronize", lambda event: alive.append(before() is not None)):
        chunk.store_gradient(torch.ones(chunk.size, device=DEVICE, dtype=torch.bfloat16))
    chunk.settle()
    assert alive == [True]
    assert before() is None


class Updated:
    """An optimizer and chunks on the host of four parts each, after its first update, as far as that is launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, ahead: int, share: float = 0.0) -> None:
        monkeypatch.setattr(streaming, "PART", 2**15)
        monkeypatch.setattr(launch_queue, "AHEAD", ahead)
        self.chunks = [chunk_in(f"layers.{i}", i, ON_HOST) for i in range(LAYERS)]
        self.chunks[-1].is_of_root = True
        self.optimizer = AdamW(self.chunks, OptimizerConfig())
        self.optimizer.host_share = share
        self._before = [chunk.master.clone() for chunk in self.chunks]
        self.step()

    def step(self) -> None:
        for chunk in self.chunks:
            chunk.gradient.begin(1)
            chunk.store_gradient(torch.ones(chunk.size, device=DEVICE, dtype=torch.bfloat16))
        self.optimizer.step(torch.tensor(1.0, device=DEVICE), 1e-3)

    def num_launched(self) -> list[int]:
        """Return the number of parts of each chunk that an update has changed, without waiting for any other."""
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        pairs = zip(self.chunks, self._before, strict=True)
        return [int((c.master.cpu() != x.cpu()).view(-1, 2**15).all(1).sum()) for c, x in pairs]

    def has_changed(self, masters: list[Tensor]) -> list[bool]:
        """Return of each chunk whether its master weights are others, without waiting for any."""
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return [not torch.equal(chunk.master, x) for chunk, x in zip(self.chunks, masters, strict=True)]


@pytest.mark.gpu
def test_parts_are_launched_when_their_layer_is_gathered_and_a_few_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root, here the last chunk, is launched at once. One queue of a GPU has the copies of all streams from the
    host: the first layer's parameters would arrive after the whole update if all of it were launched before.
    """
    updated = Updated(monkeypatch, ahead=5)
    assert updated.num_launched() == [4, 1, 0, 0, 0, 4]
    updated.chunks[-1].gather().wait()
    assert updated.num_launched() == [4, 1, 0, 0, 0, 4]
    updated.chunks[0].gather().wait()
    assert updated.num_launched() == [4, 4, 1, 0, 0, 4]
    updated.chunks[2].gather().wait()
    assert updated.num_launched() == [4, 4, 4, 4, 1, 4]
    updated.chunks[1].gather().wait()
    assert updated.num_launched() == [4, 4, 4, 4, 1, 4]
    updated.chunks[3].gather().wait()
    assert updated.num_launched() == [4] * LAYERS


@pytest.mark.gpu
def test_a_layer_on_the_device_waits_for_its_update_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer's parameters may be read between two steps: its update has been launched by then."""
    updated = Updated(monkeypatch, ahead=0)
    for chunk in updated.chunks:
        updated.optimizer.move(chunk, Placement(Tier.DEVICE, Tier.HOST))
        chunk.is_private = chunk is not updated.chunks[1]
    masters = [chunk.master.clone() for chunk in updated.chunks]
    updated.step()
    assert updated.has_changed(masters) == [False, True, False, False, False, True]
    Unit([updated.chunks[2]]).make_whole()
    assert updated.has_changed(masters) == [True, True, True, False, False, True]
    for i in (1, 2, 5):
        chunk = updated.chunks[i]
        assert torch.equal(chunk.parameters.whole.cpu(), chunk.master.bfloat16())
    assert torch.equal(updated.chunks[3].parameters.whole.cpu(), masters[3].bfloat16())


def move(updated: Updated, chunk: Chunk) -> None:
    updated.optimizer.move(chunk, ON_DEVICE)


READERS: dict[str, Callable[[Updated, Chunk], object]] = {
    "a gather": lambda updated, chunk: chunk.gather().wait(),
    "a settled chunk": lambda updated, chunk: chunk.settle(),
    "the next gradient": lambda updated, chunk: chunk.store_gradient(torch.zeros(chunk.size, device=DEVICE)),
    "a checkpoint": lambda updated, chunk: updated.optimizer.pieces(),
    "another placement": move,
    "values of a user": lambda updated, chunk: chunk.take_written(),
    "whole parameters": lambda updated, chunk: WholeChunk.of(chunk),
    "the times of both sides": lambda updated, chunk: updated.optimizer.balance(),
    "the next update": lambda updated, chunk: updated.optimizer._shared.finish(),
}


@pytest.mark.gpu
@pytest.mark.parametrize("reader", READERS)
def test_whoever_reads_a_layer_has_its_update_launched(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gather launches it within inference mode. Half of the third chunk is updated by the host."""
    updated = Updated(monkeypatch, ahead=0, share=10.5 / (4 * LAYERS))
    assert updated.num_launched()[1] == 0
    with torch.inference_mode() if reader == "a gather" else nullcontext():
        READERS[reader](updated, updated.chunks[2])
    assert updated.num_launched()[:3] == [4, 4, 4]
    updated.step()
    for chunk in updated.chunks:
        chunk.settle()
        assert torch.equal(chunk.parameters.own, chunk.master.bfloat16())


@pytest.mark.gpu
def test_the_times_of_an_update_are_those_of_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    updated = Updated(monkeypatch, ahead=0)
    last = updated.optimizer._shared._last
    assert updated.num_launched() == [0, 0, 0, 0, 0, 4]
    assert last().bus.elements == sum(chunk.size for chunk in updated.chunks)
    assert updated.num_launched() == [4] * LAYERS


def test_a_part_that_is_launched_later_waits_for_the_computation_of_its_own_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A forward has been launched by then. It would have to end before the update of the layers that it waits for."""

    class Recorder:
        num_waits = 0

        def wait_stream(self, other: object) -> None:
            self.num_waits += 1

    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(launch_queue, "AHEAD", 0)
    chunk = chunk_in("layers.0", 0, ON_HOST) if DEVICE.type == "cpu" else pytest.skip("streams are replaced")
    chunk.gradient.begin(1)
    chunk.store_gradient(torch.ones(chunk.size, dtype=torch.bfloat16))
    shared, launched = SharedUpdate(DEVICE), list[int]()
    shared._beside = recorder  # type: ignore[assignment]
    shared.share = 0.0
    parts = AdamW([chunk], OptimizerConfig())._parts_of(chunk)
    shared.run(parts, lambda parts: launched.append(recorder.num_waits), lambda parts: None)
    assert (launched, recorder.num_waits) == ([], 1)
    chunk.settle()
    assert (launched, recorder.num_waits) == ([1], 1)


@pytest.mark.gpu
def test_parameters_are_the_rounded_masters_after_an_update_that_changes_nothing() -> None:
    """A kernel writes nothing in a step that is left out. The gradient was in the memory of the parameters."""
    chunk = chunk_in("layers.0", 0, ON_HOST)
    chunk.gradient.begin(1)
    chunk.store_gradient(torch.full((chunk.size,), torch.inf, device=DEVICE, dtype=torch.bfloat16))
    parts = AdamW([chunk], OptimizerConfig())._parts_of(chunk)
    for _ in streaming.Stream(DEVICE).run(parts, lambda parts: None):
        pass
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(chunk.parameters.own, chunk.master.bfloat16())


def test_the_host_updates_the_last_parts_without_gaps() -> None:
    """A small part of an early layer would fit into its share, too, but a forward needs that soon."""
    chunks = [chunk_in(f"layers.{i}", i, ON_HOST) for i in range(3)]
    parts = []
    for chunk in chunks:
        chunk.gradient.begin(1)
        chunk.store_gradient(torch.ones(chunk.size, device=DEVICE, dtype=torch.bfloat16))
        (whole,) = AdamW([chunk], OptimizerConfig())._parts_of(chunk)
        parts += [whole.cut(0, chunk.size - 100), whole.cut(chunk.size - 100, chunk.size)]
    shared = SharedUpdate(DEVICE)
    shared.share = 0.5
    streamed, left = shared._split(parts)
    assert [id(part) for part in streamed] == [id(part) for part in parts[:3]]
    assert [id(part) for part in left] == [id(part) for part in parts[3:]]


def losses(policy: str, placement: Placement | None) -> list[float]:
    """Return the losses of steps and evaluations of an engine whose chunks are there, and which nobody else uses."""
    engine = engine_of(0, 1, raw_of("single", policy, 0, precision="bf16"))
    engine.writes.stop()
    assert isinstance(engine.optimizer, AdamW)
    if placement is not None:
        engine.placement_manager._lifecycle = PlanLifecycle(is_fixed=True)
        engine.optimizer.host_share = 0.0
        for chunk in engine.chunks:
            engine.optimizer.move(chunk, placement)
    found = []
    for batch in batches_of(3, batch=24):
        found.append(engine.train_step(share_of(batch, engine)).loss)
        found.append(engine.evaluate([share_of(batch, engine)]))
    return found


@pytest.mark.gpu
def test_an_engine_waits_for_each_layer_that_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters are on the device, and states on the host."""
    monkeypatch.setattr(streaming, "PART", 1024)
    monkeypatch.setattr(launch_queue, "AHEAD", 0)
    want = losses("cuda", None)
    assert len(set(want)) == len(want)
    assert losses("cpu", Placement(Tier.DEVICE, Tier.HOST)) == want
