"""A batch that cannot be used is one clear error on every rank, before anything has changed."""

import weakref
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from parallel.engine import replica_batches
from parallel.errors import DataError
from parallel.pipeline.microbatch import Microbatch, batch_problem
from parallel.pipeline.staged import StagedBatch
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
    "token too large": (ids_with(29), "input_ids: token 29 is outside 0 … 28 (model.vocab_size 29)"),
    "token negative": (ids_with(-1), "input_ids: token -1 is outside 0 … 28"),
    "label too large": (ids_with(30, name="labels"), "labels: token 30 is outside 0 … 28"),
    "no values": ({"input_ids": GOOD["input_ids"].to("meta")}, "got torch.int64 [4, 6] without values"),
    "sparse mask": (
        GOOD | dict(attention_mask=torch.ones(4, 6, dtype=torch.int64).to_sparse()),
        "attention_mask: wanted integers [4, 6], got torch.int64 [4, 6] in torch.sparse_coo",
    ),
    "no label": (GOOD | dict(labels=torch.full((4, 6), -100)), "no label to learn from"),
}


def message(rank: int, world_size: int, raw: Raw, batches: list[dict[str, Tensor]]) -> str:
    """Return what training on this rank's batch raises; after it a good batch must still work."""
    engine = engine_of(rank, world_size, raw)
    with pytest.raises(DataError) as caught:
        engine.train_step(batches[rank])
    assert engine.train_step(GOOD).loss > 0
    return str(caught.value)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_batch_is_refused(case: str) -> None:
    batch, words = BAD[case]
    assert words in run(message, 1, RAW, [batch])[0]


def test_a_batch_that_one_replica_refuses_is_refused_by_all() -> None:
    first, second = run(message, 2, RAW, [GOOD, ids_with(29)])
    assert first == "batch: that of another replica was refused."
    assert "token 29" in second


def refusal(rank: int, world_size: int, batches: list[dict[str, Tensor]]) -> str:
    """Return what training on this rank's batch raises."""
    try:
        engine_of(rank, world_size, RAW).train_step(batches[rank])
    except DataError as error:
        return str(error)
    return "nothing"


def test_replicas_with_different_numbers_of_samples_are_refused() -> None:
    """They would wait for each other in ZeRO stages 2 and 3; in the others two samples would have the same number."""
    fewer = {name: x[:2] for name, x in GOOD.items()}
    for message, own in zip(run(refusal, 2, [GOOD, fewer]), (4, 2), strict=True):
        assert (
            message == f"batch: replicas have different numbers of samples, this one {own}. Give each the same number."
        )


def test_uneven_tensors_are_not_cut_to_the_shortest() -> None:
    """An engine that was given half of the labels once trained on half of the batch, and raised nothing."""
    shorter: dict[str, Any] = GOOD | dict(labels=GOOD["input_ids"][:2], sample_ids=torch.arange(4))
    assert "labels" in run(message, 1, RAW, [shorter])[0]


def masks_of(rank: int, world_size: int, masks: list[Tensor]) -> list[bool]:
    engine = engine_of(rank, world_size, RAW)
    found = [engine.batches.staged(GOOD | dict(attention_mask=mask), engine.num_samples)[0] for mask in masks]
    return [any(one.attention_mask is not None for one in staged.microbatches) for staged in found]


def test_a_mask_without_padding_is_left_out() -> None:
    """Attention can then use the kernels that take no mask."""
    ones = torch.ones(4, 6, dtype=torch.int64)
    padded = ones.clone()
    padded[1, 4:] = 0
    assert run(masks_of, 1, [ones, padded])[0] == [False, True]


# -- a batch that is read before its step ------------------------------------------------------------------------------


def _itself(batch: Batch | None) -> Batch | None:
    return batch


def test_a_batch_that_is_read_ahead_is_checked_and_staged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = engine_of(0, 1, RAW), list[int]()
    of = StagedBatch.of

    def noted(whole: Microbatch, size: int, device: torch.device) -> StagedBatch:
        seen.append(int(whole.samples[0]))
        return of(whole, size, device)

    monkeypatch.setattr(StagedBatch, "of", noted)
    monkeypatch.setattr(replica_batches, "batch_problem", Mock(side_effect=batch_problem))
    following = ids_with(7)
    engine.train_step(GOOD, next_batch=lambda: following)
    assert seen == [0, 4]
    engine.train_step(following)
    assert seen == [0, 4]
    assert replica_batches.batch_problem.call_count == 2  # type: ignore[attr-defined]
    engine.train_step(following, next_batch=lambda: following)  # those samples have other numbers
    assert seen == [0, 4, 8, 12]
    engine.num_samples = 4  # as where an older state is loaded
    engine.train_step(following)
    assert seen == [0, 4, 8, 12, 4]


