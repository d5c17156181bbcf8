"""The linears of a block: their sizes, and which of them multiply in 8 bits. This module needs no torch."""

from dataclasses import dataclass
from math import prod

from models.shape import ModelShape
from parallel.config import TrainConfig

LEAD_OUT = ("attention.out", "feed_forward.down")
"""Our names of the linears whose output is between blocks; the input of all others is."""


@dataclass(frozen=True)
class BlockLinear:
    """A linear of a block, between the hidden dim and a dim inside the block; several matrices may be one weight.

    name    ours, such as attention.qkv
    public  the names of its matrices in the model's files, without what numbers the block
    hidden  the elements of the hidden dim
    inner   those of the dim inside the block, of all of its matrices together
    """

    name: str
    public: tuple[str, ...]
    hidden: int
    inner: int

    @property
    def leads_in(self) -> bool:
        """True if its input is between blocks, False if its output is."""
        return self.name not in LEAD_OUT

    @property
    def inputs(self) -> int:
        """K of the weight [N, K]."""
        return self.hidden if self.leads_in else self.inner

    @property
    def outputs(self) -> int:
        """N of the weight [N, K]."""
        return self.inner if self.leads_in else self.hidden

    @property
    def elements(self) -> int:
        """The elements of the weight."""
        return self.hidden * self.inner

    def __str__(self) -> str:
        return f"{' + '.join(self.public)} ({self.outputs} × {self.inputs})"


def block_linears(shape: ModelShape) -> list[BlockLinear]:
    """Return the linears of a block, in each of which they have the same sizes."""
    sizes, hidden, found = shape.block_tensors(0), shape.hidden_size, []
    for name, names in shape.names().items():
        public = (names,) if isinstance(names, str) else tuple(names)
        matrices = [size for x in public if len(size := sizes.get(f"{x}.weight", ())) == 2]
        if matrices:
            found.append(BlockLinear(name, public, hidden, sum(map(prod, matrices)) // hidden))
    return found


def linears_in_8_bits(shape: ModelShape, train: TrainConfig) -> list[BlockLinear]:
    """Return the linears of a block that multiply in 8 bits; none in another precision than fp8."""
    return [linear for linear in block_linears(shape) if train.multiplies_in_8_bits(linear.elements)]
