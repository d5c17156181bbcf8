"""The collectives of `parallel.mesh.collectives` for a user's own loop, over an axis such as `engine.data`."""

from parallel.mesh.collectives import all_gather, all_reduce, barrier, broadcast, gather_objects, reduce_scatter

__all__ = ["all_gather", "all_reduce", "barrier", "broadcast", "gather_objects", "reduce_scatter"]
