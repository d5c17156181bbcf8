"""Executes a plan: one rank's actions, one after another."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from parallel.mesh.collectives import Pending
from parallel.ops.deferred import DeferredCalls
from parallel.pipeline.microbatch import Microbatch
from parallel.pipeline.p2p import Pipe, start_receive, start_send
from parallel.pipeline.schedule import Action, Op, Plan
from parallel.pipeline.stage import Stage

PipelinePhase: TypeAlias = Literal["forward", "backward", "transfer"]
"""Where the time of a plan's actions goes."""

SENDS_IN_FLIGHT = 2  # before the eldest is waited for: what is sent stays in memory until then


class Runner:
    """One run of one stage through a plan with transfers.

    A plan is proved for a backend that lets nobody go on before a transfer is over. Here a send is waited for two sends
    later: with less waiting the same plan ends all the more. A receive is posted no earlier than it is needed: while
    NCCL's waits for the other end it takes multiprocessors from what computes.

    `weights`: their gradients, which only the update waits for. Those of a microbatch are made once the gradient that
    the stage before waits for is on its way (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.1); None:
    as backward comes to them. `mark` is called with each phase, and the action, that begins.
    """

    def __init__(
        self,
        stage: Stage,
        pipe: Pipe,
        microbatches: Sequence[Microbatch],
        *,
        weights: DeferredCalls | None = None,
        mark: Callable[[PipelinePhase, object], None] = lambda phase, action: None,
    ) -> None:
        self.stage, self.pipe, self.microbatches, self.mark = stage, pipe, microbatches, mark
        self.weights = weights if pipe.rank > 0 else None  # to the first stage nobody listens
        self.is_last = pipe.rank == pipe.size - 1
        self.device = microbatches[0].input_ids.device
        self.inputs: dict[int, Tensor] = {}  # activations of the stage before, from F to the end of B and SEND_B
        self.outputs: dict[int, Tensor] = {}  # what the stage made of them, from F to B
        self.receiving: dict[tuple[Op, int], Pending] = {}  # from RECV_F to F, and from RECV_B to B
        self.sending: list[Pending] = []

    def run(self, plan: Plan) -> Tensor:
        """The loss summed over this rank's tokens, in fp64; zero where this is not the last stage."""
        actions = plan.ranks[self.pipe.rank]
        trains = any(action.op is Op.B for action in actions)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.set_grad_enabled(trains):
            for action in actions:
                match action.op:
                    case Op.F:
                        total += self._forward(action)
                    case Op.B:
                        self._backward(action)
                    case Op.SEND_F | Op.SEND_B:
                        self._send(action)
                    case Op.RECV_F | Op.RECV_B:
                        self._receive(action)
        self._wait_for_sends(all_but=0)
        return total

    def _forward(self, action: Action) -> Tensor | float:
        m, x = action.microbatch, self._received(Op.RECV_F, action)
        self.mark("forward", action)
        if x is not None and torch.is_grad_enabled():
            self.inputs[m] = x.requires_grad_()
        self.outputs[m] = self.stage(x, self.microbatches[m])
        return self.outputs[m].detach() if self.is_last else 0.0

    def _backward(self, action: Action) -> None:
        gradient = self._received(Op.RECV_B, action)
        self.mark("backward", action)
        output = self.outputs.pop(action.microbatch)
        with nullcontext() if self.weights is None else self.weights.deferring():
            output.backward(gradient)

    def _received(self, op: Op, action: Action) -> Tensor | None:
        """What the action waits for; None at the end of the pipe where nothing comes from."""
        pending = self.receiving.pop((op, action.microbatch), None)
        if pending is None:
            return None
        self.mark("transfer", action)
        return pending.wait()

    def _receive(self, action: Action) -> None:
        assert action.peer is not None
        axis = self.pipe.link(action.peer, self.pipe.rank)
        shape = self.stage.boundary(*self.microbatches[action.microbatch].input_ids.shape)
        like = torch.empty(0, dtype=self.stage.dtype, device=self.device)
        self.receiving[action.op, action.microbatch] = start_receive(shape, like, axis, action.peer)

    def _send(self, action: Action) -> None:
        assert action.peer is not None
        axis = self.pipe.link(self.pipe.rank, action.peer)
        self.mark("transfer", action)
        self.sending.append(start_send(self._outgoing(action), axis, action.peer))
        if action.op is Op.SEND_B and self.weights is not None:
            self.mark("backward", f"W{action.stage}.{action.microbatch}")
            self.weights.run_deferred()
        self._wait_for_sends(all_but=SENDS_IN_FLIGHT)

    def _outgoing(self, action: Action) -> Tensor:
        if action.op is Op.SEND_B:
            grad = self.inputs.pop(action.microbatch).grad
            assert grad is not None
            return grad
        if torch.is_grad_enabled():
            return self.outputs[action.microbatch].detach()
        return self.outputs.pop(action.microbatch)

    def _wait_for_sends(self, *, all_but: int) -> None:
        while len(self.sending) > all_but:
            self.sending.pop(0).wait()
