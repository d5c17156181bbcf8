"""Modules and loops with unusual graphs, each in plain torch: what stage 3 is compared on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

WIDTH = 5


class Stack(nn.Module):
    """A linear layer and three layers in a ModuleList, called one after another."""

    def __init__(self, layer: Callable[[], nn.Module] = lambda: nn.Linear(WIDTH, WIDTH), *, count: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(layer() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = self.call(layer, x)
        return x.square().mean()

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return y.tanh()


class Gated(nn.Module):
    """A layer that leaves a loss of its own on itself, as a mixture of experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.linspace(1, 2, WIDTH))

    def auxiliary(self, x: Tensor) -> Tensor:
        return (self.gate * x).square().sum()

    def forward(self, x: Tensor) -> Any:
        self.loss = self.auxiliary(x)
        return self.inner(x)


class OnItself(Stack):
    """The parent adds what its layers left on themselves."""

    def __init__(self, layer: Callable[[], nn.Module] = Gated) -> None:
        super().__init__(layer)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.auxiliary()

    def auxiliary(self) -> Tensor:
        losses: Any = [layer.loss for layer in self.layers]
        return torch.stack(losses).sum()


class OnlyAuxiliary(OnItself):
    """The loss does not depend on the outputs of the layers at all."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return self.auxiliary()


class AppendsItsLoss(Gated):
    def forward(self, x: Tensor, losses: list[Tensor]) -> Any:  # type: ignore[override]
        losses.append(self.auxiliary(x))
        return self.inner(x)


class InAList(Stack):
    """Layers append to a list that they are given."""

    def __init__(self) -> None:
        super().__init__(AppendsItsLoss)

    def forward(self, x: Tensor) -> Tensor:
        self.losses: list[Tensor] = []
        return super().forward(x) + sum(self.losses)

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = layer(x, self.losses)
        return y


class InPlaceOnInput(Stack):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)))

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return y


class InPlaceOnOutput(Stack):
    """The parent changes the outputs in place, and a view of an output."""

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        y += 1
        y[:, 1:3].mul_(2)
        return y.tanh_()


class WritesIntoABuffer(Stack):
    """Layers return nothing: they write into a tensor that they are given."""

    class Writer(nn.Linear):
        def forward(self, x: Tensor, out: Tensor) -> None:  # type: ignore[override]
            out[:, 0] = super().forward(x).sum(-1)

    def __init__(self) -> None:
        super().__init__(lambda: self.Writer(WIDTH, WIDTH))

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        out = x * 2
        layer(x, out)
        return out.tanh()


@dataclass
class Output:
    hidden: Tensor
    loss: Tensor


class Holder:
    def __init__(self, hidden: Tensor, loss: Tensor) -> None:
        self.hidden, self.loss = hidden, loss


class ReturnsAnObject(Gated):
    kind: Any = Output

    def forward(self, x: Tensor) -> Any:
        return self.kind(self.inner(x), self.auxiliary(x))


class ReturnsAPlainObject(ReturnsAnObject):
    kind = Holder


class Objects(Stack):
    def __init__(self, layer: type[nn.Module] = ReturnsAnObject) -> None:
        super().__init__(layer)

    def forward(self, x: Tensor) -> Tensor:
        self.loss: Any = 0
        return super().forward(x) + self.loss

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        output = layer(x)
        self.loss = self.loss + output.loss
        hidden: Tensor = output.hidden
        return hidden.tanh()


class ReturnsItsInput(Stack):
    """A layer returns its input beside its output, as one with a cache does."""

    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return x, super().forward(x)

    def __init__(self) -> None:
        super().__init__(lambda: self.Pair(WIDTH, WIDTH))

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        same, y = layer(x)
        both: Tensor = same * 2 + y.tanh()
        return both


class CalledTwice(Stack):
    """All layers are called twice, in another order the second time."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, *reversed(self.layers), self.layers[0], self.layers[0]):
            x = self.call(layer, x)
        return x.square().mean()


class Branches(Stack):
    """Layers beside each other; one has no part in the loss."""

    def forward(self, x: Tensor) -> Tensor:
        a, b, _ = (layer(x) for layer in self.layers)
        loss: Tensor = (a * b.tanh() + a).square().mean()
        return loss


