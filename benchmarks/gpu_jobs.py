"""What all jobs of `benchmarks.multi_gpu` share: a job is run by all ranks together, and returns rows of the table."""

import gc
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from parallel.config import Config
from parallel.engine.context import Context, Place, make_context

Row = dict[str, Any]
"""A row of the table: a part, a name and a note, and whatever figures the part has."""


@dataclass(frozen=True)
class RankSetup:
    """A rank, the number of ranks, this rank's device, and the folder for files.

    `tiny`: whether models are so small that a CPU trains them in a moment. `bytes_before`: what was in use on the
    device before there was a process group.
    """

    rank: int
    world: int
    device: torch.device
    out: Path
    tiny: bool
    bytes_before: int = 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def context(self, config: Config) -> Context:
        """Return the context of all ranks."""
        return make_context(config, Place(self.rank, self.world, self.rank, self.world))


class Job(Protocol):
    """A part of the work. `seconds`: how long it may take, where that is longer than other jobs may."""

    @property
    def part(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def seconds(self) -> float: ...

    def run(self, setup: RankSetup) -> list[Row]:
        """Do the work; called on every rank. The first rank's rows are those of the table."""


def meet(setup: RankSetup) -> None:
    """Wait until every rank is here and its device has nothing left to do."""
    if setup.on_gpu:
        torch.cuda.synchronize()
    dist.barrier()
    if setup.on_gpu:
        torch.cuda.synchronize()


def clean(setup: RankSetup) -> None:
    """Free the device memory that nothing uses any more, and forget compiled code, of which torch keeps a few only."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if setup.on_gpu:
        torch.cuda.empty_cache()


def bytes_beside_torch(setup: RankSetup) -> int:
    """Return the bytes in use on the device that are not in torch's allocator; on a CPU there are none."""
    if not setup.on_gpu:
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def write_rows(out: Path, rows: list[Row]) -> None:
    """Write all rows to results.json, which is complete at any time."""
    temporary = out / ".results.json"
    temporary.write_text(json.dumps(rows, indent=1))
    os.replace(temporary, out / "results.json")
