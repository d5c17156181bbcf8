"""The bytes that a chunk takes: foreseen before it is made, and corrected once a step has been profiled."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from parallel.chunk.chunk import Chunk
from parallel.chunk.precision import gradient_dtype, moment_dtype, state_size
from parallel.chunk.spec import ChunkSpec
from parallel.config import OptimizerConfig
from parallel.optim import streaming
from parallel.placement.policy import ChunkBytes
from parallel.storage import swapper
from parallel.storage.state_file import in_pages


def foreseen_bytes(
    spec: ChunkSpec, num_microbatches: int, optimizer: OptimizerConfig, *, is_torchs: bool = False
) -> ChunkBytes:
    """Return the bytes of a chunk that is yet to be made, in steps of this many microbatches.

    `is_torchs`: the user passed an optimizer of torch's. It takes all gradients at once, in the precision of the master
    weights, and it updates states on a disk as mapped memory, without slots.
    """
    count, narrow, wide = spec.num_own, spec.dtype.itemsize, spec.master_dtype.itemsize
    whole = spec.size * narrow
    if spec.is_frozen:
        return ChunkBytes(whole, 0, 0, host_parameters=count * narrow)
    dtype = gradient_dtype(spec.dtype, spec.axes, num_microbatches)
    widths = wide, *[moment_dtype(spec.master_dtype, optimizer).itemsize] * 2
    part = min(count, streaming.PART)
    return ChunkBytes(
        whole,
        count * dtype.itemsize,
        count * state_size(spec.master_dtype, optimizer),
        host_parameters=count * narrow,
        wide_gradient=count * wide if is_torchs and dtype.itemsize < wide else 0,
        slots=0 if is_torchs else swapper.NUM_SLOTS * sum(in_pages(part * width) for width in widths),
        has_master_dtype=spec.is_wide,
        reuses_parameters=num_microbatches == 1 and dtype == spec.dtype,
    )


def measured_bytes(
    foreseen: Sequence[ChunkBytes], chunks: Sequence[Chunk], state_bytes: Callable[[Chunk], int]
) -> list[ChunkBytes]:
    """Return the bytes of chunks with the gradients and the states that they had in a step.

    A user's own loop has a number of microbatches of its own, and a user's own optimizer has states of its own.
    """
    return [
        replace(size, gradient=chunk.gradient.num_bytes, states=state_bytes(chunk))
        for size, chunk in zip(foreseen, chunks, strict=True)
    ]
