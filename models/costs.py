"""The parameters, FLOPs and layer costs of a model, from its public tensors and sizes. This module needs no torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from models.shape import ModelShape


def parameter_count(shape: ModelShape) -> int:
    """Return the number of parameters of the whole model, with a tied embedding counted once."""
    return sum(map(prod, shape.public_tensors().values()))


# The FLOPs of matmuls in the time of moving a byte: of an H100 in bf16, and of a CPU's core in fp32.
FLOPS_PER_BYTE: Mapping[str, float] = MappingProxyType({"cuda": 230.0, "cpu": 9.0})

# The bytes that all kernels except matmuls move, for each element that a block keeps for backward and for each logit.
# This is a third of a step's bytes, as a forward is a third of a step's FLOPs. Measured on the kernels of OPT-6.7b's
# stages on H100s, of which a block keeps 12 elements for each element of a token's hidden dim. Beside OPT's, by a count
# of what each operation reads and writes, GPT-2's block moves a quarter less of them, Llama's and Qwen3's a third more.
KEPT_BYTES, HEAD_BYTES = 57.0 / 12, 33.0


def layer_costs(shape: ModelShape, sequence_length: int, device: str) -> list[float]:
    """Return the cost of each layer, [embedding, block 0 … n−1, head], by which the pipeline is cut into stages.

    A cost is the FLOPs of one token forward, plus the FLOPs that this type of device ("cuda" or "cpu") would do in the
    time of everything that is not a matmul.
    """
    hidden, width, flops_per_byte = shape.hidden_size, shape.embedding_width, FLOPS_PER_BYTE[device]
    projection = 2.0 * hidden * width if width != hidden else 0.0
    kept = flops_per_byte * KEPT_BYTES * (shape.kept().outer + shape.kept().inner)
    blocks = [
        2.0 * _matrix_elements(shape.block_tensors(layer).values()) + _attention_flops(shape, span) + kept
        for layer, span in enumerate(shape.spans(sequence_length))
    ]
    head = projection + (2.0 * width + flops_per_byte * HEAD_BYTES) * shape.vocab_size
    return [projection, *blocks, head]


@dataclass(frozen=True)
class ComputeCosts:
    """The costs of a layer's computes, in the unit of `layer_costs`: F, and the two halves I and W of a backward."""

    forward: float
    input_gradient: float
    weight_gradient: float


def compute_costs(
    shape: ModelShape, sequence_length: int, device: str, *, recomputes: bool = False
) -> list[ComputeCosts]:
    """Return the costs of each layer's forward, of its input's gradient, and of its weights' gradients.

    A backward costs two forwards. W has a matmul for each matrix, as the forward has; what else there is in a backward
    (of attention, norms and activations) is in I (Qi et al. 2023, arXiv 2401.10241, table 1). A block that
    `recomputes` runs its forward again in I. The head's gradients, those of its table too, are computed in its forward;
    its backward only scales them, and the embedding's only adds rows: they cost nothing here.
    """
    forwards = layer_costs(shape, sequence_length, device)
    blocks = []
    for layer, forward in enumerate(forwards[1:-1]):
        weights = 2.0 * _matrix_elements(shape.block_tensors(layer).values())
        blocks.append(ComputeCosts(forward, 2 * forward - weights + recomputes * forward, weights))
    projection, head = forwards[0], forwards[-1]
    return [
        ComputeCosts(projection, projection, projection),
        *blocks,
        ComputeCosts(3 * (head - projection) + projection, projection, projection),
    ]


def flops_per_token(shape: ModelShape, sequence_length: int) -> float:
    """Return the model FLOPs of one token, forward and backward: 6 N + 12 L A D S (PaLM, arXiv:2204.02311, appendix B).

    N is the number of elements of all matrices that multiply: not of vectors, nor of tables that are only looked up,
    that of the positions and an embedding that is not tied. A tied one is counted once, as the matmul of the head. A ·
    D is the width of all q heads; of S a block with a window counts no more keys than its window has. Attention is
    counted in full, not halved because it is causal. Recomputation is not counted.
    """
    looked_up = {shape.positions} | (set() if shape.tie_word_embeddings else {shape.embedding})
    elements = _matrix_elements(size for name, size in shape.public_tensors().items() if name not in looked_up)
    return 6.0 * elements + 3 * sum(_attention_flops(shape, span) for span in shape.spans(sequence_length))


def _matrix_elements(sizes: Iterable[tuple[int, ...]]) -> int:
    return sum(prod(size) for size in sizes if len(size) == 2)


def _attention_flops(shape: ModelShape, span: int) -> float:
    """Return the FLOPs of a query's scores of `span` keys and of their weighted sum of values, in all heads."""
    return 4.0 * shape.num_attention_heads * shape.head_size * span
