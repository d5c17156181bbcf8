"""The parameters, FLOPs and layer costs of an OPT, from its sizes alone. This module needs no torch."""

from models.shapes import OPTShape


def parameter_count(shape: OPTShape) -> int:
    """Parameters of the whole model, the tied embedding once."""
    hidden, ffn, width = shape.hidden_size, shape.ffn_dim, shape.word_embed_proj_dim
    norm = 2 * hidden * shape.layer_norm_elementwise_affine
    attention = 4 * (hidden * hidden + hidden * shape.enable_bias)
    feed_forward = 2 * hidden * ffn + (hidden + ffn) * shape.enable_bias
    projections = 2 * hidden * width * (width != hidden)
    embeddings = shape.vocab_size * width + _positions(shape)
    layers = shape.num_hidden_layers * (attention + feed_forward + 2 * norm)
    return embeddings + projections + layers + norm * shape.has_final_layer_norm


def _positions(shape: OPTShape) -> int:
    """Elements of the position table: OPT's positions start at 2."""
    return (shape.max_position_embeddings + 2) * shape.hidden_size


FLOPS_A_BYTE = {"cuda": 230.0, "cpu": 9.0}  # matmuls' rate against memory's: an H100 in bf16, a core in fp32
# Bytes that all kernels but matmuls move, of a hidden element of a block and of a logit: a third of them, as a forward
# is a third of a step's FLOPs. From the kernels of an OPT-6.7b's stages on H100s.
BLOCK_BYTES, HEAD_BYTES = 57.0, 33.0


def layer_costs(shape: OPTShape, sequence_length: int, device: str) -> list[float]:
    """Of [embedding, block 0 … n−1, head], for the pipeline's partition: FLOPs of one token forward, and as many as
    this type of device ("cuda" or "cpu") would do in the time of all that is no matmul.
    """
    hidden, width = shape.hidden_size, shape.word_embed_proj_dim
    a_byte = FLOPS_A_BYTE[device]
    projection = 2.0 * hidden * width if width != hidden else 0.0
    block = 2.0 * (4 * hidden * hidden + 2 * hidden * shape.ffn_dim) + 4.0 * sequence_length * hidden
    block += a_byte * BLOCK_BYTES * hidden
    head = projection + (2.0 * width + a_byte * HEAD_BYTES) * shape.vocab_size
    return [projection, *[block] * shape.num_hidden_layers, head]


def flops_per_token(shape: OPTShape, sequence_length: int) -> float:
    """Model FLOPs of one token, forward and backward: 6 N + 12 L H S (PaLM, arXiv:2204.02311, appendix B).

    N leaves out the position table, a lookup, and counts the tied embedding once, as the head's matmul. Attention is
    counted in full, not halved for causality; recomputation is not counted.
    """
    matmuls = 6.0 * (parameter_count(shape) - _positions(shape))
    return matmuls + 12.0 * shape.num_hidden_layers * shape.hidden_size * sequence_length
