"""Jobs that train a few steps of a large model: tokens a second, memory, and the communication of a step."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import overlap
from benchmarks.gpu_fit import Fit, fit, state_bytes
from benchmarks.gpu_jobs import RankSetup, Row, meet
from benchmarks.gpu_layouts import Layout
from benchmarks.gpu_peers import PEERS
from benchmarks.gpu_work import LR, Work
from benchmarks.workload import BETAS, CLIP, EPS, WEIGHT_DECAY, Step, graph_bytes, without_dropout
from models.build import part_of
from models.costs import flops_per_token, parameter_count
from models.family import named_sizes
from models.shape import ModelShape
from models.shapes import resolve, shape_of
from parallel.config import parse
from parallel.engine.context import Place, make_context
from parallel.engine.engine import Engine
from parallel.layout.layout import ParameterInfo
from parallel.layout.rng import seed_of
from parallel.storage.transfer import Copies
from tests import parity
from training.metrics import peak_device_bytes, peak_tflops

TRACE_BYTES = 4 * 2**20  # a larger trace is not kept
BASE = 2048  # tokens of a sample in which `--batch` counts
TINY_PART = 64  # of which one remains on a CPU
WARM_UP, WARM_UP_ALONE = 2, 5  # steps; those of one rank are captured as a CUDA graph after three


@contextmanager
def after_the_copy(copies: Copies) -> Iterator[None]:
    """Launch the gather of an uploaded slice in the stream of computation, which waits for the copy."""
    if copies.device.type == "cuda":
        torch.cuda.current_stream(copies.device).wait_stream(copies._streams[0])
    yield


CHANGES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "": nullcontext,
    "gathers wait": lambda: patch.object(Copies, "on_upload_stream", after_the_copy),
}
"""Ways in which our engine is changed for a comparison, by name."""


@dataclass(frozen=True)
class Sizes:
    """The model, the tokens of a sample, the precision, and the samples of `BASE` tokens for each GPU in a step."""

    model: str
    sequence: int = BASE
    precision: str = "bf16"
    samples: int = 4

    @property
    def title(self) -> str:
        """The model, and the length and the precision where they are not the usual ones."""
        more = [f"{self.sequence // 1024}k"] if self.sequence != BASE else []
        return " ".join([self.model, *more, *([self.precision] if self.precision != "bf16" else [])])

    def length(self, layout: Layout, setup: RankSetup) -> int:
        """Return the tokens of a sample for this layout."""
        return self.sequence * layout.longer // (TINY_PART if setup.tiny else 1)

    def batch(self, layout: Layout, world: int, setup: RankSetup) -> int:
        """Return the samples of a step: as many tokens as in `samples`, but two for each rank unless all share them."""
        wanted = self.samples * world * (BASE // (TINY_PART if setup.tiny else 1)) // self.length(layout, setup)
        least = 2 * world if layout.context == 1 else 1
        return max(wanted, least)


@dataclass(frozen=True)
class SpeedJob:
    """A layout whose speed is measured, or a peer beside it.

    `alone`: whether every rank trains by itself, as a world of one. `trace`: whether the communication of a step is
    examined. `change`: one of `CHANGES`.
    """

    layout: Layout
    sizes: Sizes
    peer: str | None = None
    alone: bool = False
    steps: int = 3
    trace: bool = False
    part: str = "speed"
    change: str = ""
    seconds: float = 0.0

    @property
    def model(self) -> str:
        return self.sizes.title

    @property
    def name(self) -> str:
        return self.peer or ", ".join(filter(None, (self.layout.name, self.change)))

    def run(self, setup: RankSetup) -> list[Row]:
        """Train a few steps; return a row of figures if `steps` are timed, and a row of the trace if there is one."""
        with CHANGES[self.change]():
            return self._run(setup)

    def _run(self, setup: RankSetup) -> list[Row]:
        world = 1 if self.alone else setup.world
        work = work_of(self.layout, self.sizes, world, setup)
        engine = None if self.peer else _ours(self.layout, work, setup, world)
        step = partial(_loss, engine) if engine is not None else PEERS[self.peer or ""](work)
        vocabulary = work.shape.vocab_size
        ids = torch.randint(4, vocabulary, (work.batch, work.sequence), generator=torch.Generator().manual_seed(0))
        rows = []
        losses = [step(ids) for _ in range(1 if setup.tiny else WARM_UP_ALONE if self.alone else WARM_UP)]
        if self.steps:
            rows.append(self._timed(step, ids, losses, work, setup))
        if self.trace:
            rows.append(self._traced(step, ids, setup))
        if engine is not None:
            engine.mesh.close()
        return rows

    def _timed(self, step: Step, ids: Tensor, losses: list[float], work: Work, setup: RankSetup) -> Row:
        if setup.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.steps):
            meet(setup)
            start = time.perf_counter()
            losses.append(step(ids))
            meet(setup)
            seconds.append(time.perf_counter() - start)
        count = 1 if self.alone else setup.world
        speed = ids.numel() / median(seconds) / count
        promised = peak_tflops(setup.device)
        flops = speed * flops_per_token(work.shape, work.sequence)
        peaks: list[Any] = [None] * setup.world
        dist.all_gather_object(peaks, (peak_device_bytes(setup.device) + graph_bytes(setup.device), speed))
        if self.alone:
            speed = min(own for _, own in peaks)
        return Row(
            part=self.part,
            model=self.model,
            name=self.name,
            beside=self.layout.name,
            tokens_per_second=speed * count,
            per_gpu=speed,
            mfu=flops / promised / 1e12 if promised else None,
            peak_gib=max(peak for peak, _ in peaks) / 2**30,
            seconds=seconds,
            losses=losses,
            note=f"{_described(work, self.layout, count)}; loss {losses[0]:.3f} to {losses[-1]:.3f}",
        )

    def _traced(self, step: Step, ids: Tensor, setup: RankSetup) -> Row:
        """Profile one step, on every rank: a rank without the profiler would wait for those that have it."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if setup.on_gpu:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profiler:
            step(ids)
            meet(setup)
        row = Row(part="overlap", model=self.model, name=self.name, note="")
        if setup.rank == 0:
            title = f"{self.model}_{self.name}".replace(" ", "_").replace("/", "_")
            path = setup.out / f"trace_{title}.json.gz"
            with tempfile.TemporaryDirectory() as folder:
                profiler.export_chrome_trace(f"{folder}/trace.json")
                found = overlap.shares(overlap.keep(Path(folder, "trace.json"), path))
            row["note"] = "no kernel communicates"
            if found is not None:
                seconds, hidden = found
                row |= dict(communication_seconds=seconds, hidden=hidden)
                row["note"] = f"{hidden:.0%} of {seconds * 1000:.0f} ms of communication hidden; {path.name}"
            if path.stat().st_size > TRACE_BYTES:
                path.unlink()
                row["note"] += " (too large to keep)"
        return row


