"""The least time of each group of a step's kernels on one GPU, counted from the model's shape.

A group's floor is its matmuls' FLOPs at the rate that large products reach, or the bytes that must be moved at the
speed of a copy. Bytes are counted as if each group were as few passes as it can be, every pass reading each input once
and writing each output once. What a group can do in another's pass costs nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.costs import flops_per_token, parameter_count
from models.linears import BlockLinear, block_linears
from models.shape import ModelShape

H200_FLOPS, H200_BYTES = 780e12, 4.3e12
"""FLOPs a second of large products in bf16, and bytes a second of a large copy, both measured on an H200."""

NARROW = 2  # bytes of a parameter, an activation, or a gradient, in bf16


@dataclass(frozen=True)
class StepSize:
    """The size of a step, on which its floors depend.

    moment_bytes  of each of an element's two moments; its master weight has 4
    in_8_bits     the linears of each block that multiply in 8 bits, at twice the rate
    """

    shape: ModelShape
    batch: int
    sequence: int
    moment_bytes: int = 4
    in_8_bits: Sequence[BlockLinear] = ()

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


def floors(step: StepSize) -> Mapping[str, float]:
    """Return the seconds of each group that has a floor."""
    shape, layers = step.shape, step.shape.num_hidden_layers
    per_token = {
        # Forward reads x and what is added to it, and writes their sum and its norm; backward reads the sum and the
        # gradients of both, and writes one.
        "norm + residual": (2 * layers + 1) * shape.hidden_size * 8 * NARROW,
        # Forward reads the inputs of the activation and writes one; backward reads the gradient and the inputs, and
        # writes the inputs' gradients.
        "activations": layers * _inner(shape) * (2 + 3 * _gates(shape)) * NARROW,
        # Logits are read in fp32, and their gradient written in bf16.
        "loss": shape.vocab_size * (4 + NARROW),
        # Forward reads and writes a row; backward reads its gradient, and adds that to the table's.
        "lookups": shape.embedding_width * 5 * NARROW,
        "rotary + joining": layers * _heads_elements(shape) * 2 * NARROW,
        # The biases of q, k and v: those of other linears are summed in the passes of norms and activations.
        "gradients' sums": layers * _qkv_width(shape) * NARROW * _has_biases(shape),
    }
    found = {"matmuls": _product_seconds(step), "attention": _attention_flops(step) / H200_FLOPS}
    found["update"] = parameter_count(shape) * _update_bytes(step) / H200_BYTES
    found |= {name: step.tokens * bytes_of_token / H200_BYTES for name, bytes_of_token in per_token.items()}
    if step.in_8_bits:
        found["casts"] = _cast_bytes(step) / H200_BYTES
    return found


def _product_seconds(step: StepSize) -> float:
    """Return the seconds of all matmuls. Those in 8 bits take half of the time that their FLOPs take in bf16."""
    shape = step.shape
    attention = 3 * sum(_scores(shape, span) for span in shape.spans(step.sequence))
    in_8_bits = 6.0 * shape.num_hidden_layers * sum(linear.elements for linear in step.in_8_bits)
    return step.tokens * (flops_per_token(shape, step.sequence) - attention - in_8_bits / 2) / H200_FLOPS


def _attention_flops(step: StepSize) -> float:
    """Return the FLOPs of attention: two products forward and five backward, half of them where it sees all before."""
    spans = step.shape.spans(step.sequence)
    return step.tokens * sum(3.5 * _scores(step.shape, x) / (2 if x == step.sequence else 1) for x in spans)


def _update_bytes(step: StepSize) -> int:
    """Return the bytes of an element: its gradient, twice for the norm's sake; its states, read and written; itself."""
    return 2 * NARROW + 2 * (4 + 2 * step.moment_bytes) + NARROW


def _cast_bytes(step: StepSize) -> float:
    """Return the bytes of casts: weights are read and written; x too, and transposed; dy is cast both ways at once."""
    linears = step.in_8_bits
    per_token = sum(5.0 * linear.inputs + 4.0 * linear.outputs for linear in linears)
    return step.shape.num_hidden_layers * (3.0 * sum(x.elements for x in linears) + step.tokens * per_token)


def _scores(shape: ModelShape, span: int) -> float:
    """Return the FLOPs of one token's scores of `span` keys and of their weighted sum of values."""
    return 4.0 * shape.num_attention_heads * shape.head_size * span


def _inner(shape: ModelShape) -> int:
    """Return the width of the feed-forward."""
    return next(iter(shape.inner_widths().values()))


def _gates(shape: ModelShape) -> int:
    """Return the inputs of the activation for each of its outputs: 2 in a gated one, else 1."""
    up = next(linear for linear in block_linears(shape) if linear.name == "feed_forward.up")
    return up.inner // _inner(shape)


def _qkv_width(shape: ModelShape) -> int:
    return (shape.num_attention_heads + 2 * shape.num_kv_heads) * shape.head_size


def _heads_elements(shape: ModelShape) -> int:
    """Return the elements of q, k and v that are moved: their gradients become one tensor; q and k are turned."""
    turned = (shape.num_attention_heads + shape.num_kv_heads) * shape.head_size if shape.positions is None else 0
    return turned + _qkv_width(shape)


def _has_biases(shape: ModelShape) -> bool:
    return any(name.endswith(".bias") and "norm" not in name and "ln_" not in name for name in shape.block_tensors(0))
