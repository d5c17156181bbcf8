"""A generation as a whole: what is asked for, what can be checked before anything is loaded, and the texts."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.chat import load_chat_template
from models.data.records import Record
from models.generation.layout import config_for
from models.generation.prompts import read_prompts, tokens_of
from models.generation.text_generator import Continuation, Options, TextGenerator
from models.generation.trained_model import TrainedModel, find_trained_model
from parallel.config import Config
from parallel.engine.context import Place, make_context
from parallel.engine.device import choose_device
from parallel.engine.facts import digest_of_code, facts_of
from parallel.engine.inference import refuse
from parallel.errors import DataError, RoomError
from parallel.storage.no_room import memory_without_room
from parallel.watch.watch import UNWATCHED, Watch


@dataclass(frozen=True)
class Request:
    """The prompts, the model and the options that a user gives. `chat`: prompts that are text are messages of a user.

    `dtype` is a precision as train.precision names it. `config` is a file, of which `assignments` change keys.
    """

    folder: Path
    prompts: Sequence[str | Record]
    file: Path | None = None
    chat: bool = False
    options: Options = field(default_factory=Options)
    tokenizer: str | None = None
    config: str | None = None
    assignments: Sequence[str] = ()
    dtype: str | None = None


@dataclass(frozen=True)
class GenerationJob:
    """A generation that has passed every check. `tokens` are those of each prompt."""

    trained: TrainedModel
    config: Config
    prompts: Sequence[str | Record]
    tokens: Sequence[Sequence[int]]
    generator: TextGenerator

    def facts(self, world_size: int) -> dict[str, Any]:
        """Return what must be the same on all ranks: config, code, prompts and options."""
        models = Path(__file__).parents[1]
        asked = repr((self.trained.folder.name, self.trained.shape, self.tokens, self.generator.options))
        return {
            **facts_of(self.config, world_size),
            "code of models": digest_of_code(models),
            "model, prompts and options": hashlib.sha256(asked.encode()).hexdigest()[:16],
        }


def prepare(request: Request, place: Place, world_size: int) -> GenerationJob:
    """Check all that can be checked without weights. Raises ConfigError, DataError or CheckpointError."""
    trained = find_trained_model(request.folder, request.tokenizer)
    config = config_for(trained, request.config, request.assignments, dtype=request.dtype, world_size=world_size)
    refuse(config)
    choose_device(config.train.device, local_rank=place.local_rank, local_world_size=place.local_world_size)
    prompts = [*request.prompts, *([] if request.file is None else read_prompts(request.file))]
    tokens = _tokens(trained, prompts, chat=request.chat)
    generator = TextGenerator(trained, request.options)
    generator.check(tokens)
    return GenerationJob(trained, config, prompts, tokens, generator)


def generate(
    job: GenerationJob,
    place: Place,
    *,
    watch: Watch = UNWATCHED,
    listener: Callable[[str], None] | None = None,
) -> list[Continuation]:
    """Return the continuation of each prompt, in order, on every rank. Every rank of the world calls this.

    `listener` is told the text that has been added to the first prompt, every few tokens.
    """
    context = make_context(job.config, place, watch=watch)
    try:
        model = job.trained.load(context)
        return job.generator.generate(model, job.tokens, listener)
    except (RuntimeError, MemoryError, OSError) as error:
        if memory_without_room(error) is None:
            raise
        raise RoomError(_shortage(job, context.device)) from error
    finally:
        context.mesh.close()


def continued(request: Request) -> list[Continuation]:
    """Return the continuation of each prompt, in this process alone. Raises as `prepare` and `generate` do."""
    place = Place()
    return generate(prepare(request, place, 1), place)


def _tokens(trained: TrainedModel, prompts: Sequence[str | Record], *, chat: bool) -> list[list[int]]:
    """Return the tokens of each prompt. Raises DataError, with its number, for one that has none."""
    template = None
    if chat or not all(isinstance(prompt, str) for prompt in prompts):
        template = load_chat_template(trained.tokenizer_path)
        if template is None:
            raise DataError(
                f"{trained.tokenizer_path}: its tokenizer has no chat template, which --chat and prompts of messages"
                " need. Give prompts that are text, without --chat."
            )
    found = []
    for number, prompt in enumerate(prompts, 1):
        try:
            found.append(tokens_of(prompt, trained, template if chat or not isinstance(prompt, str) else None))
        except DataError as error:
            raise DataError(f"prompt {number}: {error}") from error
    return found


def _shortage(job: GenerationJob, device: torch.device) -> str:
    """Return the message for a device that has too little memory for the weights, keys and values."""
    shape, size = job.trained.shape, job.generator.options.batch_size
    longest = max(map(len, job.tokens)) + job.generator.options.num_tokens
    token = 2 * shape.num_hidden_layers * shape.num_kv_heads * shape.head_size
    return (
        f"{device} has too little memory. Keys and values are {token} numbers a token of the whole model, for up to"
        f" {min(size, len(job.tokens))} texts of up to {longest} tokens at a time. Try a smaller --batch-size or"
        " --tokens, --dtype bf16, or parallel.tensor, parallel.pipeline or zero.stage=3 on more devices."
    )
