"""The bytes that a chunk takes: foreseen before it is made, and corrected once a step has been profiled."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from parallel.chunk.chunk import Chunk
from parallel.chunk.precision import gradient_dtype, moment_dtype, state_size
from parallel.chunk.spec import Outline
from parallel.config import OptimizerConfig
from parallel.optim import streaming
from parallel.placement.policy import ChunkBytes
from parallel.storage import swapper
from parallel.storage.state_file import in_pages


def foreseen_bytes(
    outline: Outline, num_microbatches: int, optimizer: OptimizerConfig, *, is_torchs: bool = False
) -> ChunkBytes:
    """Return the bytes of a chunk that is yet to be made, in steps of this many microbatches.

    `is_torchs`: the user passed an optimizer of torch's. It takes all gradients at once, in the precision of the master
    weights, and it updates states on a disk as mapped memory, without slots.
    """
    count, narrow, wide = outline.num_own, outline.dtype.itemsize, outline.wide.itemsize
    whole = outline.size * narrow
    if outline.is_frozen:
        return ChunkBytes(whole, 0, 0, host_parameters=count * narrow)
    dtype = gradient_dtype(outline.dtype, outline.axes, num_microbatches)
    widths = wide, *[moment_dtype(outline.wide, optimizer).itemsize] * 2
    part = min(count, streaming.PART)
    return ChunkBytes(
        whole,
        count * dtype.itemsize,
        count * state_size(outline.wide, optimizer),
        host_parameters=count * narrow,
        wide_gradient=count * wide if is_torchs and dtype.itemsize < wide else 0,
        slots=0 if is_torchs else swapper.NUM_SLOTS * sum(in_pages(part * width) for width in widths),
        has_master_dtype=outline.dtype == outline.wide,
        reuses_parameters=num_microbatches == 1 and dtype == outline.dtype,
    )


def measured_bytes(
    foreseen: Sequence[ChunkBytes], chunks: Sequence[Chunk], state_bytes: Callable[[Chunk], int]
) -> list[ChunkBytes]:
    """Return the bytes of chunks with the gradients and the states that they had in a step.

    A user's own loop has a number of microbatches of its own, and a user's own optimizer has states of its own.
    """
    return [
        replace(size, gradient=chunk.gradient_bytes, states=state_bytes(chunk))
        for size, chunk in zip(foreseen, chunks, strict=True)
    ]
