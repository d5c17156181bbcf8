"""A run from its first step to its last: steps, metrics, evaluation, checkpoints, export."""

import logging
import os
import platform
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import astuple, dataclass

import torch

from models.build import build, outline
from models.data import Loader, SampleOrder
from models.hf import export
from models.shapes import shape_of
from parallel.checkpoint import checkpoint
from parallel.checkpoint.shards import fail_together
from parallel.engine.base import initial_placement_of
from parallel.engine.context import DTYPES, Context, make_context
from parallel.engine.engine import Engine
from parallel.mesh.collectives import barrier
from training.metrics import Meter, MetricsFile, MetricsLine
from training.plot import draw_loss
from training.preflight import Job, metadata
from training.preview import preview
from training.report import Screen
from training.tracer import Tracer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listeners:
    """Who hears of a run while it goes on: of each step's line, and of each checkpoint that is due. `around` is entered
    with a step's number before it and left after it."""

    step: Callable[[MetricsLine], None]
    checkpoint: Callable[[int], None]
    around: Callable[[int], AbstractContextManager[object]] = nullcontext


def run(job: Job) -> None:
    """Train as the job says, on this rank of a world in which every rank does so too."""
    context = make_context(job.config, job.place)
    is_first, world = job.place.rank == 0, context.mesh.world
    check_room(context)
    screen = Screen(job.config, quiet=not is_first)
    notes = list(job.notes)
    with ExitStack() as until_the_end:
        with fail_together(world):
            if is_first:
                if aside := job.folder.make(job.config):
                    notes.append(f"the earlier run is now {aside}")
                until_the_end.enter_context(job.folder.held())
        handler = job.folder.start_log(job.place.rank)
        try:
            _log_place(context)
            screen.start(preview(job.config, job.place.world_size), notes)
            _train(make_engine(context, job), job, screen)
            barrier(world)
            log.info("done")
        except BaseException as error:
            log.error("ended by %s", type(error).__name__, exc_info=error)
            raise
        finally:
            screen.close()
            logging.getLogger().removeHandler(handler)
            handler.close()


def check_room(context: Context) -> None:
    """Whether the host and its disk hold what is not on the device, told before anything is made or touched.

    Raises ConfigError, on every rank.
    """
    if context.config.zero.tensor_placement_policy != "cuda":
        initial_placement_of(outline(context).infos, context)


def make_engine(context: Context, job: Job) -> Engine:
    """An engine before the first step, or where its checkpoint was taken."""
    if job.start is None:
        return Engine(build(context), context)
    engine = Engine(outline(context), context)
    pieces = engine.state_pieces()
    with fail_together(context.mesh.world):
        checkpoint.load(job.start, pieces)
    engine.restore(checkpoint.read_metadata(job.start)["counters"])
    log.info("resumed after step %d from %s", engine.num_steps, job.start)
    return engine


def fit(engine: Engine, loader: Loader, listeners: Listeners, *, validates: bool) -> None:
    """Train from where the engine is to `train.steps`. Every rank does the same, in the same order.

    `validates`: whether there are validation samples. Their loss is taken every `eval_every` steps, and after the last.
    A step's seconds are those of its data, forwards, backwards and update; evaluation and checkpoints are left out.
    """
    steps, output = engine.config.train.steps, engine.config.output
    meter = Meter(engine.config, engine.mesh.world.size, engine.mesh.device)
    while engine.num_steps < steps:
        with listeners.around(engine.num_steps + 1):
            started = time.perf_counter()
            engine.stopwatch.mark("data")
            result = engine.train_step(loader.training(engine.num_steps))
            seconds = time.perf_counter() - started
        step = engine.num_steps
        line = meter.line(step, result, seconds)
        if validates and (step == steps or is_due(step, output.eval_every)):
            line["validation_loss"] = engine.evaluate(loader.validation())
        listeners.step(line)
        if is_due(step, output.checkpoint_every):
            listeners.checkpoint(step)


def is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps is done after this one; every 0 is never."""
    return every > 0 and step % every == 0


def make_loader(engine: Engine, job: Job) -> Loader:
    """This replica's share of the corpus."""
    train, data = engine.config.train, engine.config.data
    order = SampleOrder(job.corpus.num_training, shuffle=data.shuffle, seed=train.seed)
    batch, axis = train.global_batch_size, engine.data
    return Loader(job.corpus, order, global_batch=batch, replica=axis.rank, num_replicas=axis.size)


def _train(engine: Engine, job: Job, screen: Screen) -> None:
    """Fit, with everything that a run leaves behind."""
    folder, world = job.folder, engine.mesh.world
    metrics = MetricsFile(folder.metrics, after=engine.num_steps) if world.rank == 0 else None

    def hear(line: MetricsLine) -> None:
        log.info("%s", line)
        if metrics is not None:
            metrics.write(line)
        screen.step(line)

    def save(step: int) -> None:
        target = checkpoint.step_folder(folder.path, step)
        keep = engine.config.output.keep_checkpoints
        pieces = engine.state_pieces(owned=True)
        checkpoint.save(target, pieces, metadata=metadata(engine.config, engine.counters()), axis=world, keep=keep)
        log.info("saved %s", target)
        screen.say(f"saved {target}")

    trace = folder.trace(world.rank)
    tracer = Tracer(job.profiled, trace, engine.mesh.device, done=lambda: screen.say(f"traced: {trace}"))
    engine.placement_manager.say = screen.say
    listeners = Listeners(hear, save, tracer.around)
    try:
        fit(engine, make_loader(engine, job), listeners, validates=job.corpus.num_validation > 0)
    finally:
        tracer.close()
        if metrics is not None:
            metrics.close()
    if engine.config.output.export:
        _export(engine, job)
    if metrics is not None and not draw_loss(folder.metrics, folder.plot):
        screen.say("no loss.png: it takes matplotlib (pip install matplotlib)")
    screen.finish(folder, engine.num_steps)


def _export(engine: Engine, job: Job) -> None:
    config = engine.config
    dtype = DTYPES[config.output.export_dtype or ("fp64" if config.train.precision == "fp64" else "fp32")]
    export(
        job.folder.export,
        engine.weights(),
        shape=shape_of(config),
        axis=engine.mesh.world,
        dtype=dtype,
        tokenizer=job.tokenizer,
    )
    log.info("exported %s", job.folder.export)


def _log_place(context: Context) -> None:
    place = context.place
    log.info("python %s, torch %s, %s", platform.python_version(), torch.__version__, platform.platform())
    log.info("host %s, process %d", socket.gethostname(), os.getpid())
    log.info("rank %d of %d, on this host %d of %d", *astuple(place))
    log.info("device %s, coordinates %s", context.device, context.mesh.coordinates)
    log.info("config %s", context.config.to_dict())
