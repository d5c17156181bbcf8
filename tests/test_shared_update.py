"""An update of offloaded states that goes on while the next forward begins: every layer gets its updated parameters."""

import threading
import time
import weakref
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
from parallel.optim import shared_update, streaming
from parallel.optim.adamw import AdamW
from parallel.storage.transfer import ON_DEVICE, CopyEvent, Placement, Tier

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
