"""Collectives for a user's own loop: those of `parallel.mesh.collectives`, over an axis such as `engine.data`."""

from parallel.mesh.collectives import all_gather, all_reduce, barrier, broadcast, gather_objects, reduce_scatter

__all__ = ["all_gather", "all_reduce", "barrier", "broadcast", "gather_objects", "reduce_scatter"]
