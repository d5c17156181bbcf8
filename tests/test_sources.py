"""The pieces of public tensors: those of all ranks are what numpy makes of the whole parameter, each element once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.shapes import resolve
from parallel.checkpoint import checkpoint
from parallel.checkpoint.hf_folder import write_folder
from parallel.checkpoint.index import Index
from parallel.checkpoint.tensor_file import Entry
from parallel.chunk.chunk import make_chunks
from parallel.chunk.spec import Segment
from parallel.config import parse
from parallel.engine.composition import initial_placement_of
from parallel.engine.context import Place, make_context
from parallel.engine.state import EngineState
from parallel.layout.layout import Layout, ParameterInfo, Piece, slices
from parallel.layout.sources import Box, Source, are_of, by_head, fused, grouped, joined, transposed, whole
from parallel.mesh.mesh import Axis, Traffic
from parallel.optim.adamw import AdamW
from tests.harness import run
from tests.parity import config_of


@dataclass(frozen=True)
class Case:
    """A parameter's sources, and the public tensors that numpy makes of its values."""

    sources: tuple[Source, ...]
    values: np.ndarray[Any, Any]
    public: dict[str, np.ndarray[Any, Any]]


def case_of(kind: str, shape: tuple[int, ...], count: int = 3, **options: Any) -> Case:
    """Return a parameter of this kind: `shape` is that of the public tensors or, of groups, that of a group."""
    is_joined, is_transposed = options.get("is_joined", False), options.get("is_transposed", False)
    names = [f"{options.get('prefix', '')}{letter}" for letter in "qkvabc"][:count]
    if kind == "whole":
        names, full = names[:1], shape
        found = whole(names[0], shape)
        public = {names[0]: numbers(full)}
    elif kind == "fused":
        full = (count, *shape)
        found = fused(names, shape)
        public = {name: numbers(full)[i] for i, name in enumerate(names)}
    else:
        groups, full = options.get("groups", 3), (options.get("groups", 3), *shape)
        ends = [0, *sorted(options.get("cuts", (2, 3))), shape[0]]
        rows = [slice(*pair) for pair in pairwise(ends)]
        names = names[: len(rows)]
        found = grouped(names, [(groups * (r.stop - r.start), *shape[1:]) for r in rows], groups)
        parts = [np.concatenate([group[r] for group in numbers(full)]) for r in rows]
        public = dict(zip(names, parts, strict=True))
    if is_joined:
        found = joined(f"{names[0]}_all", found)
        public = {f"{names[0]}_all": np.concatenate(list(public.values()))}
    if is_transposed:
        found = transposed(found)
        public = {name: x.T for name, x in public.items()}  # of a vector that is the vector
    return Case(found, numbers(full), public)


def numbers(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.arange(1.0, prod(shape) + 1).reshape(shape)


def axis(rank: int, size: int) -> Axis:
    return Axis("planned", rank, size, tuple(range(size)), None, Traffic())


def info_of(name: str, case: Case, coordinates: Sequence[Sequence[tuple[int, int]]]) -> ParameterInfo:
    """Return the parameter of a rank. `coordinates`: for each dim, rank and size of the axes that split it."""
    dims = tuple(tuple(axis(rank, size) for rank, size in of_dim) for of_dim in coordinates)
    layout = Layout(case.values.shape, dims)
    local = np.zeros([size * prod(a.size for a in axes) for size, axes in zip(layout.local_shape, dims, strict=True)])
    local[slices(tuple((0, size) for size in case.values.shape))] = case.values
    for dim, axes in enumerate(dims):  # the outermost axis divides first
        for a in axes:
            local = np.split(local, a.size, dim)[a.rank]
    return ParameterInfo(name, "layer", nn.Parameter(torch.tensor(local)), layout, case.sources)


def ranks_of(sizes: Sequence[Sequence[int]]) -> list[list[list[tuple[int, int]]]]:
    """Return the coordinates of every rank, where the axes that split each dim have these sizes."""
    flat = [size for of_dim in sizes for size in of_dim]
    found = []
    for place in product(*map(range, flat)):
        pairs = iter(zip(place, flat, strict=True))
        found.append([[next(pairs) for _ in of_dim] for of_dim in sizes])
    return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(["whole", "fused", "grouped"]))
    dims = st.lists(st.integers(1, 7), min_size=0 if kind == "whole" else 1, max_size=2 if kind != "whole" else 3)
    shape = tuple(draw(dims))
    cuts = draw(st.lists(st.integers(1, max(1, shape[0] - 1)), unique=True, max_size=2)) if kind == "grouped" else ()
    options: dict[str, Any] = dict(cuts=[cut for cut in cuts if cut < shape[0]], groups=draw(st.integers(1, 4)))
    options["is_joined"] = kind != "whole" and draw(st.booleans())
    options["is_transposed"] = len(shape) < 3 and draw(st.booleans())
    return case_of(kind, shape, 3 if kind == "grouped" else draw(st.integers(1, 4)), **options)


