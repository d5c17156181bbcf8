"""Programs in which one rank parts from the others, each with the processes of a launch and a store that hosts it.

`play` starts a program on ranks as `--nprocs` does, and returns how each of them ended, and what it printed.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import parallel
from parallel.mesh.collectives import barrier
from parallel.mesh.process_groups import host_store
from parallel.watch.board import prefix_of
from tests.harness import _imported_by_now
from tests.patience import LIMIT, wait_until

TIMEOUT = 2  # seconds, of train.timeout_seconds


@dataclass(frozen=True)
class End:
    """The end of a rank: its exit code (negative: a signal), what it printed as errors, and when, in seconds."""

    code: int | None
    errors: str
    seconds: float


Program = Callable[[int, Path], None]


def play(program: Program, num_ranks: int) -> list[End]:
    """Return the end of each rank of a program; `seconds` count from when the first one went its own way."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", *_imported_by_now()])
    store, port = host_store(prefix_of("0"))
    with tempfile.TemporaryDirectory(prefix="parting_") as name:
        folder = Path(name)
        ranks = [context.Process(target=_rank, args=(program, r, num_ranks, port, folder)) for r in range(num_ranks)]
        for process in ranks:
            process.start()
        ended: dict[int, float] = {}
        wait_until(lambda: _note_ends(ranks, ended) == num_ranks)
        began = (folder / "parted").stat().st_mtime if (folder / "parted").exists() else time.time()
        for process in ranks:
            process.kill()
            process.join(LIMIT)
        ends = [
            End(process.exitcode, (folder / f"errors_{rank}").read_text(), ended.get(rank, time.time()) - began)
            for rank, process in enumerate(ranks)
        ]
        for process in ranks:
            process.close()
    del store
    return ends


def _note_ends(ranks: list[Any], ended: dict[int, float]) -> int:
    for rank, process in enumerate(ranks):
        if rank not in ended and process.exitcode is not None:
            ended[rank] = time.time()
    return len(ended)


def _rank(program: Program, rank: int, num_ranks: int, port: int, folder: Path) -> None:
    """Run the program in this process as an interpreter would: an uncaught exception goes to sys.excepthook."""
    torch.set_num_threads(1)
    errors = os.open(folder / f"errors_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=num_ranks, LOCAL_WORLD_SIZE=num_ranks)
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    try:
        program(rank, folder)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def begun(rank: int, **sections: Any) -> tuple[parallel.Context, Any]:
    """Return the context and an engine, which has taken no step."""
    train = dict(device="cpu", timeout_seconds=TIMEOUT)
    context = parallel.launch_from_torch(dict(train=train | sections.pop("train", {}), **sections))
    engine, *_ = parallel.initialize(torch.nn.Linear(2, 1))
    return context, engine


def step(engine: Any) -> None:
    engine.backward(engine(torch.ones(1, 2)).sum())
    engine.step()


def part(folder: Path) -> None:
    """Note that a rank goes its own way from now on."""
    (folder / "parted").touch()


def one_alone(act: Callable[[Any, Path], object], *, after: int = 2) -> Program:
    """Return a program in which rank 1 alone does this after some steps of three, and then goes on as the others do."""
    return partial(_one_alone, act, after)


def _one_alone(act: Callable[[Any, Path], object], after: int, rank: int, folder: Path) -> None:
    _, engine = begun(rank)
    for i in range(3):
        if i == after and rank == 1:
            part(folder)
            act(engine, folder)
        step(engine)
    parallel.leave()


def save(engine: Any, folder: Path) -> None:
    engine.save_checkpoint(folder / "saved")


def load(engine: Any, folder: Path) -> None:
    engine.load_checkpoint(folder / "saved")


def export(engine: Any, folder: Path) -> None:
    engine.save_pretrained(folder / "exported")


def evaluate(engine: Any, folder: Path) -> None:
    engine.evaluate([{"input": torch.ones(2, 2)}])


def end(engine: Any, folder: Path) -> None:
    sys.exit(0)


def fail(engine: Any, folder: Path) -> None:
    raise KeyError("a fault of its own")


def die(engine: Any, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(engine: Any, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hang(engine: Any, folder: Path) -> None:
    time.sleep(LIMIT)


def meet_nobody(engine: Any, folder: Path) -> None:
    barrier(engine.mesh.world)


def tokenize(engine: Any, folder: Path) -> None:
    with engine.phase("tokenizing"):
        time.sleep(TIMEOUT + 3)


def another_config(rank: int, folder: Path) -> None:
    part(folder)
    begun(rank, optimizer=dict(lr=0.5 if rank else 0.1))


def a_bad_config(rank: int, folder: Path) -> None:
    part(folder)
    begun(rank, train=dict(steps=-1 if rank else 1))


def another_model(rank: int, folder: Path) -> None:
    parallel.launch_from_torch(dict(train=dict(device="cpu", timeout_seconds=TIMEOUT)))
    part(folder)
    parallel.initialize(torch.nn.Linear(2, 1, bias=not rank))


def another_rate(rank: int, folder: Path) -> None:
    """A scheduler that one rank alone steps has this effect."""
    parallel.launch_from_torch(dict(train=dict(device="cpu", timeout_seconds=TIMEOUT)))
    model = torch.nn.Linear(2, 1)
    part(folder)
    engine, *_ = parallel.initialize(model, torch.optim.SGD(model.parameters(), lr=0.5 if rank else 0.1))
    step(engine)


def later(rank: int, folder: Path) -> None:
    _, engine = begun(rank)
    step(engine)
    part(folder)
    time.sleep(2.5 * rank)
