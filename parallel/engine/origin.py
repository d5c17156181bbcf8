"""The words about where a number that is not finite has come from, by two runs of one step."""

from collections.abc import Callable, Sequence

import torch

from parallel.chunk.chunk import Chunk
from parallel.errors import names_text
from parallel.layout.finite import is_finite
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis, Mesh
from parallel.modules.first_not_finite import FirstNotFinite
from parallel.ops.compiling import not_yet_compiled
from parallel.optim.grad_norm import global_norm
from parallel.optim.gradients import Gradients


def chunks_not_finite(chunks: Sequence[Chunk], world: Axis) -> list[str]:
    """Return the layers whose part of the norm was not finite in this step, and the rank that has that part.

    They are the terms of which the norm has been made, so nothing is computed for them. Every rank calls this.
    """
    terms = [(chunk, chunk.gradient.counted) for chunk in chunks if chunk.gradient.counted is not None]
    flags = torch.stack([term.isfinite() for _, term in terms]).tolist() if terms else []
    own = [
        chunk.infos[0].unit or chunk.infos[0].name for (chunk, _), flag in zip(terms, flags, strict=True) if not flag
    ]
    everywhere = gather_objects(list(dict.fromkeys(own)), world)
    return [f"{layer} on rank {rank}" for rank, layers in enumerate(everywhere) for layer in layers]


def origin_of(
    run: Callable[[], object],
    first: FirstNotFinite,
    *,
    chunks: Sequence[Chunk],
    gradients: Gradients,
    mesh: Mesh,
    compiles: bool,
) -> str:
    """Run a step again that has updated nothing, and return where it began not to be finite, the same on every rank.

    `run` computes the `gradients` of the step in the `chunks`, which are dropped; `first` watches it. `compiles`: some
    layers are compiled, and are run as they are written here. Every rank calls this.
    """
    suspects = chunks_not_finite(chunks, mesh.world)
    with not_yet_compiled(compiles), first.watching(), gradients.watching(first.arrived):
        run()
    return _origin_text(chunks, mesh, first, suspects)


def _origin_text(chunks: Sequence[Chunk], mesh: Mesh, first: FirstNotFinite, suspects: Sequence[str]) -> str:
    """Return where a step began not to be finite, which `first` has watched in its second run.

    The chunks have the gradients of this run; `suspects` are the layers that were not finite in the first one.
    """
    trained = [chunk for chunk in chunks if not chunk.is_frozen]
    found = first.first_of_all_ranks(mesh.world)
    norm = global_norm(trained, mesh.world).item()
    flags = gather_objects(all(bool(is_finite(chunk.gradient.on_device())) for chunk in trained), mesh.world)
    for chunk in trained:
        chunk.drop_gradient()
    if found is not None:
        return str(found)
    if not torch.tensor(norm).isfinite():
        if all(flags):
            return "every gradient is finite, and the norm of all is larger than the numbers that it is made of can be."
        return "every gradient is finite on its rank, and a sum over ranks or microbatches is not."
    where = f". The first time the gradients of {names_text(suspects)} were not finite" if suspects else ""
    return f"the step was finite when it was run again, which points to memory or a device that fails{where}."


def parts_text(suspects: Sequence[str]) -> str:
    """Return which gradients are not finite, where the forwards of a step cannot be run again."""
    return f"the gradients of {names_text(suspects)} are not finite." if suspects else "every gradient is finite."
