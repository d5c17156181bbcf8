"""A whole run on one rank: its ranks are connected, its folder, log and screen are opened, and it trains."""

import logging
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import astuple, replace
from functools import partial
from importlib import import_module

import torch

from models.build import build, part_of
from models.data import Loader, SampleOrder
from parallel.checkpoint.shared_failure import fail_together
from parallel.checkpoint.verify import verify
from parallel.engine.composition import initial_placement_of
from parallel.engine.context import Context, make_context
from parallel.engine.engine import Engine
from parallel.errors import CheckpointError, DataError
from parallel.mesh.collectives import barrier, gather_objects
from parallel.mesh.mesh import Axis
from parallel.placement.shortage import refusing_without_room
from parallel.watch.process import host_name
from parallel.watch.watch import UNWATCHED, Watch
from training.action_files import ActionFile
from training.artifacts import export_model, plot_loss
from training.attempt import Attempt, SavedNote
from training.callbacks import Callback, Callbacks, Run
from training.checkpoints import Checkpoints
from training.disk_room import telling_of_checkpoints
from training.log_file import StepLog, log_file
from training.loop import ends_early, fit
from training.metrics_file import MetricsFile
from training.preflight import Job, modules_of_steps
from training.preview import preview_of
from training.resume import counters_of, history_of, set_aside
from training.screen import Screen
from training.tracer import Tracer

log = logging.getLogger(__name__)


def run_job(
    job: Job,
    watch: Watch = UNWATCHED,
    *,
    callbacks: Sequence[Callback] = (),
    attempt: Attempt | None = None,
    debug_comm: bool = False,
) -> None:
    """Train as the job says. Every rank of the world calls this; `watch` is its watch over the others.

    `callbacks` are called beside those that the config names. `attempt` is what the process and its launcher give.
    `debug_comm`: the ranks compare what they communicate. Raises CallbackError, on every rank, where a callback fails;
    SignalError where a signal has come, and all is saved.
    """
    attempt = attempt or Attempt()
    with refusing_without_room(job.place.rank, "the start"):
        context = make_context(job.config, job.place, watch=watch, debug_comm=debug_comm)
        check_room(context)
    check_same_data(job, context.mesh.world)
    job = with_whole_checkpoint(job, context.mesh.world)
    context = replace(context, config=job.config)
    screen = Screen(job.config, job.corpus.num_training, quiet=job.place.rank != 0)
    with (
        run_folder(job, context.mesh.world, attempt) as messages,
        log_file(job.folder.log(job.place.rank), append=job.folder.resumed),
        attempt.record.logging(job.folder.log(job.place.rank)),
        closing(screen),
    ):
        log_environment(context)
        log_passed_over(job)
        preview = preview_of(job.config, job.place.world_size)
        screen.start(preview, [*job.messages, *messages])
        with refusing_without_room(job.place.rank, "making the model" if job.resume_from is None else "loading"):
            engine = make_engine(context, job)
        attempt.stop.tell(partial(engine.notices.set, "signal"))
        engine.memory_guard.predicted = preview.parts[engine.pipe.rank].total_bytes
        with engine.memory_guard.explained(lambda: watch.progress.phase or watch.progress.action):
            train(engine, job, screen, [*callbacks, SavedNote(attempt.history)])
        barrier(context.mesh.world)
        log.info("done")


def train(engine: Engine, job: Job, screen: Screen, given: Sequence[Callback] = ()) -> None:
    """Train to the last step, and leave the metrics, checkpoints, traces, export and plot that the job asks for."""
    engine.placement_manager.log = engine.steps.say = screen.print
    world, history = engine.mesh.world, history_of(job.inputs.found)
    history.outliers.log = screen.print
    callbacks = Callbacks([StepLog(), MetricsFile(job.folder.metrics), screen, *given], job.callbacks, world)
    tracer = Tracer(job.traced_steps, job.folder.trace(world.rank), engine.mesh.device, say=screen.print)
    actions = ActionFile(job.traced_steps, job.folder.action_times(world.rank), engine, say=screen.print)
    checkpoints = Checkpoints(engine, job, history, callbacks.on_checkpoint)
    checkpoints.settle()
    if message := checkpoints.prepare():
        screen.print(message)

    @contextmanager
    def around_step(step: int) -> Iterator[None]:
        with tracer.around_step(step), actions.around_step(step):
            yield
        checkpoints.look()

    num_told = engine.num_steps - (history.best.unevaluated is not None)  # the line of the last step is still to come
    with callbacks.running(Run(job.config, job.folder.path, world.rank, num_told, screen.print)):
        with closing(tracer), telling_of_checkpoints(engine.config), checkpoints.finished():
            fit(
                engine,
                make_loader(engine, job),
                callbacks=callbacks,
                save=checkpoints.save,
                history=history,
                around_step=around_step,
            )
        if ends_early(job.config, history.best) and engine.num_steps < job.config.train.steps:
            screen.ended_early(history.best)
        engine.check_finite("The run has not come to a model: nothing is exported.")
        if engine.config.output.export:
            export_model(engine, job, screen)
        if world.rank == 0:
            plot_loss(job, screen)
    screen.finish(job.folder, engine.num_steps, history.best)


