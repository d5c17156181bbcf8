"""A long run does not grow: a step leaves no tensor, file, thread or memory behind."""

import gc
import os
import statistics
import tempfile
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

import parallel
from models import build
from models.shapes import resolve
from parallel.config import parse
from parallel.engine.context import Place, make_context, use
from parallel.engine.engine import Engine
from parallel.engine.module_engine import ModuleEngine
from parallel.storage import swapper
from parallel.storage.transfer import Tier
from tests.harness import run
from tests.patience import LIMIT, patient, wait_until

STEPS = range(200, 2001, 200)
STEPS_APART = 1400  # from the middle of the first three samples to that of the last three
LEAK = 1 << 10  # bytes: so much in every step must be noticed

SHAPE: dict[str, Any] = dict(
    vocab_size=37,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=32,
    max_position_embeddings=8,
    dropout=0.0,
)


@dataclass(frozen=True)
class Sample:
    """The resources that a process holds between two steps."""

    tensors: int
    tensor_bytes: int
    files: int
    threads: int  # Python's
    tasks: int  # all threads, with those of gloo and of autograd
    resident: int  # bytes
    device_bytes: int  # of tensors on a GPU
    pinned_bytes: int  # of torch's own pinned memory; the project's is counted with the tensors

    @property
    def counted(self) -> tuple[int, ...]:
        """The counts that have to stay the same."""
        sizes = self.tensor_bytes, self.device_bytes, self.pinned_bytes
        return self.tensors, *sizes, self.files, self.threads, self.tasks


def sample() -> Sample:
    gc.collect()
    storages: dict[int, int] = {}
    tensors = 0
    for x in gc.get_objects():
        if issubclass(type(x), Tensor):  # isinstance would import lazy modules
            tensors += 1
            if x.layout is not torch.strided:  # a test module that is imported by now may hold one
                continue
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    on_gpu = torch.cuda.is_initialized()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Sample(
        tensors,
        sum(storages.values()),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        len(os.listdir("/proc/self/task")),
        pages * os.sysconf("SC_PAGE_SIZE"),
        torch.cuda.memory_allocated() if on_gpu else 0,
        torch.cuda.host_memory_stats()["allocated_bytes.current"] if on_gpu else 0,
    )


PLANNED: dict[str, Any] = dict(zero=dict(tensor_placement_policy="auto", device_memory="48KiB"))
OFFLOADED: dict[str, Any] = dict(
    model=dict(num_hidden_layers=6),
    zero=dict(tensor_placement_policy="cpu", nvme_dir=tempfile.gettempdir()),
    train=dict(activation_checkpointing="offload"),
    optimizer=dict(state_dtype="bf16"),
)
KINDS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours on host and disk": OFFLOADED,
    "ours by a plan": PLANNED,
    "a module": {},
    "a module on host and disk": OFFLOADED,
    "a module by a plan": PLANNED,
}
HOST = {"ours on host and disk": 160, "a module on host and disk": 200}
"""The KiB of host memory of all ranks together: so little that some states are on a disk."""


def config_of(kind: str, world_size: int, device: str) -> dict[str, Any]:
    train = dict(global_batch_size=4, micro_batch_size=2, device=device, steps=STEPS.stop)
    base: dict[str, Any] = dict(model=SHAPE, data=dict(sequence_length=8), zero=dict(stage=3), train=train)
    raw = base | {name: base.get(name, {}) | section for name, section in KINDS[kind].items()}
    if kind in HOST:
        raw["zero"] |= dict(host_memory=f"{HOST[kind] // world_size}KiB")
    return raw


def engine_of(rank: int, world_size: int, kind: str, device: str = "cpu") -> Engine | ModuleEngine:
    swapper.NUM_SLOTS = 2
    raw = config_of(kind, world_size, device)
    config = parse(raw, world_size=world_size, resolve=resolve)
    context = use(make_context(config, Place(rank, world_size)))
    if kind.startswith("ours"):
        return Engine(build(context), context)
    with parallel.sharded_init():
        model = OPTForCausalLM(OPTConfig(**raw["model"], word_embed_proj_dim=SHAPE["hidden_size"]))
    engine: ModuleEngine
    passed = torch.optim.AdamW(model.parameters(), lr=1e-4) if kind == "a module" else None
    engine, *_ = parallel.initialize(model, passed)
    return engine


def tiers_of(rank: int, world_size: int, kind: str) -> set[Tier]:
    """Return the tiers that hold something after some steps."""
    engine = engine_of(rank, world_size, kind)
    ids = torch.randint(4, SHAPE["vocab_size"], (2, 8), generator=torch.Generator().manual_seed(rank))
    for _ in range(4):
        engine.train_step({"input_ids": ids})
    return {tier for tier, count in engine.held().items() if count}