class Square(torch.autograd.Function):
    """x · w² by a function that keeps its parameter as autograd is told to, and as an attribute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.w = w
        return x * w.square()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return dy * ctx.w.square(), (2 * dy * x * w).sum(0)


class OwnFunction(Gated):
    def forward(self, x: Tensor) -> Any:
        self.loss = self.auxiliary(Square.apply(x, self.gate))  # type: ignore[no-untyped-call]
        return self.inner(Square.apply(x, self.gate))  # type: ignore[no-untyped-call]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True), nn.GRU(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x[:, None].expand(-1, 3, -1))
        z: Tensor = self.gru(y)[0][:, -1]
        return z


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(WIDTH, 1), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x)[0])  # type: ignore[no-any-return]


class Complex(nn.Module):
    """A layer whose parameter is seen as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = nn.Parameter(torch.linspace(0.5, 1.5, 2 * WIDTH).view(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.view_as_complex(self.turns) * (x + 0j)).abs()


def weight_norm() -> nn.Module:
    return nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))  # a hook of the layer itself computes its weight


def parametrized() -> nn.Module:
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    parametrize.register_parametrization(layer[0], "weight", _Symmetric())
    return layer


class _Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


class Checkpointed(Stack):
    """Each layer is recomputed in backward, in one of torch's two ways."""

    def __init__(self, *, use_reentrant: bool, layer: Callable[[], nn.Module] = Gated) -> None:
        super().__init__(layer)
        self.use_reentrant = use_reentrant

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return y.tanh()


class CheckpointedTogether(Stack):
    """All layers are recomputed as one."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, self.first(x), use_reentrant=False)
        return y


class RecomputesAPart(Gated):
    """A layer that recomputes a part of itself, whose output is an object."""

    def forward(self, x: Tensor) -> Any:
        self.loss = checkpoint(self.auxiliary, x, use_reentrant=False)
        return Holder(checkpoint(self.inner, x, use_reentrant=False), self.loss)


class Forces(Stack):
    """The loss has a derivative in it, which the forward computes (as networks of energies and forces do)."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = super().forward(x)
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return energy + force.square().sum()


class Slopes(nn.Module):
    """A layer that returns the derivative of its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).tanh()
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return self.outer(y + slope)  # type: ignore[no-any-return]


class LowRank(Stack):
    """Frozen layers with small trained matrices beside them."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)
            self.base.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__(self.Adapted)
        self.layers[1].requires_grad_(False)


class InALoop(Stack):
    """A model that runs without gradients in the middle of its forward, and catches an error of a layer."""

    class Fails(nn.Linear):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.fails:
                raise KeyError("of a user")
            return y

    def __init__(self) -> None:
        super().__init__(lambda: self.Fails(WIDTH, WIDTH))

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(layer, self.Fails)
        with torch.no_grad():
            scale = super().call(layer, x).abs().mean()
        layer.fails = True
        try:
            layer(x)
        except KeyError:
            layer.fails = False
        return super().call(layer, x) * scale


class InAnotherOrder(Stack):
    """The layers have another order in each forward, and one of them is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        for i in range(2):
            x = self.call(self.layers[(self.count + 2 * i) % 3], x)
        return x.square().mean()


class KeepsInputs(Stack):
    """A model that appends to a list which it is given, and writes into a dict."""

    def forward(self, x: Tensor, losses: list[Tensor], more: dict[str, Any]) -> Tensor:  # type: ignore[override]
        losses.append(super().forward(x))
        more["twice"] = 2 * losses[0]
        return x.sum()


class WithHooks(Stack):
    """Layers with hooks that change their inputs, their outputs and gradients."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0] + 1,))
            layer.register_forward_hook(lambda layer, inputs, y: 2 * y)
            layer.register_full_backward_hook(lambda layer, dx, dy: (3 * dx[0],))  # type: ignore[index]


