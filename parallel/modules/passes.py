"""The forwards and backwards that a user's loop does between two steps: before and after each of them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from parallel.chunk.writes import Writes
from parallel.mesh.agreement import Agreement
from parallel.modules.parameters import OriginalParameters
from parallel.ops.compiling import not_compiled
from parallel.placement.manager import PlacementManager
from parallel.zero.gatherer import Gatherer
from parallel.zero.saved import transforms_refused


class ModulePasses:
    """Has the ranks agree on every forward and backward of a module, and its parameters gathered for as long as needed.

    The parameters of the root (those that belong to no layer) are gathered at the beginning of a forward and, where
    gradients are enabled, kept until its backward has ended. The placement manager is told how large each forward is.
    """

    def __init__(
        self,
        gatherer: Gatherer,
        placement_manager: PlacementManager,
        agreement: Agreement,
        original: OriginalParameters,
        writes: Writes,
    ) -> None:
        self.gatherer, self._writes, self.is_in_forward = gatherer, writes, False
        self._placement_manager, self._agreement, self._original = placement_manager, agreement, original
        self._awaits_backward = False
        self._is_between_steps = True
        self._hooks = ExitStack()  # by which a running forward saves tensors for its backward

    def follow(self, module: nn.Module) -> None:
        """Register hooks by which every forward of the module begins and ends here."""
        # First of all hooks: one that the user has registered, as weight_norm does, may compute with parameters.
        module.register_forward_pre_hook(
            lambda module, *inputs: self.begin_forward(inputs), with_kwargs=True, prepend=True
        )
        module.register_forward_hook(lambda module, inputs, y: self.end_forward(), always_call=True)

    @not_compiled
    def begin_forward(self, inputs: Any) -> None:
        """Gather the root. Raises ModelError on every rank where one does something else, or its module was changed."""
        action = "a forward" if torch.is_grad_enabled() else "a forward without gradients"
        with torch._C.DisableTorchFunctionSubclass():  # which only parameters without values ask for, and slows down
            written = self._writes.seen()
            problem = self._original.change() or self._writes.problem()
        if written:
            action += f" after a write into {written[0]}"
        self._agreement.agree_on(action, problem=problem)
        if written:
            self._writes.take()
        self.is_in_forward = True
        if torch.is_grad_enabled():
            self._report_work(inputs)
        self.gatherer.start_pass()
        self.gatherer.root.make_whole()
        self._hooks.enter_context(self.gatherer.saved.hooks("model"))

    @not_compiled
    def end_forward(self) -> None:
        """Release what is gathered, unless a backward is to follow."""
        self._hooks.close()
        self.is_in_forward = False
        self._awaits_backward |= torch.is_grad_enabled()
        if not self._awaits_backward:
            self.gatherer.end()

    @contextmanager
    def explain_transforms(self) -> Iterator[None]:
        """Raise ModelError instead if torch says in the block that it allows no hooks for saved tensors."""
        try:
            yield
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            raise transforms_refused(f"{self.gatherer.last_layer or 'model'}, or the model after it") from error

    def begin_backward(self, problem: str) -> None:
        """Gather the root. Raises ModelError on every rank where one does something else, or has a problem."""
        self._agreement.agree_on("a backward", problem or self._original.in_use)
        self.gatherer.root.make_whole()  # an earlier backward, of another forward, may have released it

    def end_backward(self, *, retains_graph: bool) -> None:
        """Release what is gathered, unless the graph is retained for another backward."""
        self._awaits_backward = retains_graph
        if not retains_graph:
            self.gatherer.end()

    def release(self) -> None:
        """Release what is still gathered because a graph was retained, or because a backward was never done.

        Called before the weights change, so that no rank goes on with the old ones.
        """
        self.gatherer.end()
        self._awaits_backward = False

    def end_step(self) -> None:
        """Note that the next forward with gradients begins a step."""
        self._is_between_steps = True

    def _report_work(self, inputs: Any) -> None:
        """Tell the placement manager the sizes of all inputs, with which the work of a module grows."""
        work = tuple(size for x in tree_leaves(inputs) if isinstance(x, Tensor) for size in x.shape)
        if self._is_between_steps:
            self._is_between_steps = False
            self.gatherer.end()
            self._placement_manager.before_step(work)
        else:
            self._placement_manager.within_step(work)
