"""The execution of a plan: one rank's actions, one after another."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel.mesh.collectives import Pending
from parallel.ops.deferred import DeferredCalls
from parallel.pipeline.microbatch import Microbatch
from parallel.pipeline.p2p import Pipe, start_receive, start_send
from parallel.pipeline.part import ModelPart
from parallel.plan.plan import Action, Op, Plan, group_transfers

PipelinePhase: TypeAlias = Literal["forward", "backward", "transfer"]
"""The phases of a step that the time of a plan's actions is counted in."""

Key: TypeAlias = tuple[int, int]
"""A stage and a microbatch."""

SENDS_IN_FLIGHT = 2  # a further one waits for the oldest: what is sent stays in memory until its send has ended


class _Input(torch.autograd.Function):
    """Returns x, whose gradient becomes that of `leaf`, a tensor of the same shape without memory of its own.

    A leaf is kept until the backward: x itself would be, even where its layer keeps it on the host.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Runner:
    """Executes one rank's actions of a plan with transfers, for its stages and these microbatches.

    The plan is deadlock-free with blocking sends, so also with asynchronous ones; here a send is waited for two sends
    later. A receive is posted no earlier than the plan says: while NCCL's receive waits for the other end, it takes
    multiprocessors from what computes.

    Between two stages of one rank nothing is sent: the next stage computes with the output, detached, and hands the
    gradient back. An output is kept until it has been sent or used, and after that only its place in autograd's graph.

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
        self.device = microbatches[0].input_ids.device
        self.inputs: dict[Key, Tensor] = {}  # where a stage's input gets its gradient, from its F to its B or I
        self.ends: dict[Key, GradientEdge] = {}  # of a stage's graph, from F to B or I
        self.outputs: dict[Key, Tensor] = {}  # activations, from F to SEND_F or the next stage's F on this rank
        self.gradients: dict[Key, Tensor] = {}  # of inputs, from B or I to SEND_B or the previous stage's B or I
        self.receiving: dict[tuple[Op, Key], Pending] = {}  # from RECV_F to F, and from RECV_B to B or I
        self.sending: list[Pending] = []

    def run(self, plan: Plan) -> Tensor:
        """Execute the plan, and return the loss summed over this rank's tokens, in fp64; zero without the last stage.

        A plan with backwards leaves the gradients with the parameters' hooks; one without computes no gradients.
        """
        actions = plan.ranks[self.pipe.rank]
        trains = any(action.op.makes_input_gradient for action in actions)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        with torch.set_grad_enabled(trains):
            for step in group_transfers(actions):
                if not isinstance(step, Action):
                    self._transfer(step)
                elif step.op is Op.F:
                    total += self._forward(step, is_last=step.stage == plan.num_stages - 1)
                else:
                    self._compute_gradients(step)
        self._wait_for_sends(all_but=0)
        return total

    def _forward(self, action: Action, *, is_last: bool) -> Tensor | float:
        """Compute a stage, and return the loss of the last one; other outputs are kept to be sent or used."""
        key = action.stage, action.microbatch
        x = self._received(Op.RECV_F, action)
        if x is None:
            x = self.outputs.pop((action.stage - 1, action.microbatch), None)
        self.mark("forward", action)
        if x is not None and torch.is_grad_enabled():
            self.inputs[key] = x.new_empty(()).expand(x.shape).requires_grad_()
            x = _Input.apply(self.inputs[key], x)  # type: ignore[no-untyped-call]
        y: Tensor = self.part(x, self.microbatches[action.microbatch], action.stage)
        if torch.is_grad_enabled():
            self.ends[key] = get_gradient_edge(y)
        if is_last:
            return y.detach()
        self.outputs[key] = y.detach()
        return 0.0

    def _compute_gradients(self, action: Action) -> None:
        """Compute gradients of a stage: all (B), that of its input (I), or those of its weights after that (W)."""
        key = action.stage, action.microbatch
        match action.op:
            case Op.B:
                self._backward(action)
            case Op.I:
                with self.weight_gradients.deferring(key):
                    self._backward(action)
            case Op.W:
                self.mark("backward", action)
                self.weight_gradients.run_deferred(key)

    def _backward(self, action: Action) -> None:
        key = action.stage, action.microbatch
        gradient = self._received(Op.RECV_B, action)
        if gradient is None:
            gradient = self.gradients.pop((action.stage + 1, action.microbatch), None)
        self.mark("backward", action)
        torch.autograd.backward([self.ends.pop(key)], [gradient])
        if (x := self.inputs.pop(key, None)) is not None:
            assert x.grad is not None
            self.gradients[key] = x.grad

    def _received(self, op: Op, action: Action) -> Tensor | None:
        """Wait for the tensor that the action needs, and return it; None if none is received for it."""
        pending = self.receiving.pop((op, (action.stage, action.microbatch)), None)
        if pending is None:
            return None
        self.mark("transfer", action)
        return pending.wait()

    def _transfer(self, actions: Sequence[Action]) -> None:
        """Post all transfers between two computes, then wait for sends that were posted before."""
        for action in actions:
            if action.op.is_send:
                self._send(action)
            else:
                self._receive(action)
        self._wait_for_sends(all_but=SENDS_IN_FLIGHT)

    def _receive(self, action: Action) -> None:
        assert action.peer is not None
        axis = self.pipe.link(action.peer, self.pipe.rank)
        shape = self.part.interface.activation_shape(*self.microbatches[action.microbatch].input_ids.shape)
        like = torch.empty(0, dtype=self.part.interface.dtype, device=self.device)
        key = action.stage, action.microbatch
        self.receiving[action.op, key] = start_receive(shape, like, axis, action.peer)

    def _send(self, action: Action) -> None:
        assert action.peer is not None
        axis = self.pipe.link(self.pipe.rank, action.peer)
        self.mark("transfer", action)
        kept = self.outputs if action.op is Op.SEND_F else self.gradients
        self.sending.append(start_send(kept.pop((action.stage, action.microbatch)), axis, action.peer))

    def _wait_for_sends(self, *, all_but: int) -> None:
        while len(self.sending) > all_but:
            self.sending.pop(0).wait()
