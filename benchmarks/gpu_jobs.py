"""The jobs of `benchmarks.multi_gpu`: each is run by all ranks together, and returns rows of the table."""

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import overlap
from benchmarks.gpu_layouts import Fit, Layout, fit, state_bytes
from benchmarks.gpu_peers import LR, PEERS, Work
from benchmarks.workload import BETAS, CLIP, EPS, WEIGHT_DECAY, Step, without_dropout
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
from parallel.mesh.collectives import start_all_gather, start_all_reduce, start_reduce_scatter
from parallel.mesh.mesh import Axis
from parallel.pipeline.p2p import Pipe, start_receive, start_send
from tests import parity
from training.metrics import peak_device_bytes, peak_tflops

Row = dict[str, Any]
"""A row of the table: a part, a name and a note, and whatever figures the part has."""

TRACE_BYTES = 4 * 2**20  # a larger trace is not kept


@dataclass(frozen=True)
class RankSetup:
    """A rank, the number of ranks, this rank's device, and the folder for files.

    `tiny`: whether models are so small that a CPU trains them in a moment.
    """

    rank: int
    world: int
    device: torch.device
    out: Path
    tiny: bool


@dataclass(frozen=True)
class ParityJob:
    """A layout whose training is compared with Hugging Face's."""

    layout: Layout
    part: str = "parity"

    @property
    def name(self) -> str:
        return self.layout.name

    def run(self, setup: RankSetup) -> list[Row]:
        """Compare losses, norms, gradients and weights of a few steps with Hugging Face's on one CPU, in fp32."""
        path, raw = _parity_model(setup), _parity_config(self.layout, setup)
        batches = parity.batches_of(3, batch=16, sequence=SEQUENCE)
        got = parity.train(setup.rank, setup.world, raw, batches)
        if got is None:
            return []
        want = parity.reference(path, raw, batches)
        named = [(name, parity.relative(got.weights[name], w)) for name, w in want.weights.items()]
        losses = max(abs(a - b) / abs(b) for a, b in zip(got.losses, want.losses, strict=True))
        total = sum(g.double().square().sum() for g in want.gradients.values()) ** 0.5
        errors = dict(
            loss=losses,
            gradient=max(
                float((got.gradients[n].double() - g.double()).norm() / total) for n, g in want.gradients.items()
            ),
            weight=max(error for name, error in named if not name.endswith("k_proj.bias")),
        )
        note = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        try:
            parity.compare(got, want, parity.BOUND["fp32"], is_fp64=False)
        except AssertionError as error:
            return [Row(part=self.part, name=self.name, note=f"DIFFERS: {error}; {note}", failed=True, **errors)]
        return [Row(part=self.part, name=self.name, note=f"equal: {note}", **errors)]


SEQUENCE = 16  # tokens: two parts for each of 8 ranks
_PARITY: dict[str, Any] = dict(
    vocab_size=37,  # nothing divides it
    hidden_size=32,
    num_hidden_layers=6,
    num_attention_heads=8,
    ffn_dim=64,
    max_position_embeddings=16,
    dropout=0.0,
)


