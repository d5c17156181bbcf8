"""Executes a plan: one rank's actions, one after another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.mesh import Axis
from parallel.pipeline.microbatch import Microbatch
from parallel.pipeline.p2p import exchange
from parallel.pipeline.schedule import Action, Op, Plan, batches
from parallel.pipeline.stage import Stage


class Runner:
    """One run of one stage through a plan with transfers."""

    def __init__(self, stage: Stage, pipe: Axis, microbatches: Sequence[Microbatch]) -> None:
        self.stage, self.pipe, self.microbatches = stage, pipe, microbatches
        self.is_last = pipe.rank == pipe.size - 1
        self.inputs: dict[int, Tensor] = {}  # activations of the stage before, from RECV_F to the end of B and SEND_B
        self.outputs: dict[int, Tensor] = {}  # what the stage made of them, from F to B
        self.grads: dict[int, Tensor] = {}  # gradients of outputs, from RECV_B to B

    def run(self, plan: Plan) -> Tensor:
        """The loss summed over this rank's tokens, in fp64; zero where this is not the last stage."""
        actions = plan.ranks[self.pipe.rank]
        trains = any(action.op is Op.B for action in actions)
        total = torch.zeros((), dtype=torch.float64, device=self.microbatches[0].input_ids.device)
        with torch.set_grad_enabled(trains):
            for step in batches(actions):
                if isinstance(step, tuple):
                    self._transfer(step)
                elif step.op is Op.F:
                    m = step.microbatch
                    x = self.inputs.get(m) if trains else self.inputs.pop(m, None)
                    self.outputs[m] = self.stage(x, self.microbatches[m])
                    total += self.outputs[m].detach() if self.is_last else 0
                else:
                    self._backward(step.microbatch)
        return total

    def _backward(self, m: int) -> None:
        output = self.outputs.pop(m)
        if self.is_last:
            output.backward()
        else:
            output.backward(self.grads.pop(m))

    def _transfer(self, actions: Sequence[Action]) -> None:
        """Post the transfers together, and put what arrives in its place."""
        sends = [(self._outgoing(a), self._peer(a)) for a in actions if a.op.is_send]
        receives = [a for a in actions if not a.op.is_send]
        shapes = [(self._shape(a.microbatch), self._peer(a)) for a in receives]
        like = torch.empty(0, dtype=self.stage.dtype, device=self.microbatches[0].input_ids.device)
        for action, x in zip(receives, exchange(sends, shapes, self.pipe, like), strict=True):
            if action.op is Op.RECV_F:
                self.inputs[action.microbatch] = x.requires_grad_(torch.is_grad_enabled())
            else:
                self.grads[action.microbatch] = x

    def _outgoing(self, action: Action) -> Tensor:
        if action.op is Op.SEND_B:
            grad = self.inputs.pop(action.microbatch).grad
            assert grad is not None
            return grad
        if torch.is_grad_enabled():
            return self.outputs[action.microbatch].detach()
        return self.outputs.pop(action.microbatch)

    def _shape(self, m: int) -> tuple[int, ...]:
        return self.stage.boundary(*self.microbatches[m].input_ids.shape)

    @staticmethod
    def _peer(action: Action) -> int:
        assert action.peer is not None
        return action.peer
