"""The short public forms: what a user calls without naming an axis, for the current context says it."""

from collections.abc import Iterator
from contextlib import contextmanager

from parallel.context import current, environment
from parallel.mesh import ALONE
from parallel.zero.construction import construction


@contextmanager
def sharded_init() -> Iterator[None]:
    """A block in which models are loaded or constructed, without any rank ever holding one whole.

        with parallel.sharded_init():
            model = OPTForCausalLM.from_pretrained(path)

    In ZeRO stage 3 each data-parallel rank keeps a slice of every parameter; otherwise the model comes out whole. Its
    values are the same in every stage, on any number of ranks: random ones follow from the first rank's torch
    generator. Every rank enters and leaves the block together. Raises DataError for a tensor that is not in the files.
    """
    context = current()
    replicas = context.mesh.axis("data")
    over = replicas if context.config.zero.stage == 3 else ALONE
    # By default transformers reads all tensors ahead, in threads.
    with environment(HF_DEACTIVATE_ASYNC_LOAD="1"), construction(replicas, over):
        yield