def place(pieces: Sequence[Piece], case: Case, seen: dict[str, np.ndarray[Any, Any]]) -> None:
    """Compare pieces with the public tensors, and count their elements."""
    for piece in pieces:
        wanted = case.public[piece.name]
        assert piece.shape == wanted.shape, f"{piece.name} is {piece.shape}, and not {wanted.shape}"
        assert piece.data.numel() > 0, f"{piece.name}: a piece is empty"
        is_same = np.array_equal(piece.data.numpy(), wanted[slices(piece.box)])
        assert is_same, f"{piece.name}{piece.box} has other values"
        seen.setdefault(piece.name, np.zeros(wanted.shape))[slices(piece.box)] += 1


@settings(max_examples=300)
@given(st.data(), cases())
def test_the_pieces_of_all_ranks_are_the_public_tensors_each_element_once(data: st.DataObject, case: Case) -> None:
    """The ranks' parameters are cut into pieces whole and, as ZeRO does, from flat buffers of consecutive elements."""
    sizes = [data.draw(st.lists(st.integers(1, 3), max_size=2)) for _ in case.values.shape]
    seen: dict[str, np.ndarray[Any, Any]] = {}
    seen_in_parts: dict[str, np.ndarray[Any, Any]] = {}
    assert are_of(case.sources, case.values.shape)
    for coordinates in ranks_of(sizes):
        info = info_of("w", case, coordinates)
        assert info.names == tuple(case.public), f"it has the names {info.names}"
        assert info.is_matrix == all(x.ndim >= 2 for x in case.public.values())
        place(info.pieces(), case, seen)
        flat = info.parameter.detach().flatten()
        cut = data.draw(st.lists(st.integers(0, len(flat)), max_size=2))
        ends = [0, *sorted(cut), len(flat)]
        for start, stop in pairwise(ends):
            place(Segment(info, start, flat[start:stop]).pieces(flat[start:stop]), case, seen_in_parts)
        written = torch.zeros_like(info.parameter)
        for piece in info.pieces(written):
            piece.data.copy_(torch.tensor(case.public[piece.name][slices(piece.box)]))
        assert torch.equal(written, info.parameter), "writing pieces gives another parameter"
    for name in case.public:
        assert (seen[name] == 1).all(), f"{name}: elements are in {np.unique(seen[name])} pieces"
        assert (seen_in_parts[name] == 1).all(), f"{name}: elements are in {np.unique(seen_in_parts[name])} parts"


@settings(max_examples=200)
@given(st.data(), cases())
def test_the_pieces_of_a_rectangle_are_the_elements_in_it(data: st.DataObject, case: Case) -> None:
    info = info_of("w", case, [[(0, 1)]] * case.values.ndim)
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in case.values.shape]
    part: Box = tuple((start, stop) for start, stop in ends)
    inside = torch.tensor(case.values[slices(part)])
    seen: dict[str, np.ndarray[Any, Any]] = {}
    place(info.pieces(inside, part), case, seen)
    assert sum(int(count.sum()) for count in seen.values()) == inside.numel()


