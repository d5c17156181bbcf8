"""Which buffers of a chunk are one memory."""

from enum import Enum

from parallel.chunk.spec import ChunkSpec
from parallel.storage.transfer import Placement, Tier


class Sharing(Enum):
    """Which of a chunk's whole buffer, this rank's slice of the parameters and its master weights are one memory.

    The slice is a view of the whole buffer, unless that has memory only while the parameters are in use. The master
    weights are the slice, unless they are wider than it or on another tier.
    """

    ALL = (True, True)
    SLICE_IN_WHOLE = (True, False)
    MASTERS_IN_SLICE = (False, True)
    NONE = (False, False)

    @classmethod
    def of(cls, spec: ChunkSpec, placement: Placement) -> "Sharing":
        """Return what a chunk shares in a placement. Nothing else decides it, and `Chunk.move_to` keeps to it."""
        slice_is_view = not spec.is_partitioned and placement.parameters is not Tier.HOST
        return cls((slice_is_view, spec.is_wide and placement.states is placement.parameters))

    @property
    def slice_is_view(self) -> bool:
        """Whether this rank's slice is a view of the whole buffer."""
        return self.value[0]

    @property
    def masters_are_slice(self) -> bool:
        """Whether the master weights are this rank's slice: then writing them writes the parameters."""
        return self.value[1]
