"""The files that a run leaves: metrics, checkpoints and traces while it trains, and then an export and a plot."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.generation_config import exported_shape, write_generation_config
from models.hf import export
from models.shapes import shape_of
from parallel.checkpoint import checkpoint
from parallel.checkpoint.hf_folder import too_large
from parallel.checkpoint.shards import fail_together
from parallel.engine.context import DTYPES
from parallel.engine.engine import Engine
from training.export import widest_dtype
from training.loop import Listeners
from training.metrics import MetricsFile, MetricsLine
from training.plot import draw_loss
from training.preflight import Job
from training.resume import metadata_of
from training.screen import Screen
from training.tracer import Tracer

log = logging.getLogger(__name__)


@contextmanager
def written_while_training(engine: Engine, job: Job, screen: Screen) -> Iterator[Listeners]:
    """Yield listeners that write metrics.jsonl (on rank 0), checkpoints and traces, and show each step on the screen.

    Its files are closed when the `with` statement ends, whatever ended it.
    """
    rank = engine.mesh.world.rank
    metrics = MetricsFile(job.folder.metrics, after=engine.num_steps) if rank == 0 else None
    trace = job.folder.trace(rank)
    tracer = Tracer(job.traced_steps, trace, engine.mesh.device, on_written=lambda: screen.print(f"traced: {trace}"))

    def on_step(line: MetricsLine) -> None:
        log.info("%s", line)
        if metrics is not None:
            metrics.write(line)
        screen.step(line)

    def on_checkpoint(step: int) -> None:
        target = save_checkpoint(engine, job, step)
        log.info("saved %s", target)
        screen.print(f"saved {target}")

    try:
        yield Listeners(on_step, on_checkpoint, tracer.around_step)
    finally:
        tracer.close()
        if metrics is not None:
            metrics.close()


def save_checkpoint(engine: Engine, job: Job, step: int) -> Path:
    """Save what the engine needs to go on after this step, and return the folder. Each rank writes what it owns."""
    target = checkpoint.step_folder(job.folder.path, step)
    keep = engine.config.output.keep_checkpoints
    metadata = metadata_of(engine.config, engine.counters(), job.corpus)
    checkpoint.save(target, engine.state_pieces(owned=True), metadata=metadata, axis=engine.mesh.world, keep=keep)
    return target


def export_model(engine: Engine, job: Job, screen: Screen) -> None:
    """Write a Hugging Face directory of the weights, in `output.export_dtype`, and the tokenizer.

    The default dtype is fp64 for an fp64 run, else fp32. It is also used where another cannot hold a weight, because an
    export that fails after the training would lose it. A generation_config.json that `model.path` had is carried on.
    """
    config = engine.config
    shape, widest = exported_shape(shape_of(config), job.tokenizer), widest_dtype(config)
    dtype = DTYPES[config.output.export_dtype] if config.output.export_dtype else widest
    pieces = engine.weights()
    if problem := too_large([(piece, dtype) for piece in pieces], engine.mesh.world):
        screen.print(f"output.export_dtype: {config.output.export_dtype}: {problem} The export is {widest}")
        dtype = widest
    export(
        job.folder.export,
        pieces,
        shape=shape,
        axis=engine.mesh.world,
        dtype=dtype,
        tokenizer=job.tokenizer,
    )
    with fail_together(engine.mesh.world):
        if engine.mesh.world.rank == 0 and job.generation is not None:
            before = shape_of(config).end_tokens
            write_generation_config(job.folder.export, job.generation, ends=shape.end_tokens, before=before)
    log.info("exported %s", job.folder.export)


def plot_loss(job: Job, screen: Screen) -> None:
    """Draw loss.png from metrics.jsonl, or print what is missing."""
    if not draw_loss(job.folder.metrics, job.folder.plot):
        screen.print("no loss.png: it needs matplotlib (pip install matplotlib)")
