"""Context parallelism: a sequence is split over ranks, and a table lists the ways to attend across all of them."""

from parallel.config import ContextConfig
from parallel.mesh.mesh import Mesh
from parallel.sequence.blocks import AttentionDropout, Masking
from parallel.sequence.documents import Documents
from parallel.sequence.split import UNSPLIT, AllToAll, Ring, SequenceSplit

__all__ = ["KINDS", "UNSPLIT", "AttentionDropout", "Documents", "Masking", "SequenceSplit", "sequence_of"]

KINDS: dict[str | None, type[SequenceSplit]] = {None: SequenceSplit, "ring": Ring, "all_to_all": AllToAll}


def sequence_of(mesh: Mesh, config: ContextConfig, *, compiles: bool = False) -> SequenceSplit:
    """Return how sequences are split on this mesh: not at all if the context axis has size 1."""
    return KINDS[config.kind if config.size > 1 else None](mesh.axis("context"), compiles=compiles)
