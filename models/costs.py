"""The parameters, FLOPs and layer costs of an OPT, from its sizes alone. This module needs no torch."""

from dataclasses import replace

from models.shapes import OPTShape


def parameter_count(shape: OPTShape) -> int:
    """Return the number of parameters of the whole model, with a tied embedding counted once."""
    hidden, ffn, width = shape.hidden_size, shape.ffn_dim, shape.word_embed_proj_dim
    norm = 2 * hidden * shape.layer_norm_elementwise_affine
    attention = 4 * (hidden * hidden + hidden * shape.enable_bias)
    feed_forward = 2 * hidden * ffn + (hidden + ffn) * shape.enable_bias
    projections = 2 * hidden * width * (width != hidden)
    tables = 1 if shape.tie_word_embeddings else 2
    embeddings = tables * shape.vocab_size * width + _positions(shape)
    layers = shape.num_hidden_layers * (attention + feed_forward + 2 * norm)
    return embeddings + projections + layers + norm * shape.has_final_layer_norm


def _positions(shape: OPTShape) -> int:
    """Return the number of elements of the position table, which has two more rows: OPT's positions start at 2."""
    return (shape.max_position_embeddings + 2) * shape.hidden_size


FLOPS_PER_BYTE = {
    "cuda": 230.0,
    "cpu": 9.0,
}  # FLOPs of matmuls in the time of moving a byte: H100 in bf16, core in fp32
# The bytes that all kernels except matmuls move, for each hidden element of a block and for each logit. This is a third
# of a step's bytes, as a forward is a third of a step's FLOPs. Measured on the kernels of OPT-6.7b's stages on H100s.
BLOCK_BYTES, HEAD_BYTES = 57.0, 33.0


def layer_costs(shape: OPTShape, sequence_length: int, device: str) -> list[float]:
    """Return the cost of each layer, [embedding, block 0 … n−1, head], by which the pipeline is cut into stages.

    A cost is the FLOPs of one token forward, plus the FLOPs that this type of device ("cuda" or "cpu") would do in the
    time of everything that is not a matmul.
    """
    hidden, width = shape.hidden_size, shape.word_embed_proj_dim
    a_byte = FLOPS_PER_BYTE[device]
    projection = 2.0 * hidden * width if width != hidden else 0.0
    block = 2.0 * (4 * hidden * hidden + 2 * hidden * shape.ffn_dim) + 4.0 * sequence_length * hidden
    block += a_byte * BLOCK_BYTES * hidden
    head = projection + (2.0 * width + a_byte * HEAD_BYTES) * shape.vocab_size
    return [projection, *[block] * shape.num_hidden_layers, head]


def flops_per_token(shape: OPTShape, sequence_length: int) -> float:
    """Return the model FLOPs of one token, forward and backward: 6 N + 12 L H S (PaLM, arXiv:2204.02311, appendix B).

    N is without tables that are only looked up: that of the positions, and an embedding that is not tied. A tied one is
    counted once, as the matmul of the head. Attention is counted in full, not halved because it is causal.
    Recomputation is not counted.
    """
    tied = replace(shape, tie_word_embeddings=True)
    matmuls = 6.0 * (parameter_count(tied) - _positions(shape))
    return matmuls + 12.0 * shape.num_hidden_layers * shape.hidden_size * sequence_length
