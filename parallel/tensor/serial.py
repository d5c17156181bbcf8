"""No split: every rank computes the whole. What the other modes are compared with."""

from torch import Tensor

from parallel.tensor.layers import Vocabulary
from parallel.tensor.mode import Mode


class Serial(Mode):
    """x[B, S, K] · W[N, K] -> y[B, S, N]"""

    def matmul_in(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w.T

    matmul_out = matmul_in

    def lookup(self, tokens: Tensor, vocabulary: Vocabulary) -> Tensor:
        return vocabulary.rows(tokens, vocabulary.weight)
