"""What a run shows on the screen, on rank 0 alone: its layout, its progress, its end."""

import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from parallel.config import Config
from parallel.pipeline.timeline import draw
from training.metrics import MetricsLine
from training.preview import Preview
from training.rank_grid import cell_caption, cell_of, columns_shown
from training.run_folder import RunFolder

PLAIN_WIDTH = 110  # where there is no terminal to ask
RECENT_STEPS = 20  # what the time left is judged by


class Screen:
    """Shows a run; a `quiet` one, that of every rank but the first, shows nothing."""

    def __init__(self, config: Config, *, quiet: bool) -> None:
        self.config = config
        self._has_bar = sys.stdout.isatty() and not quiet
        self.console = Console(quiet=quiet, highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
        self._bar: Progress | None = None
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last: MetricsLine | None = None
        self._validation: float | None = None
        self._tokens, self._seconds, self._began = 0.0, 0.0, time.monotonic()

    # -- before -------------------------------------------------------------------------------------------------------

    def plan(self, preview: Preview, notes: Iterable[str]) -> None:
        """What was overridden, and the layout: the ranks, the layers of each stage, the bytes of each rank."""
        for note in notes:
            self.say(note)
        config, topology = preview.config, preview.topology
        source = config.model.path or config.model.name
        train, replicas = config.train, topology.shape["data"]
        self.say(f"{source}: {preview.parameters:,} parameters in {train.precision}")
        self.say(
            f"batch: {train.global_batch_size} × {config.data.sequence_length} tokens ="
            f" {plural(replicas, 'replica')} × {plural(preview.num_microbatches, 'microbatch', 'microbatches')}"
            f" × {plural(train.micro_batch_size, 'sample')}"
        )
        kinds = {"context": f" ({config.parallel.context.kind})"}
        shape = topology.shape.items()
        sizes = " × ".join(f"{axis} {size}{kinds.get(axis, '')}" for axis, size in shape if size > 1)
        self.say(plural(topology.world_size, "rank") + (f" = {sizes}" if sizes else ""))
        self.console.print(_ranks(preview, self.console.width))
        inner = {axis: size for axis, size in topology.shape.items() if axis not in ("pipe", "data")}
        if caption := cell_caption(inner):
            self.say(caption)
        home = {"cuda": "", "cpu": ", at home on the host", "auto": ", on the device as far as there is room"}
        spare = "" if config.zero.nvme_dir is None else f"; what the host has no room for in {config.zero.nvme_dir}"
        self.say(f"on each rank, without activations{home[config.zero.tensor_placement_policy]}{spare}")
        self.console.print(_stages(preview))

    def timeline(self, preview: Preview) -> None:
        """One step of the pipeline, drawn where it fits the screen; else only its bubble."""
        if preview.topology.shape["pipe"] == 1:
            return
        picture = draw(preview.timeline()).splitlines()
        title = f"one step, {preview.config.parallel.pipeline.schedule}, by cost"
        if max(map(len, picture)) > self.console.width:
            self.say(f"{title}: {picture[-1]}")
            return
        self.say(f"{title} (F forward, B backward, microbatches from 0):")
        for line in picture:
            self.say(line)

    def start(self, preview: Preview, notes: Iterable[str]) -> None:
        """The plan; from here on there is a bar, where there is a terminal."""
        self.plan(preview, notes)
        self._began = time.monotonic()
        if self._has_bar:
            columns = TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TextColumn("{task.description}")
            self._bar = Progress(*columns, console=self.console, expand=True)
            self._bar.add_task("", total=self.config.train.steps)
            self._bar.start()

    # -- during -------------------------------------------------------------------------------------------------------

    def step(self, line: MetricsLine) -> None:
        """A step was taken: move the bar, or print a line every `log_every` steps and where there was an evaluation."""
        step, steps = int(line["step"] or 0), self.config.train.steps
        seconds = float(line["step_seconds"] or 0)
        self._recent.append(seconds)
        self._last, self._seconds = line, self._seconds + seconds
        self._tokens += seconds * float(line["tokens_per_second"] or 0)
        text = (
            f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
            f"  {duration(statistics.median(self._recent) * (steps - step))} left"
        )
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, description=text)
        elif step % self.config.output.log_every == 0 or step == steps:
            self.say(f"step {step:>{len(str(steps))}}/{steps}  lr {line['lr']:.2e}  {text}")
        if "validation_loss" in line:
            self._validation = line["validation_loss"]
            self.say(f"step {step:>{len(str(steps))}}/{steps}  validation loss {self._validation:.4f}")

    # -- after --------------------------------------------------------------------------------------------------------

    def finish(self, folder: RunFolder, steps: int) -> None:
        """The end of it all, after so many steps, and where to find what."""
        self.close()
        self.say("done")
        table = Table(show_header=False, box=None, padding=(0, 2))
        if self._last is None:
            table.add_row("steps", f"none to take: {steps} were taken before")
        else:
            table.add_row("final loss", f"{self._last['loss']:.4f}")
            if self._validation is not None:
                table.add_row("validation loss", f"{self._validation:.4f}")
            table.add_row("speed", f"{self._tokens / self._seconds:,.0f} tokens/s")
            table.add_row("time", duration(time.monotonic() - self._began))
        for name, path in (("metrics", folder.metrics), ("picture", folder.plot), ("model", folder.export)):
            if path.exists():
                table.add_row(name, str(path))
        self.console.print(table)

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, text: str) -> None:
        """A line as it is, above the bar where there is one."""
        self.console.print(Text(text), soft_wrap=True)


def _ranks(preview: Preview, width: int) -> Table:
    """The grid of ranks: a row for each pipeline stage, a column for each replica; in a cell, those sharing layers."""
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
    """The layers of each stage, and what each of its ranks holds."""
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


def layers_text(names: Sequence[str]) -> str:
    """('embed', 'layers.0', 'layers.1', 'head') -> 'embed, layers 0–1, head'"""
    numbers = [name.removeprefix("layers.") for name in names if name.startswith("layers.")]
    blocks = [f"layers {numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else f"layer {numbers[0]}"] if numbers else []
    return ", ".join([*(n for n in names if n == "embed"), *blocks, *(n for n in names if n == "head")])


def plural(count: int, one: str, many: str | None = None) -> str:
    """(2, 'rank') -> '2 ranks'"""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def readable_bytes(number: float) -> str:
    """1536 -> '1.5 KiB'"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def duration(seconds: float) -> str:
    """75 -> '1:15', 3675 -> '1:01:15'"""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
