"""The scales of a model's 8-bit linears: which linears have some, and those of all pipeline stages together."""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.chunk.eight_bits import EightBitWeights
from parallel.config import TrainConfig
from parallel.engine.context import Context
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Mesh
from parallel.pipeline.part import ModelPart
from parallel.tensor.fp8_matmul import WeightCopy
from parallel.tensor.layers import Linear
from parallel.tensor.scaling import Histories, Scaling, TensorScale


class ChunkWeight(WeightCopy):
    """The weight of a linear in 8 bits: a view of what its chunk has gathered so, or a copy of the parameter.

    With `is_kept` a copy is kept for a step, else each use casts.
    """

    def __init__(self, scale: TensorScale, chunk: Chunk, number: int, *, is_kept: bool) -> None:
        super().__init__(scale)
        self.chunk, self.number, self.is_kept = chunk, number, is_kept

    def rows(self, w: Tensor, amax: Tensor | None, *, trains: bool) -> Tensor:
        """Return [N', K'']; see `WeightCopy`."""
        weights = self.chunk.parameters.eight_bits
        view = None if weights is None else weights.view(self.number)
        return super().rows(w, amax, trains=trains) if view is None else view.flatten(0, -2)


def eight_bit_linears(part: ModelPart, train: TrainConfig) -> dict[nn.Parameter, Linear]:
    """Return the linears of this rank that multiply in 8 bits, by their weights.

    They are those of blocks whose whole weight is large enough (`train.fp8_min_elements`), so that they are the same in
    every layout. The head, and projections beside the embedding, stay in bf16: a logit that is rounded to 3 bits is the
    loss itself, and no norm follows it.
    """
    modules = [module for unit in part.units.values() for module in unit.modules()]
    linears = [module for module in modules if isinstance(module, Linear)]
    return {x.weight: x for x in linears if train.multiplies_in_8_bits(prod(x.layouts["weight"].shape))}


def scaling_of(part: ModelPart, chunks: Sequence[Chunk], context: Context) -> Scaling | None:
    """Give each linear that multiplies in 8 bits its scales, and return those of all; None in another precision."""
    train = context.config.train
    if train.precision != "fp8":
        return None
    linears = eight_bit_linears(part, train)
    infos = [info for chunk in chunks for info in chunk.infos if info.parameter in linears]
    mesh = context.mesh
    axes = [mesh.axis(name) for name in mesh.topology.shape if name != "pipe"]
    scaling = Scaling([info.names for info in infos], axes, mesh.device)
    scales_of = dict(zip((info.parameter for info in infos), scaling.linears, strict=True))
    # A plan of a placement counts no copies: in the step by which it is made all weights are gathered on demand.
    keeps = context.config.zero.tensor_placement_policy == "cuda"
    for chunk in chunks:
        is_kept = keeps and not chunk.spec.is_partitioned
        found = [scales_of.get(info.parameter) for info in chunk.infos]
        scales = [x for x in found if x is not None]
        for number, info in enumerate(chunk.infos):
            if (of_linear := found[number]) is not None:
                copy = ChunkWeight(of_linear.weight, chunk, number, is_kept=is_kept)
                linears[info.parameter].multiply_in_8_bits(of_linear, copy)
                scaling.copies.append(copy)
        if len(scales) == len(found) and chunk.spec.is_partitioned:
            chunk.parameters.eight_bits = EightBitWeights(chunk.spec, scales)
            scaling.copies.append(chunk.parameters.eight_bits)
    return scaling


def histories_of_all(scaling: Scaling, mesh: Mesh) -> Histories:
    """Return the histories of all pipeline stages, by the public names of weights. Every rank calls this."""
    parts = gather_objects(scaling.histories(), mesh.axis("pipe"))
    return {name: history for part in parts for name, history in part.items()}


def restore_scales(scaling: Scaling, saved: Histories, mesh: Mesh) -> list[str]:
    """Go on from histories by the public names of weights, if all weights of all pipeline stages have one there; else
    all scales start anew, so that the next step is the same in every layout. Every rank calls this.

    Returns the names of the weights that have none, where some have one: that happens if more linears multiply in 8
    bits than did when it was saved.
    """
    missing = {name for names in scaling.names for name in names} - saved.keys()
    missing = set().union(*gather_objects(missing, mesh.axis("pipe")))
    scaling.restore({} if missing else saved)
    return sorted(missing) if saved else []
