"""The files that a run leaves when it has trained: an export and a plot."""

import logging

from models.generation_config import exported_shape, write_generation_config
from models.hf import export
from models.saved_model import widest_dtype
from models.shapes import shape_of
from parallel.checkpoint.hf_folder import too_large
from parallel.checkpoint.shared_failure import fail_together
from parallel.engine.context import DTYPES, dtype_name
from parallel.engine.engine import Engine
from parallel.storage.no_room import disk_problem, naming
from training.plot import draw_loss
from training.preflight import Job
from training.screen import Screen

log = logging.getLogger(__name__)


def export_model(engine: Engine, job: Job, screen: Screen) -> None:
    """Write a Hugging Face directory of the weights, in `output.export_dtype`, and the tokenizer.

    The default dtype is fp64 for an fp64 run, else fp32. It is also used where another cannot hold a weight, because an
    export that fails after the training would lose it. A generation_config.json that `model.path` had is carried on.
    """
    config = engine.config
    engine.mesh.watch.begin("an export")
    shape, widest = exported_shape(shape_of(config), job.tokenizer), widest_dtype(config)
    dtype = DTYPES[config.output.export_dtype] if config.output.export_dtype else widest
    pieces = engine.weights()
    if problem := too_large([(piece, dtype) for piece in pieces], engine.mesh.world):
        screen.print(f"output.export_dtype: {config.output.export_dtype}: {problem} The export is {dtype_name(widest)}")
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
            with naming(job.folder.export):
                write_generation_config(job.folder.export, job.generation, ends=shape.end_tokens, before=before)
    log.info("exported %s", job.folder.export)


def plot_loss(job: Job, screen: Screen) -> None:
    """Draw loss.png from metrics.jsonl, or print what is missing."""
    try:
        if not draw_loss(job.folder.metrics, job.folder.plot):
            screen.print("no loss.png: it needs matplotlib (pip install matplotlib)")
    except OSError as error:
        screen.print(f"no loss.png: {disk_problem(error)}")