LEAKS: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: torch.ones(()),
    "a file": lambda: open(os.devnull),  # noqa: SIM115
    "a thread": lambda: threading.Thread(target=threading.Event().wait, daemon=True).start(),
    "bytes": lambda: b"x" * LEAK + os.urandom(1),
}


def samples_of(
    rank: int, world_size: int, kind: str, steps: range, leak: str = "", device: str = "cpu"
) -> list[Sample]:
    """Return a rank's samples after each of the `steps`, counted from 1, of a run that ends with the last of them."""
    engine = engine_of(rank, world_size, kind, device)
    ids = torch.randint(4, SHAPE["vocab_size"], (2, 8), generator=torch.Generator().manual_seed(rank))
    found, left = [], []
    for step in range(1, steps.stop):
        engine.train_step({"input_ids": ids})
        if leak:
            left.append(LEAKS[leak]())
        if step in steps:
            _wait_for_the_disk(engine)
            if device == "cuda":
                torch.cuda.synchronize()
            found.append(sample())
    return found


def _wait_for_the_disk(engine: Engine | ModuleEngine) -> None:
    """Wait until no thread of the disk holds a tensor: one that it reads ahead, or one of a job that is done.

    A thread gives up a job when it takes the next one: so each is given one, in which all of them meet.
    """
    disk = engine.chunks[0].memory.disk
    if disk is not None:
        disk.swapper.wait()
        for pool in (disk.swapper._readers, disk.swapper._writers):
            meeting = threading.Barrier(swapper.NUM_THREADS + 1)
            for _ in range(swapper.NUM_THREADS):
                pool.submit(meeting.wait)
            meeting.wait()


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
@pytest.mark.parametrize(
    ("kind", "device"),
    [*((kind, "cpu") for kind in KINDS), *(pytest.param(kind, "cuda", marks=pytest.mark.gpu) for kind in HOST)],
)
def test_two_thousand_steps_leave_nothing_behind(kind: str, device: str) -> None:
    """The run is of ZeRO stage 3, on two ranks, or with one GPU. After a warm-up every count stays the same.

    Memory is compared by the medians of the first and the last third of the samples. A leak of 1 KiB in every step
    would make these differ by as many KiB as there are steps between them, here 1,400. Half of that is allowed, for
    memory that is used for the first time.
    """
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    for samples in run(samples_of, 1 if device == "cuda" else 2, kind, STEPS, "", device, timeout=6 * LIMIT):
        assert {one.counted for one in samples} == {samples[0].counted}
        assert growth(samples) < LEAK * STEPS_APART / 2


def growth(samples: list[Sample]) -> float:
    """Return the bytes from the median of the first third to that of the last."""
    third = len(samples) // 3
    first, last = (statistics.median(one.resident for one in part) for part in (samples[:third], samples[-third:]))
    return last - first


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_data_of_each_kind_of_run_is_on_the_tiers_of_its_name(kind: str) -> None:
    tiers = {"disk": {Tier.HOST, Tier.DISK}, "plan": {Tier.DEVICE, Tier.HOST}}.get(kind.split()[-1], {Tier.DEVICE})
    assert all(found == tiers for found in run(tiers_of, 2, kind))


@pytest.mark.slow
def test_leaked_bytes_that_no_tensor_holds_are_noticed() -> None:
    for samples in run(samples_of, 1, "ours", STEPS, "bytes", timeout=3 * LIMIT):
        assert growth(samples) > LEAK * STEPS_APART / 2


@pytest.mark.parametrize("leak", ["a tensor", "a file", "a thread"])
def test_what_a_step_leaves_behind_is_counted(leak: str) -> None:
    (first, second), *_ = run(samples_of, 1, "a module", range(5, 7), leak)
    assert first.counted != second.counted
    (first, second), *_ = run(samples_of, 1, "a module", range(5, 7))
    assert first.counted == second.counted


def outlived(rank: int, world_size: int, kind: str) -> tuple[int, int]:
    """Return how many chunks, and how many threads, outlive their engine."""
    threads = threading.active_count()
    engine = engine_of(rank, world_size, kind)
    ids = torch.randint(4, SHAPE["vocab_size"], (2, 8), generator=torch.Generator().manual_seed(rank))
    for _ in range(4):
        engine.train_step({"input_ids": ids})
    chunks = [weakref.ref(chunk) for chunk in engine.chunks]
    del engine

    def is_gone() -> bool:
        """Collect garbage each time: a thread has the engine until its update ends, and itself ends after that."""
        gc.collect()
        return threading.active_count() <= threads

    wait_until(is_gone, patient(30.0))
    return sum(chunk() is not None for chunk in chunks), threading.active_count() - threads


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_without_references_frees_its_memory(kind: str) -> None:
    assert run(outlived, 2, kind) == [(0, 0)] * 2
