"""What a feed-forward sends, forward and backward, is what the table in docs/notation.md says."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallel.config_parallel import TensorConfig
from parallel.mesh import Axis, Mesh, Traffic
from parallel.tensor import MODES
from parallel.topology import Topology
from tests.harness import run

TABLE = Path(__file__).parent.parent / "docs/notation.md"
B, S, H, F = 8, 3, 16, 48

LAYOUTS = [
    ("1d", TensorConfig("1d", 4)),
    ("2d, 2.5d", TensorConfig("2d", 8, rows=2)),
    ("2d, 2.5d", TensorConfig("2.5d", 8, depth=2)),
    ("3d, edge q", TensorConfig("3d", 8)),
]


class CountedByAxis(Mesh):
    """A mesh in which each axis has traffic of its own."""

    def __init__(self, tensor: TensorConfig, rank: int) -> None:
        self.counted: dict[str, Axis] = {}
        topology = Topology({"pipe": 1, "data": 1, "context": 1, **tensor.axes()})
        super().__init__(topology, rank, merged=MODES[tensor.mode].merged_axes())

    def axis(self, *names: str) -> Axis:
        axis = super().axis(*names)
        return self.counted.setdefault(axis.name, replace(axis, traffic=Traffic()))

    def sent(self) -> float:
        """Elements that this rank has sent since the last call, if every collective is a ring."""
        total = 0.0
        for axis in self.counted.values():
            n, handed = axis.size, axis.traffic.bytes
            total += (n - 1) * handed["all_gather"]  # handed: this rank's part
            total += (n - 1) / n * (handed["reduce_scatter"] + 2 * handed["all_reduce"])  # handed: the whole
            axis.traffic.reset()
        return total / torch.float64.itemsize


def sent_by_a_feed_forward(rank: int, world_size: int, tensor: TensorConfig) -> tuple[float, float]:
    mesh = CountedByAxis(tensor, rank)
    mode = MODES[tensor.mode](mesh, torch.float64)
    into, out = mode.linear_in(F, H), mode.linear_out(H, F)
    x = torch.ones(mode.activation_shape(B, S, H), dtype=torch.float64, requires_grad=True)
    y = out(into(x))
    forward = mesh.sent()
    y.sum().backward()
    return forward, mesh.sent()


@pytest.mark.parametrize(("row", "tensor"), LAYOUTS, ids=["1d4", "2d8-2x4", "2.5d8-depth2", "3d8"])
def test_a_feed_forward_sends_what_the_table_says(row: str, tensor: TensorConfig) -> None:
    axes = tensor.axes()
    letters = dict(T=B * S, H=H, F=F, p=tensor.size, q=axes.get("w"))
    letters |= dict(d=axes.get("depth"), r=axes.get("row"), c=axes.get("col"))
    found = re.search(rf"^\| {re.escape(row)} \| (.*?) \| (.*?) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    formulas = [cell.replace("·", "*").replace("−", "-") for cell in found.groups()]
    wanted = tuple(eval(formula, letters) for formula in formulas)
    assert run(sent_by_a_feed_forward, tensor.size, tensor) == [wanted] * tensor.size
