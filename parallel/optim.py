"""Master weights and their update."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.chunk import Chunk
from parallel.config import OptimizerConfig
from parallel.layout import Piece


class AdamW:
    """torch's AdamW on the masters of chunks, one after another, with decay on matrices only.

    A chunk's gradient is given up with its update. So a narrow one, which is widened on the way, never exists whole in
    master precision.
    """

    def __init__(self, chunks: Sequence[Chunk], config: OptimizerConfig, *, compiles: bool = False) -> None:
        self.chunks = chunks
        # Dynamic: chunks differ in size.
        self._scaled = torch.compile(_scaled_in_one_pass, dynamic=True) if compiles else scaled
        self.inners = [
            torch.optim.AdamW(
                [chunk.master],
                lr=config.lr,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay if chunk.is_matrix else 0.0,
                fused=True,
            )
            for chunk in chunks
        ]

    def step(self, factor: Tensor, lr: float) -> None:
        """Update every weight by its gradient times `factor`, a scalar."""
        published = []
        for chunk, inner in zip(self.chunks, self.inners, strict=True):
            inner.param_groups[0]["lr"] = lr
            assert chunk.gradient is not None
            chunk.master.grad, chunk.gradient = self._scaled(chunk.gradient, factor, chunk.master.dtype), None
            inner.step()
            chunk.master.grad = None
            published.append(chunk.publish())
        for pending in published:
            pending.wait()

    def pieces(self) -> dict[str, list[Piece]]:
        """The masters and both moments, as pieces of public tensors: views, to be saved or filled."""
        found: dict[str, list[Piece]] = {"master": [], "exp_avg": [], "exp_avg_sq": []}
        for chunk, inner in zip(self.chunks, self.inners, strict=True):
            state = _state(inner, chunk.master)
            for kind in found:
                found[kind] += chunk.pieces(chunk.master if kind == "master" else state[kind])
        return found

    def weights(self) -> list[Piece]:
        """The pieces that this rank owns of the model's weights, in master precision."""
        return [piece for chunk in self.chunks if chunk.owner for piece in chunk.pieces(chunk.master)]

    def restore(self, steps: int) -> None:
        """Take the masters and moments as they are now, filled through `pieces`, as those after `steps` updates."""
        for chunk, inner in zip(self.chunks, self.inners, strict=True):
            _state(inner, chunk.master)["step"].fill_(steps)
            chunk.publish().wait()


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient[n] · factor[], in `dtype`; in place where the gradient has that already."""
    wide = [gradient]
    if gradient.dtype != dtype:
        wide = [torch.empty_like(gradient, dtype=dtype)]
        torch._foreach_copy_(wide, [gradient])  # faster than `to`
    torch._foreach_mul_(wide, factor.to(dtype))
    return wide[0]


def _scaled_in_one_pass(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`scaled`, for a compiler."""
    return gradient.to(dtype) * factor.to(dtype)


def _state(inner: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    state: dict[str, Tensor] = inner.state[master]
    if not state:  # as torch itself starts it, at the first step
        state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
    return state
