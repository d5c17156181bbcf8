"""The error of a run in fp8: the distance of its losses and weights from those of the same model in fp64."""

import math
from collections.abc import Sequence

from torch import Tensor

from tests.parity import Batch, Raw, Trace, engine_of, exported, share_of


def trained(rank: int, world_size: int, raw: Raw, batches: Sequence[Batch]) -> Trace | None:
    """Train on this rank; rank 0 returns the trace, whose losses are those of each sample after the last step.

    So they depend on the weights, and on 8-bit products of an evaluation.
    """
    engine = engine_of(rank, world_size, raw)
    for batch in batches:
        engine.train_step(share_of(batch, engine))
    weights, losses = exported(engine), []
    for sample in batches[0]["input_ids"]:
        losses.append(engine.evaluate([share_of(dict(input_ids=sample.expand(16, -1)), engine)]))
    engine.mesh.close()
    return Trace(losses, weights=weights) if rank == 0 else None


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the Frobenius norm of the difference of all tensors."""
    assert ours.keys() == theirs.keys()
    return math.hypot(*((x.double() - theirs[name].double()).norm().item() for name, x in ours.items()))


def errors(got: Trace, exact: Trace) -> dict[str, float]:
    """Return the distance of a trace from fp64: the norm of the differences of all losses, and that of all weights.

    Both are sums over many roundings. A single loss is the mean of errors of both signs, and right by chance now and
    then: no multiple of its error would be a bound.
    """
    return dict(losses=math.dist(got.losses, exact.losses), weights=apart(got.weights, exact.weights))
