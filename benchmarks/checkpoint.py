"""Measure the seconds that training waits for a checkpoint, and how fast it is written.

    python -m benchmarks.checkpoint [ours waiting behind dcp dcp-staged] [--folder /tmp/colonnade] [--saves 3]
    python -m benchmarks.checkpoint --tiny        # on a CPU, to see that it runs

It prints a line for each contender and save: the seconds that the call took; those that all steps took beyond their
median without a save, from the call until the checkpoint was complete; their sum, for which training waited; the
seconds until the checkpoint was complete; and its size over them. The first save allocates memory. Contenders train
one after the other, each in a process of its own, and write to the same disk.

ours        opt-1.3b in bf16, fp32 master weights and moments: `save_checkpoint(wait=False)`
waiting     the same with `wait=True`
behind      the same, as on a host without room for a copy
dcp         Hugging Face's model of that size with fp32 weights, autocast to bf16, and torch's fused AdamW, which has
            as many bytes of state: `torch.distributed.checkpoint.async_save` as it is by default
dcp-staged  the same with its `DefaultStager`: pinned memory that is kept, copied beside training; the next update
            waits for the copy
"""

import argparse
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from models.shapes import resolve, shape_of
from parallel.config import Config, parse

LIMIT = 200  # steps of one save
WARM_UP, TIMED = 4, 8  # steps
THREADS = 8


@dataclass(frozen=True)
class Contender:
    """A program that trains: a step; a save, which returns whether it is complete; and the bytes of a checkpoint."""

    step: Callable[[Tensor], object]
    save: Callable[[Path], Callable[[], bool]]
    vocabulary: int
    finish: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Size:
    """The model and the batch."""

    model: str
    batch: int
    sequence: int
    shape: dict[str, int]


LARGE = Size("opt-1.3b", 16, 1024, {})
TINY = Size("opt-tiny", 4, 16, dict(hidden_size=64, num_hidden_layers=2))


def config_of(size: Size) -> Config:
    raw = dict(
        model=dict(name=size.model, **size.shape),
        data=dict(sequence_length=size.sequence),
        train=dict(global_batch_size=size.batch, micro_batch_size=size.batch, precision="bf16", clip_grad_norm=1.0),
        optimizer=dict(lr=1e-4),
        lr_scheduler=dict(kind="constant", warmup_steps=0),
    )
    return parse(raw, world_size=1, resolve=resolve)


def ours(size: Size, *, waits: bool = False, behind: bool = False) -> Contender:
    """Train by our engine."""
    import models
    import parallel
    from parallel.checkpoint.saver import SaverState, Writing
    from parallel.engine.context import Place

    context = parallel.launch_from_torch(config_of(size))
    engine = parallel.Engine(models.build(context), context)
    engine.writes.stop()  # as in `colonnade train`, and so is this:
    if not waits and not behind:
        engine.reserve_for_saving()
    threads = Place().num_threads
    if behind:
        engine.saver.writing = Writing(threads, copies=False)
    print(f"ours: {min(threads, THREADS)} threads write and hash", flush=True)

    def save(folder: Path) -> Callable[[], bool]:
        engine.save_checkpoint(folder, keep=1, wait=waits)
        return lambda: engine.saver.state is not SaverState.SAVING

    vocabulary = shape_of(context.config).vocab_size
    return Contender(lambda ids: engine.train_step(dict(input_ids=ids)), save, vocabulary, engine.finish_saving)


def dcp(size: Size, *, is_staged: bool = False) -> Contender:
    """Train by torch's AdamW, and save by torch.distributed.checkpoint."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save
    from transformers import OPTConfig, OPTForCausalLM

    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:29571", rank=0, world_size=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape: Any = shape_of(config_of(size))
    with device:
        module = OPTForCausalLM(OPTConfig(**(asdict(shape) | dict(dropout=0.0))))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    stager = None
    if is_staged:
        is_gpu = device.type == "cuda"
        stager = DefaultStager(StagingOptions(is_gpu, False, is_gpu, is_gpu))
    staging: list[Any] = []
    uploads: list[Any] = []

    def step(ids: Tensor) -> float:
        ids = ids.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = module(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        while staging:
            staging.pop().result()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    def save(folder: Path) -> Callable[[], bool]:
        state = dict(model=module.state_dict(), optimizer=optimizer.state_dict())
        writer = FileSystemWriter(folder, single_file_per_rank=False, thread_count=THREADS)
        found = async_save(state, storage_writer=writer, async_stager=stager)
        if isinstance(found, AsyncSaveResponse):
            staging.append(found.staging_completion)
        uploads[:] = [found.upload_completion if isinstance(found, AsyncSaveResponse) else found]
        return lambda: bool(uploads[0].done())

    return Contender(step, save, module.config.vocab_size, lambda: uploads[0].result())


CONTENDERS: dict[str, Callable[[Size], Contender]] = {
    "ours": ours,
    "waiting": lambda size: ours(size, waits=True),
    "behind": lambda size: ours(size, behind=True),
    "dcp": dcp,
    "dcp-staged": lambda size: dcp(size, is_staged=True),
}


def measure(name: str, size: Size, folder: Path, saves: int) -> None:
    """Train, save, and print what was measured."""
    contender = CONTENDERS[name](size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, min(contender.vocabulary, 1000), (size.batch, size.sequence), generator=generator)
    for _ in range(WARM_UP):
        timed(lambda: contender.step(ids))
    usual = median(timed(lambda: contender.step(ids)) for _ in range(TIMED))
    print(f"{name:10} a step takes {usual:.3f} s", flush=True)
    for k in range(saves):
        if name.startswith("dcp"):  # ours deletes its old ones itself, in the background
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir(parents=True)
        begun = time.perf_counter()
        is_complete = contender.save(folder / name)
        call = time.perf_counter() - begun
        steps: list[float] = []
        while not is_complete() and len(steps) < LIMIT:
            steps.append(timed(lambda: contender.step(ids)))
        seconds = time.perf_counter() - begun
        contender.finish()
        slower = sum(steps) - usual * len(steps)
        num_bytes = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
        print(
            f"{name:10} save {k + 1}: call {call:.3f} s, {len(steps)} steps slower by {slower:.3f} s together, the"
            f" slowest by {max(steps, default=usual) - usual:.3f} s; waited {call + slower:.3f} s; complete after"
            f" {seconds:.2f} s, {num_bytes / 1e6:,.0f} MB, {num_bytes / 1e6 / seconds:,.0f} MB/s",
            flush=True,
        )
    shutil.rmtree(folder / name)


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of a call, with the work that it gave the device."""
    begun = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds that training waits for a checkpoint.")
    parser.add_argument("contenders", nargs="*", metavar="CONTENDER", help=", ".join(CONTENDERS))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/colonnade"), help="where the checkpoints are written")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    options = parser.parse_args()
    for name in options.contenders or CONTENDERS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            process.submit(measure, name, TINY if options.tiny else LARGE, options.folder, options.saves).result()


if __name__ == "__main__":
    main()
