"""The bytes that each layer keeps between forward and backward: docs/notation.md, "What is kept for backward".

This module needs no torch.
"""

from collections.abc import Mapping
from types import MappingProxyType

from models.linears import block_linears, linears_in_8_bits
from models.shape import ModelShape
from parallel.config import Config, TensorConfig

ITEMSIZE: Mapping[str, int] = MappingProxyType({"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2})
IN_8_BITS = 1  # byte of each element
STATISTIC = 4  # bytes at least: statistics of norms are fp32 or wider


def kept_bytes(shape: ModelShape, config: Config) -> list[int]:
    """Return the bytes that a rank keeps of one microbatch for each layer's backward, [embedding, block 0 … n−1, head].

    With recomputation a block keeps its input, or nothing on the device where inputs are offloaded. Not counted are the
    masks of dropout, and what is small beside a block: rotary tables, and the token ids that the embedding keeps.
    """
    tensor, itemsize = config.parallel.tensor, ITEMSIZE[config.train.dtype]
    tokens = config.train.micro_batch_size * config.data.sequence_length / config.parallel.context.size
    outer, inner, statistics = _shares(tensor)
    kept, wide = shape.kept(), max(itemsize, STATISTIC)
    match config.train.activation_checkpointing:
        case "none":
            elements = kept.outer * outer + kept.inner * inner
            block = tokens * (itemsize * elements + wide * kept.statistics * statistics)
            for linear in linears_in_8_bits(shape, config.train):  # its input, which may be kept as it is, too
                share = outer if linear.leads_in else inner
                block += tokens * linear.inputs * share * (IN_8_BITS - (linear.name not in kept.shared) * itemsize)
        case "full":
            block = tokens * itemsize * shape.hidden_size * outer
        case _:
            block = 0.0
    # The head keeps its norm's input, and both gradients of the loss: its input's, and its table's.
    table = shape.vocab_size * shape.embedding_width / tensor.size * tensor.depth
    head = itemsize * (tokens * (shape.hidden_size + shape.embedding_width) * outer + table)
    return [0, *[round(block)] * shape.num_hidden_layers, round(head)]


def kept_for_weights(shape: ModelShape, config: Config) -> list[int]:
    """Return the bytes that a rank keeps of one microbatch from I to W, for each layer as in `kept_bytes`.

    These are both factors of the gradient of each matrix: the linears' inputs, and the gradients of their outputs
    (docs/notation.md, "From I to W"). That may be more than what was kept until I. The head's gradients exist before.
    """
    train = config.train
    tokens = train.micro_batch_size * config.data.sequence_length / config.parallel.context.size
    outer, inner, _ = _shares(config.parallel.tensor)
    block = 0.0
    for linear in block_linears(shape):
        itemsize = IN_8_BITS if train.multiplies_in_8_bits(linear.elements) else ITEMSIZE[train.dtype]
        block += tokens * itemsize * (linear.hidden * outer + linear.inner * inner)
    return [0, *[round(block)] * shape.num_hidden_layers, 0]


def _shares(tensor: TensorConfig) -> tuple[float, float, float]:
    """Return a rank's share of tensors between blocks and inside them, and of the statistics of norms.

    In grids and cubes every rank along the hidden dim has the statistics.
    """
    share, axes = 1 / tensor.size, tensor.axes()
    match tensor.mode:
        case "1d":
            between = share if tensor.sequence_parallel else 1.0
            return between, share, between
        case "2d" | "2.5d":
            return share, share, share * axes["col"]
        case "3d":
            return share, share, share * axes["o"]
        case _:
            return 1.0, 1.0, 1.0