def _described(work: Work, layout: Layout, world: int) -> str:
    """Return the tokens of a sample, the microbatches, the layers and what is recomputed, as text."""
    found = f"{work.sequence} tokens: {work.batch // work.micro // layout.replicas(world)} × {work.micro} samples"
    if work.shape.num_hidden_layers < work.layers:
        found += f", {work.shape.num_hidden_layers} of {work.layers} layers"
    return found + (", recomputed" if work.recompute else "")


def work_of(layout: Layout, sizes: Sizes, world: int, setup: RankSetup) -> Work:
    """Return the work with the largest microbatch that fits by estimate, and recomputation only where it is needed.

    Where nothing fits the model has fewer layers. All of it is the same for a layout and for the peers beside it: so
    the estimate is for Hugging Face's layers, which keep more activations than ours. Raises ValueError where even an
    eighth of the layers does not fit.
    """
    named = named_sizes()[sizes.model]
    sequence, batch = sizes.length(layout, setup), sizes.batch(layout, world, setup)
    section: dict[str, Any] = dict(name=sizes.model, **without_dropout(named))
    section["max_position_embeddings"] = max(sequence, named.max_position_embeddings)
    total = 2 * setup.world if setup.tiny else named.num_hidden_layers
    room = float(torch.cuda.mem_get_info()[1] if setup.on_gpu else 2**40) * 0.9 - 3 * 2**30
    for eighths in range(8, 0, -1):
        section["num_hidden_layers"] = max(2, total * eighths // 8)
        shape = shape_of(parse(dict(model=section), resolve=resolve))
        work = Work(section, shape, setup.device, sequence, batch, 1, False, precision=sizes.precision, layers=total)
        if (chosen := _fit(layout, work, world, room)) is not None:
            return replace(work, micro=chosen.micro, recompute=chosen.recompute)
    raise ValueError(f"by estimate it does not fit into {room / 2**30:.0f} GiB")


PEER_BYTES = 40 / 12  # that a peer keeps for each element that our blocks keep: 40 for each hidden element of an OPT


def _fit(layout: Layout, work: Work, world: int, room: float) -> Fit | None:
    shape = work.shape
    blocks, block = shape.num_hidden_layers, PEER_BYTES * (shape.kept().outer + shape.kept().inner)
    layer = float(sum(map(prod, shape.block_tensors(0).values())))
    has_peers = bool(layout.peers_in(work.precision))

    def activations(samples: int, recompute: bool) -> float:
        tokens = samples * work.sequence
        logits = 0.0 if layout.stages > 1 else tokens * shape.vocab_size * 14.0 * layout.tensor  # not split by a peer
        kept = 2.0 * blocks * shape.hidden_size + block if recompute else block * blocks
        return tokens * kept + (logits if has_peers else 0.0)

    state = state_bytes(layout, world, parameter_count(shape), layer, work.precision)
    if layout.sections.get("zero", {}).get("tensor_placement_policy") == "cpu":
        state = 20.0 * 3 * layer  # of three layers in flight
    chosen: Fit | None = fit(layout, world, work.batch, activations, room - state)
    return chosen


def _ours(layout: Layout, work: Work, setup: RankSetup, world: int) -> Engine:
    train = dict(
        global_batch_size=work.batch,
        micro_batch_size=work.micro,
        precision=work.precision,
        clip_grad_norm=CLIP,
        activation_checkpointing="full" if work.recompute else "none",
        device="cpu" if setup.tiny else "auto",
    )
    if setup.tiny:  # no linear is large enough to gain from 8 bits
        train["fp8_min_elements"] = 0
    raw = dict(
        model=work.model,
        data=dict(sequence_length=work.sequence),
        optimizer=dict(lr=LR, eps=EPS, betas=BETAS, weight_decay=WEIGHT_DECAY),
        lr_scheduler=dict(kind="constant", warmup_steps=0),
    )
    train_and_more = dict(train=train | layout.sections.get("train", {}))
    config = parse(raw | layout.sections | train_and_more, world_size=world, resolve=resolve)
    rank = 0 if world == 1 else setup.rank
    context = make_context(config, Place(rank, world, setup.rank, setup.world))
    return Engine(part_of(context, partial(_fill, shape=work.shape)), context)


def _loss(engine: Engine, ids: Tensor) -> float:
    return engine.train_step(parity.share_of(dict(input_ids=ids), engine)).loss


@torch.no_grad()
def _fill(infos: Any, shape: ModelShape) -> None:
    """Draw random weights on the device, for the host would take minutes; replicas get the same ones."""
    info: ParameterInfo
    for info in infos:
        for piece in info.pieces():
            wanted = shape.initial(piece.name)
            generator = torch.Generator(piece.data.device).manual_seed(seed_of(piece.name, piece.box))
            piece.data.normal_(wanted.mean, wanted.std, generator=generator)
