"""What is printed of a run before it starts: its ranks, the layers and bytes of each, and the pipeline's timeline."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from parallel.pipeline.timeline import draw
from training.console import print_line
from training.preview import Preview
from training.rank_grid import cell_caption, cell_of, columns_shown
from training.text import layers_text, plural, readable_bytes


def print_layout(console: Console, preview: Preview, messages: Iterable[str]) -> None:
    """Print the messages, the ranks, the layers of each stage, and the bytes on each rank."""
    for message in messages:
        print_line(console, message)
    config, topology = preview.config, preview.topology
    source = config.model.path or config.model.name
    train, replicas = config.train, topology.shape["data"]
    print_line(console, f"{source}: {preview.parameters:,} parameters in {train.precision}")
    print_line(
        console,
        f"batch: {train.global_batch_size} × {config.data.sequence_length} tokens ="
        f" {plural(replicas, 'replica')} × {plural(preview.num_microbatches, 'microbatch', 'microbatches')}"
        f" × {plural(train.micro_batch_size, 'sample')}",
    )
    kinds = {"context": f" ({config.parallel.context.kind})"}
    sizes = " × ".join(f"{axis} {size}{kinds.get(axis, '')}" for axis, size in topology.shape.items() if size > 1)
    print_line(console, plural(topology.world_size, "rank") + (f" = {sizes}" if sizes else ""))
    console.print(_ranks(preview, console.width))
    inner = {axis: size for axis, size in topology.shape.items() if axis not in ("pipe", "data")}
    if caption := cell_caption(inner):
        print_line(console, caption)
    home = {"cuda": "", "cpu": ", at home on the host", "auto": ", on the device as far as there is room"}
    spare = "" if config.zero.nvme_dir is None else f"; what the host has no room for in {config.zero.nvme_dir}"
    print_line(console, f"on each rank, without activations{home[config.zero.tensor_placement_policy]}{spare}")
    console.print(_stages(preview))


def print_timeline(console: Console, preview: Preview) -> None:
    """Print one step of the pipeline: drawn if it fits the console, else only its bubble."""
    if preview.topology.shape["pipe"] == 1:
        return
    picture = draw(preview.timeline()).splitlines()
    title = f"one step, {preview.config.parallel.pipeline.schedule}, by cost"
    if max(map(len, picture)) > console.width:
        print_line(console, f"{title}: {picture[-1]}")
        return
    print_line(console, f"{title} (F forward, B backward, microbatches from 0):")
    for line in picture:
        print_line(console, line)


def _ranks(preview: Preview, width: int) -> Table:
    """Return the grid of ranks: a row for each stage, a column for each replica, and in a cell those sharing layers."""
    topology = preview.topology
    table = Table()
    first = cell_of(topology, {"pipe": 0, "data": topology.shape["data"] - 1})
    replicas = columns_shown(topology.shape["data"], max(map(len, first.splitlines())) + 3, width - 12)
    table.add_column("")
    for replica in replicas:
        table.add_column("…" if replica is None else f"data {replica}", justify="center")
    for stage in range(topology.shape["pipe"]):
        cells = ["" if d is None else cell_of(topology, {"pipe": stage, "data": d}) for d in replicas]
        table.add_row(f"pipe {stage}", *cells)
    return table


def _stages(preview: Preview) -> Table:
    """Return the layers of each stage, and what each of its ranks holds."""
    table = Table()
    table.add_column("")
    table.add_column("layers")
    for name in ("parameters", "weights", "gradients", "optimizer", "together"):
        table.add_column(name, justify="right")
    for index, stage in enumerate(preview.stages):
        sizes = (stage.weight_bytes, stage.gradient_bytes, stage.optimizer_bytes, stage.total_bytes)
        numbers = [f"{stage.parameters:,}", *map(readable_bytes, sizes)]
        table.add_row(f"pipe {index}", layers_text(stage.layers), *numbers)
    return table
