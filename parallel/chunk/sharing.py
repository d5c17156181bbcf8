"""The names for which buffers of a chunk share their memory."""

from enum import Enum

from parallel.chunk.spec import ChunkSpec
from parallel.storage.transfer import Placement, Tier


class Sharing(Enum):
    """The buffers of a chunk that share one memory: the whole buffer, this rank's slice of the parameters, and its
    master weights.

    The slice is a view of the whole buffer, unless the whole buffer has memory only while the parameters are in use.
    The master weights are the slice, unless they are wider than the slice or on another tier.
    """

    ALL = (True, True)
    SLICE_IN_WHOLE = (True, False)
    MASTERS_IN_SLICE = (False, True)
    NONE = (False, False)

    @classmethod
    def of(cls, spec: ChunkSpec, placement: Placement) -> "Sharing":
        """Return what a chunk shares in a placement: nothing else decides it. Only `Chunk.move_to` changes it."""
        slice_is_view = not spec.is_partitioned and placement.parameters is not Tier.HOST
        return cls((slice_is_view, spec.is_wide and placement.states is placement.parameters))

    @property
    def slice_is_view(self) -> bool:
        """True if this rank's slice is a view of the whole buffer."""
        return self.value[0]

    @property
    def masters_are_slice(self) -> bool:
        """True if the master weights are this rank's slice: then writing them writes the parameters."""
        return self.value[1]