class Mapped(nn.Linear):
    """A layer that maps a function of one sample over a batch."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.vmap(lambda row: F.linear(row, self.weight, self.bias))(x)
        return y


Loop = Callable[[Any, Callable[..., None], Tensor], None]


def once(forward: Any, backward: Callable[..., None], x: Tensor) -> None:
    backward(forward(x))


def twice_through_one_graph(forward: Any, backward: Callable[..., None], x: Tensor) -> None:
    loss = forward(x)
    backward(loss, retain_graph=True)
    backward(loss.square())


def forwards_ahead(forward: Any, backward: Callable[..., None], x: Tensor) -> None:
    losses = forward(x), forward(2 * x)
    with torch.no_grad():
        forward(3 * x)
    for loss in losses:
        backward(loss)


def gradient_penalty(forward: Any, backward: Callable[..., None], x: Tensor) -> None:
    x = x.clone().requires_grad_()
    loss = forward(x)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    backward(loss + 10 * (slope.norm() - 1).square())


def third_derivative(forward: Any, backward: Callable[..., None], x: Tensor) -> None:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(forward(x), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.square().sum(), x, create_graph=True)
    backward(bend.square().sum())


def after_another_backward(forward: Any, backward: Callable[..., None], x: Tensor) -> None:
    """A gradient with respect to the input is taken after all parameters were released."""
    x = x.clone().requires_grad_()
    early = forward(x)
    backward(forward(2 * x))
    (slope,) = torch.autograd.grad(early, x, create_graph=True)
    backward(slope.square().sum())


def with_lists(forward: Any, backward: Callable[..., None], x: Tensor) -> None:
    losses: list[Tensor] = []
    more: dict[str, Any] = {}
    forward(x, losses, more=more)
    backward(losses[0] + more["twice"])


def three_forwards(forward: Any, backward: Callable[..., None], x: Tensor) -> None:
    for scale in (1, 2, 3):
        backward(forward(scale * x))


def hessian(forward: Any, backward: Callable[..., None], x: Tensor) -> None:
    product = torch.autograd.functional.hvp(forward, x, torch.ones_like(x), create_graph=True)[1]
    backward(product.square().sum())


def forward_mode(forward: Any, backward: Callable[..., None], x: Tensor) -> None:
    with forward_ad.dual_level():
        loss, slope = forward_ad.unpack_dual(forward(forward_ad.make_dual(x, torch.ones_like(x))))
        backward(loss + slope.square())


@dataclass(frozen=True)
class Case:
    """A module and a loop of it that does one step."""

    make: Callable[[], nn.Module] = Stack
    loop: Loop = once


CASES: dict[str, Case] = {
    "a loss on a layer": Case(OnItself),
    "losses of layers alone": Case(OnlyAuxiliary),
    "a list": Case(InAList),
    "inputs of the model": Case(KeepsInputs, with_lists),
    "in place on an input": Case(InPlaceOnInput),
    "in place on an output": Case(InPlaceOnOutput),
    "a buffer": Case(WritesIntoABuffer),
    "dataclasses": Case(Objects),
    "plain objects": Case(lambda: Objects(ReturnsAPlainObject)),
    "an input returned": Case(ReturnsItsInput),
    "layers called twice": Case(CalledTwice),
    "another order": Case(InAnotherOrder, three_forwards),
    "branches": Case(Branches),
    "a Function": Case(lambda: OnItself(OwnFunction)),
    "LSTM and GRU": Case(lambda: Stack(Recurrent)),
    "attention": Case(lambda: Stack(Attention)),
    "complex numbers": Case(lambda: Stack(Complex)),
    "weight_norm": Case(lambda: Stack(weight_norm)),
    "parametrize": Case(lambda: Stack(parametrized)),
    "vmap": Case(lambda: Stack(lambda: Mapped(WIDTH, WIDTH))),
    "hooks": Case(WithHooks),
    "checkpoint": Case(lambda: Checkpointed(use_reentrant=False)),
    "reentrant checkpoint": Case(lambda: Checkpointed(use_reentrant=True)),
    "one checkpoint": Case(CheckpointedTogether),
    "a checkpoint in a layer": Case(lambda: Objects(RecomputesAPart)),
    "a derivative in the forward": Case(Forces),
    "a derivative in a layer": Case(lambda: Stack(Slopes)),
    "adapters": Case(LowRank),
    "errors": Case(InALoop),
    "a retained graph": Case(loop=twice_through_one_graph),
    "forwards ahead": Case(OnItself, forwards_ahead),
    "a penalty": Case(loop=gradient_penalty),
    "a penalty of checkpoints": Case(lambda: Checkpointed(use_reentrant=False), gradient_penalty),
    "a penalty of checkpoints in layers": Case(lambda: Objects(RecomputesAPart), gradient_penalty),
    "a third derivative": Case(loop=third_derivative),
    "a derivative after a backward": Case(loop=after_another_backward),
    "a Hessian": Case(loop=hessian),
    "forward mode": Case(loop=forward_mode),
}
