"""Packed documents: each is trained on as if it were alone, in every layout, and its labels are its own tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.config import parse
from parallel.errors import ConfigError
from parallel.sequence import Documents
from tests.families import GPT2, LLAMA, MISTRAL, QWEN3, SHAPES, saved
from tests.harness import run
from tests.parity import SHAPE, Batch, Raw, Trace, batches_of, compare, config_of, reference, train
from tests.test_compile import check as check_compiled  # noqa: F401

S = 10
BOUND = 1e-9  # in fp64, that of the parity tests


def ends_of(sample: int) -> list[int]:
    """Return where the documents of a sample end: some samples have one, some a document of a single token."""
    return [[S], [4, S], [1, 2, 7, S], [3, 5, 6, S], [9, S]][sample % 5]


def packed(batch: Batch, *, padded: bool = False) -> Batch:
    """Return the batch with documents, and no label for their first tokens: it would be a guess from nothing.

    The numbers of documents need neither begin at 0 nor be consecutive. `padded`: the first document of some samples is
    padded at its beginning, and the last document of others at its end.
    """
    ids, mask = batch["input_ids"].clone(), torch.ones_like(batch["input_ids"])
    numbers, labels = torch.empty_like(ids), ids.clone()
    for sample in range(len(ids)):
        start = 0
        for place, end in enumerate(ends_of(sample)):
            numbers[sample, start:end] = 3 * place + sample - 2
            labels[sample, start] = -100
            if padded and sample % 3 == 0 and start == 0 and end > 3:
                mask[sample, :2] = 0
            if padded and sample % 3 == 1 and end == S and end - start > 2:
                mask[sample, -1] = 0
            start = end
    labels = labels.masked_fill(mask == 0, -100)
    mask_of = dict(attention_mask=mask) if padded else {}
    return dict(input_ids=ids.masked_fill(mask == 0, 1), labels=labels, document_ids=numbers, **mask_of)


def loss_of_documents(model: Any, batch: Batch) -> Tensor:
    """Return the mean loss over all labels, with every document given to Hugging Face's model by itself."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample in range(len(batch["input_ids"])):
        start = 0
        for end in ends_of(sample):
            ids, labels = (batch[key][sample : sample + 1, start:end] for key in ("input_ids", "labels"))
            mask = batch["attention_mask"][sample : sample + 1, start:end] if "attention_mask" in batch else None
            logits = model(ids, attention_mask=mask).logits
            total = total + F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
            count += int((labels[0, 1:] != -100).sum())
            start = end
    return total / count


A2A2 = dict(size=2, kind="all_to_all")
LAYOUTS: dict[str, tuple[int, Raw]] = {
    "single": (1, {}),
    "1d2": (2, dict(tensor=dict(mode="1d", size=2))),
    "2d4": (4, dict(tensor=dict(mode="2d", size=4))),
    "2.5d8": (8, dict(tensor=dict(mode="2.5d", size=8, depth=2))),
    "3d8": (8, dict(tensor=dict(mode="3d", size=8))),
    "pp2": (2, dict(pipeline=2)),
    "dp2": (2, {}),
    "a2a2": (2, dict(context=A2A2)),
    "dp2-pp2-a2a2": (8, dict(pipeline=2, context=A2A2)),
}
USUAL = {("pp2", "opt", True), ("1d2", "mistral", True), ("2d4", "gpt2", False), ("a2a2", "llama", False)}
FAMILIES = ("opt", "llama", "mistral", "qwen3", "gpt2")
EVERY = [(layout, family, padded) for layout in LAYOUTS for family in FAMILIES for padded in (False, True)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


def raw_of(parallel: Raw, model: Raw, **more: Any) -> Raw:
    return config_of(parallel, steps=2, model=model, data=dict(sequence_length=S), **more)


def trained(layout: str, raw: Raw, batches: list[Batch]) -> Trace:
    trace = run(train, LAYOUTS[layout][0], raw, batches)[0]
    assert trace is not None
    return trace


@pytest.mark.parametrize(
    ("layout", "family", "padded"),
    [pytest.param(*case, marks=[] if case in USUAL else pytest.mark.slow) for case in EVERY],
)
def test_packed_documents_are_trained_on_as_each_by_itself(
    layout: str, family: str, padded: bool, folder: Path
) -> None:
    """The reference has no mask of documents and no positions: Hugging Face's model is given one document at a time."""
    path = saved(folder, family)
    raw = raw_of(LAYOUTS[layout][1], dict(path=str(path)), zero=dict(stage=3 * (layout in ("2d4", "dp2"))))
    batches = [packed(batch, padded=padded) for batch in batches_of(2, sequence=S)]
    compare(trained(layout, raw, batches), reference(path, raw, batches, loss_of_documents), BOUND, is_fp64=True)
