"""Any layout goes on from what any other has saved: every ordered pair of fourteen, to the last bit.

A layout's first checkpoint, after two steps, is loaded in each of the others and saved again there at once. Whole
tensors of both, weights and moments, have the same bits. The engine that loads holds other values before, and each of
its own pieces must be overwritten.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint import checkpoint
from parallel.checkpoint.index import Index
from parallel.checkpoint.tensor_file import Entry
from parallel.checkpoint.verify import verify
from parallel.engine.engine import Engine
from parallel.mesh.mesh import ALONE
from parallel.placement.policy import host_bytes
from parallel.storage.transfer import Tier
from tests.families import SHAPES
from tests.harness import run
from tests.parity import Raw, batches_of, config_of, share_of
from tests.test_disk import engine_in_parts
from tests.test_parity import LAYOUTS

HOST: Raw = dict(tensor_placement_policy="cpu")
DISK: Raw = HOST | dict(nvme_dir="")
OPT: dict[str, tuple[str, Raw]] = {  # name: that of the layout in test_parity, zero section
    "single": ("single", {}),
    "1d4": ("1d4", {}),
    "2d2x3": ("2d2x3", {}),
    "2.5d8-depth2": ("2.5d8-depth2", {}),
    "3d8": ("3d8", {}),
    "pp4-uneven": ("pp4-uneven", {}),
    "pp2-1d2": ("pp2-1d2", dict(stage=1)),
    "dp2-zero1": ("dp2", dict(stage=1)),
    "dp2-pp2-1d2-zero2": ("dp2-pp2-1d2", dict(stage=2)),
    "dp2-zero3-host": ("dp2", dict(stage=3) | HOST),
    "ring3": ("ring3", dict(stage=3)),
    "pp2-interleaved": ("pp2-interleaved", {}),
    "dp2-pp2-zbv-zero3": ("dp2-pp2-zbv", dict(stage=3)),
    "dp2-zero1-disk": ("dp2", dict(stage=1) | DISK),
}
LLAMA: dict[str, tuple[str, Raw]] = {  # q, k and v are one parameter, which layouts cut by groups of heads
    name: OPT[name] for name in ("single", "2d2x3", "3d8", "pp2-1d2", "ring3", "dp2-zero3-host")
}
LAYOUTS_OF = {"opt": OPT, "llama": LLAMA}
KINDS = {"master", "exp_avg", "exp_avg_sq"}
OTHER_VALUE = -7.0


def raw_of(family: str, name: str) -> tuple[int, Raw]:
    """Return the world size and the config of a layout."""
    layout, zero = LAYOUTS_OF[family][name]
    world_size, parallel = LAYOUTS[layout]
    micro = 2 if layout.startswith("dp2") else 4
    model = SHAPES[family] | dict(name=f"{family}-tiny")
    train = dict(micro_batch_size=micro, device="cpu")
    return world_size, config_of(parallel, precision="fp32", model=model, zero=zero, train=train)


def engine_in(rank: int, world_size: int, family: str, name: str, folder: Path) -> Engine:
    """Return the engine of a layout, on one that has a disk with all states there."""
    _, raw = raw_of(family, name)
    zero = raw["zero"]
    if "nvme_dir" in zero:
        disk = folder / f"disk of {name} {rank}"
        disk.mkdir(exist_ok=True)
        planned = engine_in_parts(rank, world_size, raw | dict(zero=zero | dict(nvme_dir=str(disk))))
        host = host_bytes(planned.placement_manager.initial.sizes, 0, 0, 0)  # room for no states
        raw = raw | dict(zero=zero | dict(nvme_dir=str(disk), host_memory=host))
    engine = engine_in_parts(rank, world_size, raw)
    assert (Tier.DISK in {chunk.placement.states for chunk in engine.chunks}) == ("nvme_dir" in zero)
    return engine


def save(engine: Engine, folder: Path) -> None:
    pieces, metadata = engine.state_pieces(owned=True), dict(counters=engine.counters())
    checkpoint.save(folder, pieces, metadata=metadata, axis=engine.mesh.world, keep=99)


def train_and_save(rank: int, world_size: int, family: str, names: list[str], folder: Path) -> None:
    """Take two steps in each of these layouts, and save them as folder/NAME/step_000002."""
    for name in names:
        engine = engine_in(rank, world_size, family, name, folder)
        for batch in batches_of(2):
            engine.train_step(share_of(batch, engine))
        save(engine, folder / name / "step_000002")


def load_and_save(rank: int, world_size: int, family: str, names: list[str], folder: Path) -> list[str]:
    """Load the checkpoint of each other layout in each of these, and save it as folder/OTHER/step_NUMBER.

    Return the pieces of an engine that a load has not overwritten.
    """
    kept = []
    for name in names:
        engine = engine_in(rank, world_size, family, name, folder)
        for other in LAYOUTS_OF[family]:
            if other == name:
                continue
            for piece in engine.state_pieces():
                piece.data.fill_(OTHER_VALUE)
            index = Index.read(folder / other / "step_000002")
            index.archive.read_into(engine.state_pieces())
            engine.restore(index.metadata["counters"])
            kept += [f"{name}: {p.name}" for p in engine.state_pieces() if bool((p.data == OTHER_VALUE).any())]
            save(engine, folder / other / number_of(family, name))
    return kept


def number_of(family: str, name: str) -> str:
    return f"step_{100 + [*LAYOUTS_OF[family]].index(name):06d}"


def by_world(family: str) -> Iterable[tuple[int, list[str]]]:
    """Return the layouts of each world size, which share their processes."""
    found = defaultdict[int, list[str]](list)
    for name in LAYOUTS_OF[family]:
        found[raw_of(family, name)[0]].append(name)
    return sorted(found.items())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the whole tensors of a checkpoint, as bits."""
    index = Index.read(folder)
    verify(index, ALONE)
    entries = [Entry(name, shape, torch.float32) for name, shape in index.shapes.items()]
    return {piece.name: piece.data.view(torch.int32) for piece in checkpoint.whole_tensors(index, entries)}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_every_layout_goes_on_from_what_every_other_has_saved_bit_for_bit(family: str, tmp_path: Path) -> None:
    for world_size, names in by_world(family):
        run(train_and_save, world_size, family, names, tmp_path, timeout=600)
    for world_size, names in by_world(family):
        kept: list[Any] = run(load_and_save, world_size, family, names, tmp_path, timeout=600)
        assert kept == [[]] * world_size
    num_pairs = 0
    for name in LAYOUTS_OF[family]:
        wanted = tensors_of(tmp_path / name / "step_000002")
        assert {tensor.partition("/")[0] for tensor in wanted} == KINDS
        assert all(bool(x.any()) for tensor, x in wanted.items() if tensor.startswith("exp_avg_sq"))
        for other in set(LAYOUTS_OF[family]) - {name}:
            got = tensors_of(tmp_path / name / number_of(family, other))
            assert got.keys() == wanted.keys(), (name, other)
            differing = [tensor for tensor, x in wanted.items() if not torch.equal(got[tensor], x)]
            assert not differing, (name, other, differing)
            num_pairs += 1
    assert num_pairs == len(LAYOUTS_OF[family]) * (len(LAYOUTS_OF[family]) - 1)