def _parity_config(layout: Layout, setup: RankSetup) -> Row:
    path = str(setup.out / ".parity")
    micro = min(16 // layout.replicas(setup.world), max(2, layout.tensor))
    return parity.config_of(
        layout.sections.get("parallel", {}),
        precision="fp32",
        model=dict(path=path),
        data=dict(sequence_length=SEQUENCE),
        optimizer=dict(lr=1e-3),
        zero=layout.sections.get("zero", {}),
        train=dict(global_batch_size=16, micro_batch_size=micro, device="cpu" if setup.tiny else "auto", steps=3),
    )


def _parity_model(setup: RankSetup) -> Path:
    path = setup.out / ".parity"
    if setup.rank == 0 and not (path / "config.json").exists():
        parity.save_model(path, **_PARITY)
    dist.barrier()
    return path


@dataclass(frozen=True)
class SpeedJob:
    """A layout whose speed is measured, or a peer beside it.

    `alone`: whether every rank trains by itself, as a world of one. `trace`: whether the communication of a step is
    examined.
    """

    layout: Layout
    model: str
    samples_per_rank: int
    peer: str | None = None
    alone: bool = False
    steps: int = 3
    trace: bool = False
    part: str = "speed"

    @property
    def name(self) -> str:
        return f"{self.layout.name} alone" if self.alone else self.peer or self.layout.name

    def run(self, setup: RankSetup) -> list[Row]:
        """Train a few steps; return a row of figures if `steps` are timed, and a row of the trace if there is one."""
        world = 1 if self.alone else setup.world
        work = work_of(self.layout, self.model, world, self.samples_per_rank, setup)
        engine = None if self.peer else _ours(self.layout, work, setup, world)
        step = partial(_loss, engine) if engine is not None else PEERS[self.peer or ""](work)
        vocabulary = work.shape.vocab_size
        ids = torch.randint(4, vocabulary, (work.batch, work.sequence), generator=torch.Generator().manual_seed(0))
        rows = []
        losses = [step(ids) for _ in range(1 if setup.tiny else 2)]
        if self.steps:
            rows.append(self._timed(step, ids, losses, work, setup))
        if self.trace:
            rows.append(self._traced(step, ids, setup))
        if engine is not None:
            engine.mesh.close()
        return rows

    def _timed(self, step: Step, ids: Tensor, losses: list[float], work: Work, setup: RankSetup) -> Row:
        if setup.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.steps):
            _meet(setup)
            start = time.perf_counter()
            losses.append(step(ids))
            _meet(setup)
            seconds.append(time.perf_counter() - start)
        count = 1 if self.alone else setup.world
        took = median(seconds)
        speed = ids.numel() / took / count
        promised = peak_tflops(setup.device)
        flops = speed * flops_per_token(work.shape, work.sequence)
        peaks: list[Any] = [None] * setup.world
        dist.all_gather_object(peaks, (peak_device_bytes(setup.device), speed))
        if self.alone:
            speed = min(own for _, own in peaks)
        how = f"{work.sequence} tokens each: " if self.layout.longer > 1 else ""
        how += str(work.batch // work.micro // self.layout.replicas(count))
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
            note=f"{how} × {work.micro} samples a replica{', recomputed' if work.recompute else ''};"
            f" loss {losses[0]:.3f} to {losses[-1]:.3f}",
        )

    def _traced(self, step: Step, ids: Tensor, setup: RankSetup) -> Row:
        """Profile one step, on every rank: a rank without the profiler would wait for those that have it."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if setup.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profiler:
            step(ids)
            _meet(setup)
        row = Row(part="overlap", model=self.model, name=self.name, note="")
        if setup.rank == 0:
            path = setup.out / f"trace_{self.model}_{self.name.replace(' ', '_')}.json.gz"
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


def work_of(layout: Layout, model: str, world: int, samples_per_rank: int, setup: RankSetup) -> Work:
    """Return the work with the largest microbatch that fits by estimate, and recomputation only where it is needed.

    Both are the same for a layout and for the peers beside it. So the estimate is for Hugging Face's layers, which keep
    more activations than ours. Raises ValueError where nothing fits.
    """
    named = named_sizes()[model]
    sequence = min(TINY_SEQUENCE if setup.tiny else 2048, named.max_position_embeddings) * layout.longer
    section: dict[str, Any] = dict(name=model, **without_dropout(named))
    section["max_position_embeddings"] = max(sequence, named.max_position_embeddings)
    if setup.tiny:
        section["num_hidden_layers"] = 8
    shape = shape_of(parse(dict(model=section), resolve=resolve))
    batch = samples_per_rank * world // layout.longer
    room = float(torch.cuda.mem_get_info()[1] if setup.device.type == "cuda" else 2**40) * 0.9 - 3 * 2**30
    blocks, block = shape.num_hidden_layers, PEER_BYTES * (shape.kept().outer + shape.kept().inner)
    layer = float(sum(map(prod, shape.block_tensors(0).values())))

    def activations(samples: int, recompute: bool) -> float:
        tokens = samples * sequence
        logits = 0.0 if layout.stages > 1 else tokens * shape.vocab_size * 14.0 * layout.tensor  # not split by a peer
        kept = 2.0 * blocks * shape.hidden_size + block if recompute else block * blocks
        return tokens * kept + (logits if layout.peers else 0.0)

    state = state_bytes(layout, world, parameter_count(shape), layer)
    chosen: Fit | None = fit(layout, world, batch, activations, room - state)
    if chosen is None:
        raise ValueError(f"by estimate it does not fit: {state / 2**30:.0f} GiB of states in {room / 2**30:.0f} GiB")
    return Work(section, shape, setup.device, sequence, batch, chosen.micro, chosen.recompute)


TINY_SEQUENCE = 32  # tokens
PEER_BYTES = 40 / 12  # that a peer keeps for each element that our blocks keep: 40 for each hidden element of an OPT


def _ours(layout: Layout, work: Work, setup: RankSetup, world: int) -> Engine:
    raw = dict(
        model=work.model,
        data=dict(sequence_length=work.sequence),
        train=dict(
            global_batch_size=work.batch,
            micro_batch_size=work.micro,
            precision="bf16",
            clip_grad_norm=CLIP,
            activation_checkpointing="full" if work.recompute else "none",
            device="cpu" if setup.tiny else "auto",
        ),
        optimizer=dict(lr=LR, eps=EPS, betas=BETAS, weight_decay=WEIGHT_DECAY),
        lr_scheduler=dict(kind="constant", warmup_steps=0),
    )
    config = parse(raw | layout.sections, world_size=world, resolve=resolve)
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


@dataclass(frozen=True)
class BandwidthJob:
    """The bandwidth along each axis of these layouts' meshes, with all groups of the axis busy at once.

    It is compared with one large all-reduce over all ranks.
    """

    layouts: list[Layout] = field(default_factory=list)
    part: str = "bandwidth"
    name: str = "world"

    def run(self, setup: RankSetup) -> list[Row]:
        """Return a row for the world, and one for each axis that was not measured already."""
        large, small = (2**16, 2**14) if setup.tiny else (2**30, 2**28)  # bytes
        rows: list[Row] = []
        seen: set[tuple[object, bool]] = set()
        whole = 0.0
        for layout in self.layouts:
            config = parse(_parity_config(layout, setup), world_size=setup.world, resolve=resolve)
            context = make_context(config, Place(setup.rank, setup.world, setup.rank, setup.world))
            mesh = context.mesh
            if not rows:
                whole = _all_reduce(mesh.world, large, setup)
                note = f"all_reduce {whole:.3g} GB/s of {large // 2**20} MiB"
                rows.append(Row(part=self.part, name="world", note=note, all_reduce=whole))
            for name, size in mesh.topology.shape.items():
                groups = tuple(mesh.topology.groups((name,)))
                if size == 1 or (groups, name == "pipe") in seen:
                    continue
                seen.add((groups, name == "pipe"))
                pipe = Pipe(mesh.axis("pipe"), mesh.links) if name == "pipe" else None
                if pipe is not None:
                    pipe.connect(setup.device)
                found = _speeds(mesh.axis(name), small, setup, is_pipe=pipe is not None)
                note = ", ".join(f"{kind} {speed:.3g} GB/s ({speed / whole:.0%})" for kind, speed in found.items())
                rows.append(Row(part=self.part, name=f"{name} of {layout.name}: {groups[0]}", note=note, **found))
            mesh.close()
        return rows


def _speeds(axis: Axis, size: int, setup: RankSetup, *, is_pipe: bool) -> dict[str, float]:
    """Return the bus bandwidth of each collective in GB/s, as nccl-tests define it: what the slowest link carries."""
    x = torch.zeros(size // 4 // axis.size * axis.size, device=setup.device)
    own = x.chunk(axis.size)[axis.rank]
    others = x.nbytes * (axis.size - 1) / axis.size / 1e9
    found = {
        "all_reduce": _all_reduce(axis, size, setup),
        "all_gather": _rate(lambda: start_all_gather(own, 0, axis, out=x).wait(), setup) * others,
        "reduce_scatter": _rate(lambda: start_reduce_scatter(x, 0, axis, in_place=True).wait(), setup) * others,
    }
    if is_pipe:
        found["send"] = _rate(lambda: _pass_on(x, axis), setup) * x.nbytes / 1e9
    return found


def _pass_on(x: Tensor, axis: Axis) -> None:
    """Send x from every even rank to the next one."""
    if axis.rank % 2 == 0 and axis.rank + 1 < axis.size:
        start_send(x, axis, axis.rank + 1).wait()
    elif axis.rank % 2:
        start_receive(tuple(x.shape), x, axis, axis.rank - 1).wait()


def _all_reduce(axis: Axis, size: int, setup: RankSetup) -> float:
    """Return the bus bandwidth of an all-reduce of so many bytes, in GB/s."""
    x = torch.zeros(size // 4, device=setup.device)
    rate = _rate(lambda: start_all_reduce(x, axis, in_place=True).wait(), setup)
    return rate * size * 2 * (axis.size - 1) / axis.size / 1e9


def _rate(collective: Callable[[], object], setup: RankSetup) -> float:
    """Return how many times a second a collective can be called."""
    times = 1 if setup.tiny else 10
    for _ in range(2):
        collective()
    _meet(setup)
    start = time.perf_counter()
    for _ in range(times):
        collective()
    _meet(setup)
    return times / (time.perf_counter() - start)


def _meet(setup: RankSetup) -> None:
    """Wait until every rank is here and its device has nothing left to do."""
    if setup.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    if setup.device.type == "cuda":
        torch.cuda.synchronize()


def clean(setup: RankSetup) -> None:
    """Free the device memory that nothing uses any more."""
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()


def write_rows(out: Path, rows: list[Row]) -> None:
    """Write all rows to results.json, which is complete at any time."""
    temporary = out / ".results.json"
    temporary.write_text(json.dumps(rows, indent=1))
    os.replace(temporary, out / "results.json")
