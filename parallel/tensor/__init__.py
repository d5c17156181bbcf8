"""Tensor parallelism: what a mode is, one file a mode, and one table of them all."""

from parallel.tensor.cube import Cube
from parallel.tensor.grid import Grid
from parallel.tensor.line import Line
from parallel.tensor.mode import Mode

__all__ = ["MODES", "Mode"]

MODES: dict[str | None, type[Mode]] = {
    None: Mode,
    "1d": Line,
    "2d": Grid,
    "2.5d": Grid,
    "3d": Cube,
}