def test_a_tensor_that_takes_the_place_of_a_freed_one_is_another_one() -> None:
    """It often has the id of the tensor that was freed, and neither has been written into."""
    losses = []
    for is_ahead in (False, True):
        engine, following = engine_of(0, 1, RAW), ids_with(7)
        engine.train_step(GOOD, next_batch=partial(_itself, following) if is_ahead else None)
        before = id(following.pop("input_ids"))
        others = [ids_with(9)["input_ids"] for _ in range(20)]
        following["input_ids"] = next((x for x in others if id(x) == before), others[0])
        losses.append(engine.train_step(following).loss)
    assert losses[0] == losses[1]


def test_a_batch_that_was_read_ahead_is_freed_after_its_step() -> None:
    engine, following = engine_of(0, 1, RAW), ids_with(7)
    tokens = weakref.ref(following["input_ids"])
    engine.train_step(GOOD, next_batch=partial(_itself, following))
    engine.train_step(following)
    del following
    assert tokens() is None


AHEAD: dict[str, Any] = {
    "no batch": [1, 2],
    "no tensors": dict(input_ids=[[1, 2]]),
    "an unknown key": GOOD | dict(inputs=GOOD["input_ids"]),
    "a token that is too large": ids_with(29),
    "no label": BAD["no label"][0],
}


@pytest.mark.parametrize("case", AHEAD)
def test_what_is_wrong_with_a_batch_that_is_read_ahead_is_said_by_its_own_step(case: str) -> None:
    engine = engine_of(0, 1, RAW)
    assert engine.train_step(GOOD, next_batch=lambda: AHEAD[case]).loss > 0
    with pytest.raises(DataError):
        engine.train_step(AHEAD[case])
    assert engine.train_step(GOOD).loss > 0


class _Unreadable(dict[str, Tensor]):
    def items(self) -> Any:
        raise OSError("cannot be read")


def test_a_batch_that_cannot_be_looked_at_raises_its_error_in_its_own_step() -> None:
    engine, following = engine_of(0, 1, RAW), _Unreadable(GOOD)
    assert engine.train_step(GOOD, next_batch=lambda: following).loss > 0
    with pytest.raises(OSError, match="cannot be read"):
        engine.train_step(following)


def test_tensors_whose_writes_are_not_counted_are_read_by_their_step() -> None:
    engine = engine_of(0, 1, RAW)
    with torch.inference_mode():
        following = {"input_ids": GOOD["input_ids"].clone()}
    engine.train_step(GOOD, next_batch=lambda: following)
    assert engine.batches.ahead is None
    engine.train_step(following)


def losses_of(rank: int, world_size: int, who: tuple[int, ...]) -> list[float]:
    """Return the losses of three steps; the ranks `who` read the batch of the next step ahead."""
    engine, batches = engine_of(rank, world_size, RAW), [ids_with(3 + rank), ids_with(5 + rank), ids_with(7 + rank)]
    rest = iter(batches[1:])
    next_batch = partial(next, rest, None) if rank in who else None
    return [engine.train_step(batch, next_batch=next_batch).loss for batch in batches]


def test_replicas_need_not_read_ahead_together() -> None:
    """A replica tells the others of its batch within the step of that batch."""
    assert run(losses_of, 2, (1,)) == run(losses_of, 2, ())


def results_of(rank: int, world_size: int, is_ahead: bool) -> list[object]:
    """Return what steps come to of which this rank, or the other one, has a batch that cannot be used."""
    engine, found = engine_of(rank, world_size, RAW), list[object]()
    batches = [GOOD, ids_with(29) if rank else ids_with(5), ids_with(6 + rank), ids_with(8) if rank else {}, GOOD]
    for number, batch in enumerate(batches):
        following = batches[number + 1] if number + 1 < len(batches) and (rank or number % 2) else None
        try:
            found.append(engine.train_step(batch, next_batch=partial(_itself, following) if is_ahead else None).loss)
        except DataError as error:
            found.append(str(error))
    return found


@pytest.mark.slow
def test_a_replica_that_has_read_a_bad_batch_ahead_refuses_it_together_with_the_others() -> None:
    usual = run(results_of, 2, False)
    assert run(results_of, 2, True) == usual
    assert [isinstance(x, str) for x in usual[0]] == [False, True, False, True, False]