def test_sources_that_are_not_of_a_parameter_are_noticed() -> None:
    good = transposed(joined("c_attn", fused(["q", "k", "v"], (4, 6))))
    q, k, v = good
    assert are_of(good, (3, 4, 6))
    assert not are_of(good, (3, 4, 7))
    assert not are_of((q, k), (3, 4, 6))
    assert not are_of((q, k, k), (3, 4, 6))
    assert not are_of((q, k, replace(v, first=9)), (3, 4, 6)), "its columns would end after those of the public tensor"
    assert not are_of((q, k, replace(v, transposed=False)), (3, 4, 6))
    assert are_of(joined("c_attn", transposed(fused(["q", "k", "v"], (4, 6)))), (3, 4, 6))
    assert joined("c_attn", transposed(fused(["q", "k", "v"], (4, 6)))) == good


# -- files -------------------------------------------------------------------------------------------------------------

KINDS = {
    "matrix": case_of("whole", (6, 5), prefix="matrix."),
    "vector": case_of("whole", (7,), prefix="vector."),
    "fused": case_of("fused", (4, 6), prefix="fused."),
    "fused_bias": case_of("fused", (4,), prefix="fused_bias."),
    "grouped": case_of("grouped", (10, 5), groups=4, cuts=(6, 8), prefix="grouped."),
    "grouped_bias": case_of("grouped", (10,), groups=4, cuts=(6, 8), prefix="grouped_bias."),
    "transposed": case_of("whole", (6, 5), is_transposed=True, prefix="transposed."),
    "joined": case_of("fused", (4, 6), is_joined=True, is_transposed=True, prefix="joined."),
    "joined_bias": case_of("fused", (4,), is_joined=True, is_transposed=True, prefix="joined_bias."),
}
PUBLIC = {name: torch.tensor(x) for case in KINDS.values() for name, x in case.public.items()}


def infos_of(split: str, rank: int, size: int) -> list[ParameterInfo]:
    """Return every kind of parameter on a rank; its `first` dim, or its `last`, is split."""
    infos = []
    for name, case in KINDS.items():
        dims: list[list[tuple[int, int]]] = [[] for _ in case.values.shape]
        dims[0 if split == "first" else -1] = [(rank, size)]
        infos.append(info_of(name, case, dims))
    return infos


def save_and_export(rank: int, size: int, split: str, folder: Path) -> None:
    """Save the pieces of all kinds of parameters, and export them."""
    world = Axis("world", rank, size, tuple(range(size)), dist.group.WORLD, Traffic())
    pieces = [piece for info in infos_of(split, rank, size) for piece in info.pieces()]
    checkpoint.save(checkpoint.step_folder(folder, 1), pieces, metadata={}, axis=world, keep=1)
    entries = [Entry(name, tuple(x.shape), torch.float64) for name, x in PUBLIC.items()]
    write_folder(folder / "export", pieces, entries, axis=world, describe=lambda _: None)


@pytest.mark.parametrize("split", ["first", "last"])
def test_files_have_the_public_tensors_of_every_kind_of_parameter(tmp_path: Path, split: str) -> None:
    """Two ranks write them. One rank and each of three read them, with either dim split, no byte twice."""
    from safetensors.torch import load_file

    run(save_and_export, 2, split, tmp_path)
    exported = load_file(tmp_path / "export" / "model.safetensors")
    assert exported.keys() == PUBLIC.keys()
    for name, wanted in PUBLIC.items():
        assert torch.equal(exported[name], wanted), f"{name} is exported with other values"
    for other, size in (("first", 1), ("first", 3), ("last", 3)):
        for rank in range(size):
            for info in infos_of(other, rank, size):
                found = torch.zeros_like(info.parameter)
                num_bytes = checkpoint.load(checkpoint.step_folder(tmp_path, 1), info.pieces(found))
                assert torch.equal(found, info.parameter), f"{info.name} on rank {rank} of {size} is read otherwise"
                assert num_bytes == 8 * sum(piece.data.numel() for piece in info.pieces()), info.name


# -- the state of an engine --------------------------------------------------------------------------------------------

HALVES = joined("both", (*whole("upper", (4, 3)), *whole("lower", (2, 3))))
STATE = PUBLIC | {"both": torch.arange(18.0, dtype=torch.float64).view(6, 3)}
FROZEN = ("grouped", "transposed")


