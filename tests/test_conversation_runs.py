"""Training on conversations equals a plain torch loop over Hugging Face's model with transformers' tokens and masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.chat import load_chat_template
from models.data import Loader, SampleOrder
from models.shapes import resolve
from parallel.config import parse
from tests.chat_templates import CHATML, CHATML_MARKED, PAD, VOCABULARY, save_tokenizer, theirs
from tests.families import SHAPES, family_of
from tests.harness import run
from tests.parity import BOUND, Batch, Raw, compare, config_of, reference, save_model, train
from tests.test_loop import lines_of, prepared
from tests.test_parity import LAYOUTS
from training.inputs import read_corpus
from training.run import run_job

LENGTH, BATCH, STEPS = 48, 12, 3
WORDS = ("he", " the", "\n", "é", "😀", "x", " is", "?")


def conversations(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Return conversations of one to five messages, some of them longer than a sample."""
    draw = np.random.default_rng(seed)

    def text() -> str:
        return "x" + "".join(draw.choice(WORDS, draw.integers(0, 6)))

    def messages(number: int) -> list[dict[str, str]]:
        return [dict(role=("user", "assistant")[i % 2], content=text()) for i in range(2 + number % 4)]

    return [messages(number) for number in range(count)]


def jsonl(file: Path, records: list[list[dict[str, str]]]) -> Path:
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in records))
    return file


def expected_batches(folder: Path, records: list[list[dict[str, str]]]) -> list[Batch]:
    """Return the batches that transformers' tokens and masks make, padded on the right, with a mask of the padding."""
    tokenizer, rows = theirs(folder), []
    for messages in records:
        found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, learned = found["input_ids"][:LENGTH], found["assistant_masks"][:LENGTH]
        labels = [id if is_learned else -100 for id, is_learned in zip(ids, learned, strict=True)]
        if any(label != -100 for label in labels):
            rest = LENGTH - len(ids)
            rows.append((ids + [PAD] * rest, [1] * len(ids) + [0] * rest, labels + [-100] * rest))
    keys = ("input_ids", "attention_mask", "labels")
    return [
        {key: torch.tensor([row[i] for row in rows[step : step + BATCH]]) for i, key in enumerate(keys)}
        for step in range(0, STEPS * BATCH, BATCH)
    ]


def our_batches(raw: Raw) -> list[Batch]:
    corpus = read_corpus(parse(raw, resolve=resolve))
    loader = Loader(corpus, SampleOrder(corpus.num_training, shuffle=False, seed=0), global_batch=BATCH)
    return [loader.training(step * BATCH) for step in range(STEPS)]


CASES = [("llama", "1d2")]
MORE_CASES = [("llama", "pp2"), ("llama", "2d4"), ("llama", "ring3"), ("opt", "1d2"), ("gpt2", "pp2"), ("opt", "dp2")]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "layout"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in MORE_CASES)])
def test_conversations_train_as_in_a_loop_over_hugging_faces_model(tmp_path: Path, name: str, layout: str) -> None:
    """Ours have no mask of the padding, which no label sees; theirs have one."""
    tokenizer, records = save_tokenizer(tmp_path / "tokenizer", CHATML_MARKED), conversations(40)
    positions = dict(n_positions=64) if name == "gpt2" else dict(max_position_embeddings=64)
    shape = SHAPES[name] | positions | dict(vocab_size=VOCABULARY)
    path = save_model(tmp_path / "model", family_of(name), **shape)
    world_size, parallel = LAYOUTS[layout]
    file = jsonl(tmp_path / "chat.jsonl", records)
    data = dict(path=str(file), tokenizer=str(tokenizer), sequence_length=LENGTH, validation_fraction=0.0)
    micro = 2 if layout == "dp2" else 4
    raw = config_of(parallel, steps=STEPS, data=data, model=dict(path=str(path)), train=dict(micro_batch_size=micro))
    ours, theirs_ = our_batches(raw), expected_batches(tokenizer, records)
    for batch, expected in zip(ours, theirs_, strict=True):
        assert torch.equal(batch["labels"], expected["labels"])
        assert torch.equal(
            batch["input_ids"] * expected["attention_mask"], expected["input_ids"] * expected["attention_mask"]
        )
    got = run(train, world_size, raw, ours)[0]
    assert got is not None
    compare(got, reference(path, raw, theirs_), BOUND["fp64"], is_fp64=True)


def test_a_run_on_conversations_exports_the_template_and_says_what_is_learned(tmp_path: Path) -> None:
    """The export has the chat template, so that its users write prompts as the training did."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer", CHATML)
    file, other = jsonl(tmp_path / "a.jsonl", conversations(30)), jsonl(tmp_path / "b.jsonl", conversations(9, seed=1))
    settings = (
        *(f"data.path={file}", f"data.tokenizer={tokenizer}", f"data.sequence_length={LENGTH}"),
        *(f"model.vocab_size={VOCABULARY}", f"data.validation_path={other}", "train.steps=2"),
    )
    job = prepared(tmp_path / "run", *settings)
    assert any("tokens are learned, those of the answers" in message for message in job.messages)
    assert job.corpus.num_validation == 9
    run_job(job)
    lines = lines_of(tmp_path / "run")
    assert [line["tokens"] for line in lines] == [8 * LENGTH, 16 * LENGTH]  # with the padding
    assert 0 < lines[-1]["validation_loss"] < 10
    exported, ours = (load_chat_template(str(folder)) for folder in (tmp_path / "run" / "export", tokenizer))
    assert exported is not None
    assert ours is not None
    assert exported.content == ours.content
    messages: list[dict[str, Any]] = [dict(role="user", content="he?")]
    prompt = theirs(tmp_path / "run" / "export").apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert prompt == exported.render(messages, add_generation_prompt=True)