def check_room(context: Context) -> None:
    """Raise ConfigError, on every rank, if the host and its disk cannot hold what is offloaded to them.

    Nothing has been allocated or written then.
    """
    if context.config.zero.tensor_placement_policy != "cuda":
        initial_placement_of(part_of(context).infos, context)


def check_same_data(job: Job, world: Axis) -> None:
    """Raise DataError, on every rank, if the ranks have read other tokens: from files of several hosts, say."""
    read = gather_objects((job.corpus.num_tokens, job.corpus.digest), world)
    if len(set(read)) > 1:
        ranks = "; ".join(f"rank {rank}: {tokens} tokens, {digest:08x}" for rank, (tokens, digest) in enumerate(read))
        raise DataError(
            f"data.path: {job.config.data.path} is not the same on every rank, or data.tokenizer is not: {ranks}. Give"
            " every rank the same files."
        )


def with_whole_checkpoint(job: Job, world: Axis) -> Job:
    """Return the job with a checkpoint whose contents are those that were written; nothing has been touched yet.

    The ranks share its files. Where they are damaged and `--resume auto` was given, the job goes on from the newest one
    that is whole, and all that follows from it is another one. Raises CheckpointError, on every rank.
    """
    while (found := job.inputs.found) is not None:
        try:
            verify(found.index, world)
            break
        except CheckpointError as damage:
            with fail_together(world):
                job = replace(job, inputs=job.inputs.without_damaged(damage))
    return job


def log_passed_over(job: Job) -> None:
    """Write to the log which checkpoints were passed over, and why."""
    for message in () if job.inputs.found is None else job.inputs.found.messages:
        log.warning("%s", message)


@contextmanager
def run_folder(job: Job, world: Axis, attempt: Attempt) -> Iterator[list[str]]:
    """Make the run's folder and lock it, on rank 0, until the `with` statement ends. Yields messages about it.

    An OSError on rank 0 is raised on every rank.
    """
    messages = []
    with ExitStack() as until_the_end:
        with refusing_without_room(world.rank, "making the run's folder"), fail_together(world):
            if world.rank == 0:
                if earlier := job.folder.make(job.config):
                    messages.append(f"the earlier run was renamed to {earlier}")
                until_the_end.enter_context(job.folder.lock.held())
                if job.inputs.found is not None:
                    set_aside(job.inputs.found)
        attempt.begin(job)
        yield messages


def make_engine(context: Context, job: Job) -> Engine:
    """Return an engine before the first step, or in the state that the job's checkpoint has.

    Raises NonFiniteError, on every rank, where a weight or a state that was read is not finite.
    """
    for name in modules_of_steps(job.config):
        import_module(name)
    found = job.inputs.found
    engine = Engine(build(context) if found is None else part_of(context), context)
    engine.writes.stop()  # no code of a user runs between these steps
    if found is not None:
        context.mesh.watch.begin("loading a checkpoint")
        pieces = engine.state_pieces()
        with fail_together(context.mesh.world):
            found.index.archive.read_into(pieces)
        engine.restore(counters_of(found.index))
        engine.restore_scales(found.index)
        engine.check_finite(f"It was loaded from {job.resume_from}.", states=True)
        log.info("resumed after step %d, sample %d, from %s", engine.num_steps, engine.num_samples, job.resume_from)
    elif job.config.model.path is not None:
        engine.check_finite(f"It was read from model.path {job.config.model.path}, or drawn.")
    return engine


def make_loader(engine: Engine, job: Job) -> Loader:
    """Return the loader of this replica's share of the corpus."""
    train, data = engine.config.train, engine.config.data
    order = SampleOrder(job.corpus.num_training, shuffle=data.shuffle, seed=train.seed)
    batch, axis = train.global_batch_size, engine.data
    return Loader(job.corpus, order, global_batch=batch, replica=axis.rank, num_replicas=axis.size)


def log_environment(context: Context) -> None:
    """Write to the log what a reader of it must know: versions, host, process, rank, device, and the whole config."""
    place = context.place
    log.info("python %s, torch %s, %s", platform.python_version(), torch.__version__, platform.platform())
    log.info("host %s, process %d", host_name(), os.getpid())
    log.info("rank %d of %d, on this host %d of %d", *astuple(place))
    log.info("device %s, coordinates %s", context.device, context.mesh.coordinates)
    log.info("config %s", context.config.to_dict())
