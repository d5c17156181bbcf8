"""Tensor parallelism: the layers, the matmul and the loss that all modes share, a file for each mode, and a table."""

from parallel.tensor.cube import Cube
from parallel.tensor.grid import Grid
from parallel.tensor.line import Line, SequenceLine
from parallel.tensor.mode import Mode

__all__ = ["MODES", "Mode"]

MODES: dict[str | None, type[Mode]] = {  # by TensorConfig.kind
    None: Mode,
    "1d": Line,
    "1d, sequence parallel": SequenceLine,
    "2d": Grid,
    "2.5d": Grid,
    "3d": Cube,
}
