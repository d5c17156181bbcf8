"""The printed report of a run before it starts: its ranks, and the layers and bytes of each."""

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from models.linears import block_linears
from parallel.config import Config
from parallel.errors import with_short_words
from training.console import print_line
from training.preview import Preview
from training.rank_grid import cell_caption, cell_of, columns_shown
from training.text import layers_text, plural, readable_bytes

SIZES = ("parameters", "weights", "gradients", "optimizer")
"""The columns that are left out where they do not fit into the console, all but the first of them, or all."""

NO_LIMIT = 10**6  # columns

# where parameters and optimizer states are kept, by zero.tensor_placement_policy
PLACEMENT = {
    "cuda": "",
    "cpu": "; all of it is offloaded to the host",
    "auto": "; on the device as far as it fits, the rest on the host",
}


def print_layout(console: Console, preview: Preview, messages: Iterable[str]) -> None:
    """Print the messages, the ranks, the layers of each stage, and the bytes on each rank."""
    for line in (*messages, *_summary(preview)):
        print_line(console, with_short_words(line))
    console.print(_ranks(preview, console.width))
    inner = {axis: size for axis, size in preview.topology.shape.items() if axis not in ("pipe", "data")}
    if caption := cell_caption(inner):
        print_line(console, caption)
    print_line(console, _memory_title(preview.config))
    tables = (_stages(preview, names) for names in (SIZES, SIZES[:1], ()))
    console.print(next((table for table in tables if _fits(table, console)), _stages(preview, ())))


def _summary(preview: Preview) -> Iterator[str]:
    """Yield the size of the model, how a global batch is divided, and the sizes of the mesh."""
    config, topology = preview.config, preview.topology
    train, replicas = config.train, topology.shape["data"]
    yield f"{config.model.path or config.model.name}: {preview.parameters:,} parameters in {_precision(preview)}"
    yield (
        f"batch: {train.global_batch_size} × {config.data.sequence_length} tokens ="
        f" {plural(replicas, 'replica')} × {plural(preview.num_microbatches, 'microbatch', 'microbatches')}"
        f" × {plural(train.micro_batch_size, 'sample')}"
    )
    kinds = {"context": f" ({config.parallel.context.kind})"}
    sizes = " × ".join(f"{axis} {size}{kinds.get(axis, '')}" for axis, size in topology.shape.items() if size > 1)
    yield plural(topology.world_size, "rank") + (f" = {sizes}" if sizes else "")


def _precision(preview: Preview) -> str:
    """Return the precision of a run, in fp8 with the linears of a block that are too small for it."""
    train = preview.config.train
    if train.precision != "fp8":
        return train.precision
    small = [str(x) for x in block_linears(preview.shape) if not train.multiplies_in_8_bits(x.elements)]
    return f"{train.dtype}, with linears in fp8{' but ' if small else ''}{' and '.join(small)}"


def _memory_title(config: Config) -> str:
    """Return the line above the bytes of each rank, which says where they are kept."""
    placement, disk = PLACEMENT[config.zero.tensor_placement_policy], config.zero.nvme_dir
    overflow = "" if disk is None else f", and in {disk} the optimizer states that do not fit there"
    return f"memory of each rank, without activations{placement}{overflow}"


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


def _stages(preview: Preview, names: Sequence[str]) -> Table:
    """Return the layers at each place of the pipe, and what a rank there holds: these of the `SIZES`, and all bytes."""
    table = Table()
    table.add_column("", no_wrap=True)
    table.add_column("layers", min_width=len("layers,"))
    for name in (*names, "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, part in enumerate(preview.parts):
        sizes = (part.weight_bytes, part.gradient_bytes, part.optimizer_bytes)
        numbers = [f"{part.parameters:,}", *map(readable_bytes, sizes)][: len(names)]
        layers = [name for stage in sorted(part.stages) for name in part.stages[stage]]
        table.add_row(f"pipe {index}", layers_text(layers), *numbers, readable_bytes(part.total_bytes))
    for column in table.columns:
        if column.no_wrap:
            column.min_width = max(map(len, map(str, [column.header, *column.cells])))
    return table


def _fits(table: Table, console: Console) -> bool:
    """Return whether no word and no number of a table is cut off."""
    return Measurement.get(console, console.options.update(max_width=NO_LIMIT), table).minimum <= console.width
