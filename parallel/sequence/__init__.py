"""Context parallelism: a sequence split over ranks, one table of the ways to attend across them all."""

from parallel.config import ContextConfig
from parallel.mesh.mesh import Mesh
from parallel.sequence.blocks import Dropping, Masking
from parallel.sequence.split import WHOLE, AllToAll, Ring, SequenceSplit

__all__ = ["KINDS", "WHOLE", "Dropping", "Masking", "SequenceSplit", "sequence_of"]

KINDS: dict[str | None, type[SequenceSplit]] = {None: SequenceSplit, "ring": Ring, "all_to_all": AllToAll}


def sequence_of(mesh: Mesh, config: ContextConfig, *, compiles: bool = False) -> SequenceSplit:
    """How sequences are split on this mesh; over a single rank, not at all."""
    return KINDS[config.kind if config.size > 1 else None](mesh.axis("context"), compiles=compiles)
