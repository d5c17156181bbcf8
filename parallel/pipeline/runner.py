"""The execution of a plan: one rank's actions, one after another."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from parallel.mesh.collectives import Pending
from parallel.ops.deferred import DeferredCalls
from parallel.pipeline.microbatch import Microbatch
from parallel.pipeline.p2p import Pipe, start_receive, start_send
from parallel.pipeline.part import ModelPart
from parallel.pipeline.plan import Action, Op, Plan

PipelinePhase: TypeAlias = Literal["forward", "backward", "transfer"]
"""The phases of a step that the time of a plan's actions is counted in."""

SENDS_IN_FLIGHT = 2  # a further one waits for the oldest: what is sent stays in memory until its send has ended


class Runner:
    """Executes one rank's actions of a plan with transfers, for its stage and these microbatches.

    The plan has one stage per rank.

    The plan is deadlock-free with blocking sends, so also with asynchronous ones; here a send is waited for two sends
    later. A receive is posted no earlier than it is needed: while NCCL's receive waits for the other end, it takes
    multiprocessors from what computes.

    `weight_gradients` keeps the gradients of weights between an I, which leaves them there, and its W. `mark` is called
    with each phase that begins, and with its action.
    """

    def __init__(
        self,
        part: ModelPart,
        pipe: Pipe,
        microbatches: Sequence[Microbatch],
        *,
        weight_gradients: DeferredCalls,
        mark: Callable[[PipelinePhase, object], None] = lambda phase, action: None,
    ) -> None:
        self.part, self.pipe, self.microbatches, self.mark = part, pipe, microbatches, mark
        self.weight_gradients = weight_gradients
        self.is_last = pipe.rank == pipe.size - 1
        self.device = microbatches[0].input_ids.device
        self.inputs: dict[int, Tensor] = {}  # activations of the previous stage, from F to the end of B and SEND_B
        self.outputs: dict[int, Tensor] = {}  # of this stage, from F to B
        self.receiving: dict[tuple[Op, int], Pending] = {}  # from RECV_F to F, and from RECV_B to B
        self.sending: list[Pending] = []

    def run(self, plan: Plan) -> Tensor:
        """Execute the plan, and return the loss summed over this rank's tokens, in fp64; zero but on the last stage.

        A plan with backwards leaves the gradients with the parameters' hooks; one without computes no gradients.
        """
        actions = plan.ranks[self.pipe.rank]
        trains = any(action.op.makes_input_gradient for action in actions)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.set_grad_enabled(trains):
            for action in actions:
                match action.op:
                    case Op.F:
                        total += self._forward(action)
                    case Op.B:
                        self._backward(action)
                    case Op.I:
                        with self.weight_gradients.deferring((action.stage, action.microbatch)):
                            self._backward(action)
                    case Op.W:
                        self.mark("backward", action)
                        self.weight_gradients.run_deferred((action.stage, action.microbatch))
                    case Op.SEND_F | Op.SEND_B:
                        self._send(action)
                    case Op.RECV_F | Op.RECV_B:
                        self._receive(action)
        self._wait_for_sends(all_but=0)
        return total

    def _forward(self, action: Action) -> Tensor | float:
        m, x = action.microbatch, self._wait_for_input(Op.RECV_F, action)
        self.mark("forward", action)
        if x is not None and torch.is_grad_enabled():
            self.inputs[m] = x.requires_grad_()
        self.outputs[m] = self.part(x, self.microbatches[m], action.stage)
        return self.outputs[m].detach() if self.is_last else 0.0

    def _backward(self, action: Action) -> None:
        gradient = self._wait_for_input(Op.RECV_B, action)
        self.mark("backward", action)
        output = self.outputs.pop(action.microbatch)
        output.backward(gradient)

    def _wait_for_input(self, op: Op, action: Action) -> Tensor | None:
        """Wait for the tensor that the action needs, and return it; None at an end of the pipe, where it needs none."""
        pending = self.receiving.pop((op, action.microbatch), None)
        if pending is None:
            return None
        self.mark("transfer", action)
        return pending.wait()

    def _receive(self, action: Action) -> None:
        assert action.peer is not None
        axis = self.pipe.link(action.peer, self.pipe.rank)
        shape = self.part.interface.activation_shape(*self.microbatches[action.microbatch].input_ids.shape)
        like = torch.empty(0, dtype=self.part.interface.dtype, device=self.device)
        self.receiving[action.op, action.microbatch] = start_receive(shape, like, axis, action.peer)

    def _send(self, action: Action) -> None:
        assert action.peer is not None
        axis = self.pipe.link(self.pipe.rank, action.peer)
        self.mark("transfer", action)
        self.sending.append(start_send(self._tensor_to_send(action), axis, action.peer))
        self._wait_for_sends(all_but=SENDS_IN_FLIGHT)

    def _tensor_to_send(self, action: Action) -> Tensor:
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
