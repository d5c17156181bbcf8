"""torch's compiler, and what it needs, is not imported before something is compiled: it costs a second of CPU time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from parallel.ops.compiling import not_compiled
from training.config import read_config
from training.preflight import modules_of_steps

ROOT = Path(__file__).parent.parent

PROGRAM = """
import json, sys
import torch
before = set(sys.modules)  # imported by torch itself
import launch
try:
    code = launch.main(launch.read_arguments(sys.argv[1:]))
except SystemExit as ended:
    code = ended.code
print(json.dumps([code, sorted(set(sys.modules) - before)]))
"""

COMPILER = ("torch._dynamo", "torch._inductor", "torch._functorch.aot_autograd", "sympy")

SMALL = (
    "model.hidden_size=32",
    "model.ffn_dim=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "data.sequence_length=32",
    "train.steps=1",
    "train.device=cpu",
    "output.export=False",
)


def run_launch(*arguments: str) -> tuple[int, set[str]]:
    """Run launch.py in a new process; return its exit code and the modules of the compiler that it has imported."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    code, names = json.loads(done.stdout.splitlines()[-1])
    return code, {name for name in names if any(f"{name}.".startswith(f"{one}.") for one in COMPILER)}


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (0, ["--check"]),
        (0, ["--check", "--config", "configs/opt_tiny_pp2_2p5d.py"]),
        (0, ["--help"]),
        (2, ["--set", "train.stepz=1"]),
        (2, ["--check", "--set", "parallel.tensor.mode=3d", "parallel.tensor.size=7"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_no_compiler_is_imported_by(code: int, arguments: list[str]) -> None:
    assert run_launch(*arguments) == (code, set())


def test_no_compiler_is_imported_by_a_run_that_compiles_nothing(tmp_path: Path) -> None:
    assert run_launch("--set", *SMALL, f"output.dir={tmp_path}/run") == (0, set())


def test_an_imported_compiler_is_noticed(tmp_path: Path) -> None:
    """torch's own checkpoint imports it: a run that recomputes shows that the tests above can fail."""
    code, found = run_launch("--set", *SMALL, f"output.dir={tmp_path}/run", "train.activation_checkpointing=full")
    assert code == 0
    assert "torch._dynamo" in found


# -- functions that compiled code calls and does not look into ---------------------------------------------------------


class _Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return _below(x).cos()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return dy.tan()


def _below(x: Tensor) -> Tensor:
    return x.sin()


class Graphs:
    """A backend for torch.compile that records the operations of each graph and does not compile them."""

    def __init__(self) -> None:
        self.found: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        self.found.append([node.name for node in graph.graph.nodes if node.op in ("call_function", "call_method")])
        return graph.forward


def graphs_around(inner: object) -> list[list[str]]:
    """Compile two operations around a call of `inner`, check the result, and return the operations of each graph."""
    torch._dynamo.reset()
    graphs, x = Graphs(), torch.linspace(0, 1, 5, requires_grad=True)

    def outer(x: Tensor) -> Tensor:
        return inner(x + 1) * 2  # type: ignore[operator, no-any-return]

    y = torch.compile(outer, backend=graphs)(x)
    torch.testing.assert_close(y, (x + 1).sin().cos() * 2)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.full_like(x, 2).tan())
    return graphs.found


def test_compiled_code_does_not_look_into_a_marked_function() -> None:
    """Neither the autograd function nor the plain function that it calls is compiled, as with torch's own mark."""

    @not_compiled
    def marked(x: Tensor) -> Tensor:
        return _Cosine.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    def plain(x: Tensor) -> Tensor:
        return _Cosine.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    assert graphs_around(marked) == [["add"], ["mul"]]
    assert graphs_around(marked) == [["add"], ["mul"]], "the marks are lost when the compiler is reset"
    assert graphs_around(torch.compiler.disable(plain)) == [["add"], ["mul"]]


def test_compiled_code_does_not_look_into_a_marked_hook() -> None:
    class Hooked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_forward_pre_hook(self.before)

        @not_compiled
        def before(self, module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            return (_below(inputs[0]),)

        def forward(self, x: Tensor) -> Tensor:
            return x.cos()

    torch._dynamo.reset()
    graphs, x = Graphs(), torch.linspace(0, 1, 5)
    torch.testing.assert_close(torch.compile(Hooked(), backend=graphs)(x), x.sin().cos())
    assert graphs.found == [["cos"]]


def test_a_marked_function_is_not_wrapped() -> None:
    def function() -> None:
        pass

    assert not_compiled(function) is function


def test_torchs_own_mark_is_used_where_these_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(eval_frame, "set_code_exec_strategy")

    def inner(x: Tensor) -> Tensor:
        return _Cosine.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    marked = not_compiled(inner)
    monkeypatch.undo()
    assert marked is not inner
    assert graphs_around(marked) == [["add"], ["mul"]]


@pytest.mark.parametrize(
    ("change", "modules"), [((), []), (("train.activation_checkpointing=full",), ["torch._dynamo"])]
)
def test_what_a_step_imports_is_imported_before_it_is_timed(change: tuple[str, ...], modules: list[str]) -> None:
    """The first step of a run that recomputes once took a second longer on every rank."""
    assert modules_of_steps(read_config(None, change, 1)) == modules
