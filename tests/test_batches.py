"""A batch that cannot be used is one clear error on every rank, before anything has changed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.errors import DataError
from tests.harness import run
from tests.parity import Batch, Raw, config_of, engine_of

MODEL = dict(vocab_size=29, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8)
GOOD = dict(input_ids=torch.arange(24).reshape(4, 6))
RAW = config_of({}, model=MODEL | dict(max_position_embeddings=8), train=dict(global_batch_size=8, micro_batch_size=2))


def ids_with(value: int, *, name: str = "input_ids") -> Batch:
    changed = GOOD["input_ids"].clone()
    changed[1, 3] = value
    return GOOD | {name: changed}


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "no tokens": ({}, "input_ids: wanted integers [samples, sequence], got nothing"),
    "one dim": (dict(input_ids=torch.arange(6)), "got torch.int64 [6]"),
    "no samples": (dict(input_ids=torch.empty(0, 6, dtype=torch.int64)), "0 samples are not a multiple"),
    "odd samples": (dict(input_ids=GOOD["input_ids"][:3]), "3 samples are not a multiple of train.micro_batch_size 2"),
    "too long": (dict(input_ids=torch.zeros(4, 9, dtype=torch.int64)), "9 is not in 2 … model.max_position_embeddings"),
    "float mask": (GOOD | dict(attention_mask=torch.ones(4, 6)), "attention_mask: wanted integers [4, 6]"),
    "few labels": (GOOD | dict(labels=GOOD["input_ids"][:2]), "labels: wanted integers [4, 6], got torch.int64 [2, 6]"),
    "few numbers": (GOOD | dict(sample_ids=torch.arange(2)), "sample_ids: wanted integers [4]"),
    "token too large": (ids_with(29), "input_ids: token 29 is outside model.vocab_size 29"),
    "token negative": (ids_with(-1), "input_ids: token -1 is outside"),
    "label too large": (ids_with(30, name="labels"), "labels: token 30 is outside"),
    "no label": (GOOD | dict(labels=torch.full((4, 6), -100)), "no label to learn from"),
}


def message(rank: int, world_size: int, raw: Raw, batches: list[dict[str, Tensor]]) -> str:
    """What training on this rank's batch raises; then a good batch, which must still work."""
    engine = engine_of(rank, world_size, raw)
    with pytest.raises(DataError) as caught:
        engine.train_step(batches[rank])
    assert engine.train_step(GOOD).loss > 0
    return str(caught.value)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_batch_is_refused(case: str) -> None:
    batch, words = BAD[case]
    assert words in run(message, 1, RAW, [batch])[0]


def test_what_one_replica_refuses_all_refuse() -> None:
    first, second = run(message, 2, RAW, [GOOD, ids_with(29)])
    assert first == "batch: that of another replica was refused."
    assert "token 29" in second


def heard(rank: int, world_size: int, batches: list[dict[str, Tensor]]) -> str:
    try:
        engine_of(rank, world_size, RAW).train_step(batches[rank])
    except DataError as error:
        return str(error)
    return "nothing"


def test_replicas_bring_as_many_samples_each() -> None:
    """In ZeRO stages 2 and 3 they would wait for each other, in the others two samples would have one number."""
    fewer = {name: x[:2] for name, x in GOOD.items()}
    for said, own in zip(run(heard, 2, [GOOD, fewer]), (4, 2), strict=True):
        assert said == f"batch: replicas have different numbers of samples, this one {own}. Give each as many."


def test_uneven_tensors_are_not_cut_to_the_shortest() -> None:
    """Half of the labels once trained on half of the batch, without a word."""
    shorter: dict[str, Any] = GOOD | dict(labels=GOOD["input_ids"][:2], sample_ids=torch.arange(4))
    assert "labels" in run(message, 1, RAW, [shorter])[0]


def masks_of(rank: int, world_size: int, masks: list[Tensor]) -> list[bool]:
    engine = engine_of(rank, world_size, RAW)
    found = [engine._microbatches(GOOD | dict(attention_mask=mask))[0] for mask in masks]
    return [any(one.attention_mask is not None for one in microbatches) for microbatches in found]


def test_a_mask_that_hides_nothing_is_left_out() -> None:
    """So that attention takes the kernels that know of none."""
    ones = torch.ones(4, 6, dtype=torch.int64)
    padded = ones.clone()
    padded[1, 4:] = 0
    assert run(masks_of, 1, [ones, padded])[0] == [False, True]
