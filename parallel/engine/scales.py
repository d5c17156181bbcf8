"""The scales of a model's 8-bit linears: which linears have some, and those of all pipeline stages together."""

from collections.abc import Sequence

from parallel.chunk.chunk import Chunk
from parallel.engine.context import Context
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Mesh
from parallel.pipeline.part import ModelPart
from parallel.tensor.layers import Linear
from parallel.tensor.scaling import Histories, Scaling


def scaling_of(part: ModelPart, chunks: Sequence[Chunk], context: Context) -> Scaling | None:
    """Give each linear that multiplies in 8 bits its scales, and return those of all; None in another precision.

    They are the linears of blocks. The head, and projections beside the embedding, stay in bf16: a logit that is
    rounded to 3 bits is the loss itself, and there is no norm after it.
    """
    if context.config.train.precision != "fp8":
        return None
    mesh, infos = context.mesh, {info.parameter: info for info in part.infos}
    is_gathered = {info.parameter: chunk.is_gathered_on_demand for chunk in chunks for info in chunk.infos}
    linears = [module for unit in part.units.values() for module in unit.modules() if isinstance(module, Linear)]
    axes = [mesh.axis(name) for name in mesh.topology.shape if name != "pipe"]
    scaling = Scaling([infos[linear.weight].names for linear in linears], axes, mesh.device)
    for linear, scales in zip(linears, scaling.linears, strict=True):
        linear.multiply_in_8_bits(scales)
        assert linear.eight_bit is not None
        linear.eight_bit.weight.is_kept = not is_gathered[linear.weight]
        scaling.copies.append(linear.eight_bit.weight)
    return scaling


def histories_of_all(scaling: Scaling, mesh: Mesh) -> Histories:
    """Return the histories of all pipeline stages, by the public names of weights. Every rank calls this."""
    parts = gather_objects(scaling.histories(), mesh.axis("pipe"))
    return {name: history for part in parts for name, history in part.items()}


def names_of_all(scaling: Scaling, mesh: Mesh) -> frozenset[str]:
    """Return the public names of the weights of all pipeline stages that have scales. Every rank calls this."""
    own = {name for names in scaling.names for name in names}
    return frozenset().union(*gather_objects(own, mesh.axis("pipe")))