def engine_of(rank: int, size: int, stage: int) -> EngineState:
    """Return an engine of zeros: every kind of parameter on all ranks, and one public tensor in two parameters.

    The first half of it is saved by the first rank, the second half by the last one, unless ZeRO divides them.
    """
    raw = config_of({}, train=dict(micro_batch_size=2), zero=dict(stage=stage))
    context = make_context(parse(raw, world_size=size, resolve=resolve), Place(rank, size, rank, size))
    parameters = {name: (case.values.shape, case.sources) for name, case in KINDS.items()}
    parameters |= {"upper": ((4, 3), HALVES[:1]), "lower": ((2, 3), HALVES[1:])}
    infos = []
    for name, (shape, found) in parameters.items():
        layout = Layout(shape, ((),) * len(shape), sync=(context.mesh.axis("data"),))
        if name == "lower":
            layout = Layout(shape, ((), ()), copies=(axis(size - 1 - rank, size),))
        parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float64), requires_grad=name not in FROZEN)
        infos.append(ParameterInfo(name, "layer", parameter, layout, found))
    placement = initial_placement_of(infos, context)
    chunks = make_chunks(placement.specs, placement.storages)
    return EngineState(nn.Identity(), context, chunks, AdamW(chunks, context.config.optimizer), placement)


def value_of(piece: Piece) -> Tensor:
    """Return what a piece of the state is to hold: other values in each kind of state."""
    kind, name = piece.name.split("/")
    return STATE[name][slices(piece.box)] + {"master": 0.0, "exp_avg": 0.25, "exp_avg_sq": 0.5}[kind]


def save_states(rank: int, size: int, folder: Path) -> None:
    """Save the state of an engine in ZeRO stage 0, and in stage 1."""
    for stage in (0, 1):
        engine = engine_of(rank, size, stage)
        for piece in engine.state_pieces():
            piece.data.copy_(value_of(piece))
        engine.restore(engine.counters())
        engine.save_checkpoint(folder / str(stage))
        kept = engine.state_dict()
        again = engine_of(rank, size, stage)
        again.load_state_dict(kept)
        for piece in again.state_pieces():
            assert torch.equal(piece.data, value_of(piece)), f"{piece.name} of a state_dict"


def load_states(rank: int, size: int, folder: Path) -> None:
    """Load each state in another stage, and compare it and the parameters."""
    for saved, stage in ((0, 1), (1, 0)):
        engine = engine_of(rank, size, stage)
        engine.load_checkpoint(folder / str(saved))
        for piece in engine.state_pieces():
            assert torch.equal(piece.data, value_of(piece)), f"{piece.name} of stage {saved} in stage {stage}"
        for info in (info for chunk in engine.chunks for info in chunk.infos):
            for piece in info.pieces():
                assert torch.equal(piece.data, STATE[piece.name][slices(piece.box)]), f"{piece.name} of {info.name}"


def test_a_state_of_every_kind_of_parameter_is_loaded_in_another_layout(tmp_path: Path) -> None:
    """Frozen parameters have weights alone. A public tensor that is in two parameters has two owners in stage 0."""
    run(save_states, 2, tmp_path)
    for stage in (0, 1):
        folder = checkpoint.step_folder(tmp_path / str(stage), 0)
        assert checkpoint.read_metadata(folder)["frozen"] == sorted(x for k in FROZEN for x in KINDS[k].public)
        names = {name.partition("/")[2] for name in Index.read(folder).shapes}
        assert names == STATE.keys()
    run(load_states, 1, tmp_path)
    run(load_states, 3, tmp_path)


@pytest.mark.parametrize("rest", [(), (5,)])
def test_sources_by_head_are_what_gpt_neox_makes_of_its_joint_tensor(rest: tuple[int, ...]) -> None:
    """Its model views the rows as [heads, 3 · D] and cuts these in three: q, k and v of each head."""
    heads, size = 4, 2
    public = np.arange(3 * heads * size * prod(rest)).reshape(3 * heads * size, *rest)
    wanted = np.stack(np.split(public.reshape(heads, 3 * size, *rest), 3, 1)).reshape(3, heads * size, *rest)
    sources = by_head("query_key_value", public.shape, 3, heads)
    assert are_of(sources, wanted.shape)
    for source in sources:
        box = tuple(slice(*bounds) for bounds in source.box)
        assert np.array_equal(wanted[box][0], public[slice(*source.rows)])
