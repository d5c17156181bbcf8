"""1d with sequence parallelism equals a single process: between blocks each rank has a part of every sequence.

tests/test_parity.py compares it with Hugging Face's models; tests/test_memory.py and tests/test_traffic.py count what a
rank keeps and sends.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.config import ContextConfig, ParallelConfig, TensorConfig, parse
from parallel.engine.inference import refuse
from parallel.errors import ConfigError, DataError
from parallel.layout.labels import IGNORED
from parallel.tensor import loss
from tests.accounts import mode_of, part
from tests.harness import run
from tests.parity import Batch, Raw, batches_of, config_of, engine_of, share_of
from tests.test_property import DROPPED, MODEL, PROJECTED, Case, check

T2: Raw = dict(mode="1d", size=2, sequence_parallel=True)
RING, EXCHANGE = dict(size=2, kind="ring"), dict(size=2, kind="all_to_all")
INTERLEAVED, ZERO_BUBBLE = dict(size=2, schedule="interleaved", chunks=2), dict(size=2, schedule="zero_bubble")
PACKED, PADDED = dict(masked=True, packed=True), dict(masked=True)
OPT = MODEL | DROPPED["opt"]

CASES: dict[str, tuple[int, Raw, Raw, int, dict[str, Any]]] = {  # world size, parallel, model, sequence, more of a Case
    "1d2-qwen3": (2, dict(tensor=T2), DROPPED["qwen3"], 6, dict(masked=True, packed=True)),
    "dp2-1d2-zero3-gpt2": (4, dict(tensor=T2), DROPPED["gpt2"], 4, dict(masked=True, zero=3)),
    "1d1-opt": (1, dict(tensor=T2 | dict(size=1)), OPT, 5, dict(masked=True)),
    "1d4-opt": (4, dict(tensor=T2 | dict(size=4)), OPT, 8, dict(masked=True, zero=2)),
    "1d4-projected": (4, dict(tensor=T2 | dict(size=4)), PROJECTED | DROPPED["opt"], 4, dict(masked=True)),
    "dp2-1d2-zero1-qwen3": (4, dict(tensor=T2), DROPPED["qwen3"], 4, dict(masked=False, zero=1, placement="cpu")),
    "dp2-1d2-zero2-projected": (4, dict(tensor=T2), PROJECTED | DROPPED["opt"], 4, dict(masked=True, zero=2)),
    "pp2-1d2-llama": (4, dict(pipeline=2, tensor=T2), DROPPED["llama"], 6, dict(masked=True, packed=True)),
    "pp2-dp2-1d2-projected": (8, dict(pipeline=2, tensor=T2), PROJECTED | DROPPED["opt"], 4, dict(masked=True, zero=3)),
    "interleaved-1d2-gpt2": (4, dict(pipeline=INTERLEAVED, tensor=T2), DROPPED["gpt2"], 4, dict(masked=True, zero=1)),
    "zb-1d2-qwen3": (4, dict(pipeline=ZERO_BUBBLE, tensor=T2), DROPPED["qwen3"], 4, PACKED),
    "zbv-1d2-opt": (4, dict(pipeline=dict(size=2, schedule="zero_bubble_v"), tensor=T2), OPT, 6, dict(masked=True)),
    "zb-ring2-1d2-opt": (
        8,
        dict(pipeline=dict(size=2, schedule="zero_bubble"), context=RING, tensor=T2),
        OPT,
        8,
        PADDED,
    ),
    # Of stage 0, which has no norm, nothing is gathered on demand.
    "pp2-1d2-zero3-opt": (4, dict(pipeline=dict(size=2, layers=[0, 2]), tensor=T2), OPT, 4, dict(masked=True, zero=3)),
    "ring2-1d2-opt": (4, dict(context=RING, tensor=T2), OPT, 8, dict(masked=True)),
    "ring2-1d2-mistral": (4, dict(context=RING, tensor=T2), DROPPED["mistral"], 12, dict(masked=True)),
    "ring2-1d4-qwen3": (8, dict(context=RING, tensor=T2 | dict(size=4)), DROPPED["qwen3"], 8, dict(masked=False)),
    "a2a2-1d2-gpt2": (4, dict(context=EXCHANGE, tensor=T2), DROPPED["gpt2"], 8, dict(masked=True, packed=True)),
}
QUICK = ("1d2-qwen3", "dp2-1d2-zero3-gpt2", "pp2-1d2-zero3-opt")


def case_of(name: str, precision: str = "fp64", **options: Any) -> Case:
    world_size, parallel, model, sequence, more = CASES[name]
    train = dict(global_batch_size=8, micro_batch_size=2) | options
    return Case(world_size, parallel, model, train, sequence, precision, **more)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_it_trains_as_a_single_process_with_dropout(name: str) -> None:
    check(case_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["full", "offload"])
@pytest.mark.parametrize("name", ["1d2-qwen3", "1d4-projected", "pp2-1d2-llama", "ring2-1d2-opt"])
def test_it_trains_as_a_single_process_with_recomputation(name: str, checkpointing: str) -> None:
    check(case_of(name, activation_checkpointing=checkpointing))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1d2-qwen3", "dp2-1d2-zero3-gpt2", "ring2-1d2-opt"])
def test_it_trains_as_a_single_process_in_fp32(name: str) -> None:
    check(case_of(name, "fp32"))


# -- the loss ----------------------------------------------------------------------------------------------------------

B, S, H, V = 2, 10, 8, 7
POSITIONS = 2  # of each rank's part, in a token slice: the last slice of five positions is shorter


@dataclass(frozen=True)
class FoundLoss:
    """The loss of one rank, its gradients of its parts of x and the table, and the collectives that it called."""

    total: Tensor
    dx: Tensor
    dtable: Tensor
    calls: int


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """Return x[B, S, H], a table [V, H] and labels [B, S], of which some are not counted."""
    generator = torch.Generator().manual_seed(0)
    x, table = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((B, S, H), (V, H)))
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[0, 3] = labels[1, 7:] = IGNORED
    return x, table, labels


def loss_in_slices(rank: int, world_size: int) -> FoundLoss:
    mode = mode_of(rank, TensorConfig("1d", world_size, sequence_parallel=True), torch.float64)
    loss.TOKENS_PER_SLICE = B * POSITIONS * world_size
    x, table, labels = drawn()
    vocabulary = mode.vocabulary(V, H, padding_idx=None)
    (first, last), _ = vocabulary.layout.box
    vocabulary.weight.data[: last - first] = table[first:last]
    own = part(x, (), mode.length).requires_grad_()
    total = mode.lm_loss(own, vocabulary, labels)
    total.backward()
    assert own.grad is not None
    assert vocabulary.weight.grad is not None
    return FoundLoss(total.detach(), own.grad, vocabulary.weight.grad[: last - first], mode.mesh.traffic.calls.total())


def test_labels_of_a_token_slice_are_those_of_each_ranks_positions() -> None:
    """A slice of the positions of each rank is gathered at a time: they do not follow one another in the sequence.

    fp64: the sums of products of eight numbers differ in their last places alone.
    """
    x, table, labels = drawn()
    x.requires_grad_()
    table.requires_grad_()
    want = F.cross_entropy((x @ table.T).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    want.backward()
    found = run(loss_in_slices, 2)
    for one in found:
        torch.testing.assert_close(one.total, want.detach(), rtol=1e-13, atol=0)
        # A slice gathers x, takes the largest logit and two sums, and scatters dx: as many as in plain 1d, and one.
        assert one.calls == 4 * ceil(S // 2 / POSITIONS)
    torch.testing.assert_close(torch.cat([one.dx for one in found], 1), x.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.cat([one.dtable for one in found]), table.grad, rtol=1e-12, atol=1e-14)


# -- other batches than those of the config ----------------------------------------------------------------------------


def evaluate(rank: int, world_size: int, raw: Raw, batches: list[Batch]) -> list[float | str]:
    """Return the loss of each batch, or the message of the error with which it was refused."""
    engine = engine_of(rank, world_size, raw)
    found: list[float | str] = []
    for batch in batches:
        try:
            found.append(engine.evaluate([share_of(batch, engine)]))
        except DataError as error:
            found.append(str(error))
    return found


def test_a_sequence_of_another_length_is_evaluated_or_refused_with_lengths_that_work() -> None:
    model = MODEL | DROPPED["opt"]
    batches = [batches_of(1, batch=4, sequence=length, vocabulary=29)[0] for length in (6, 4, 5)]
    train = dict(global_batch_size=4, micro_batch_size=2)
    (alone,) = run(evaluate, 1, config_of({}, model=model, train=train), batches[:2])
    for found in run(evaluate, 2, config_of(dict(tensor=T2), model=model, train=train), batches):
        assert found[:2] == pytest.approx(alone, rel=1e-12)
        assert isinstance(found[2], str)
        assert (
            "a sequence of 5 is not a multiple of 2, the parts that the layout splits it into: try 4 or 6" in found[2]
        )


def test_texts_are_not_continued_where_sequences_are_split() -> None:
    """`colonnade generate` runs such a layout in plain 1d (tests/test_generate.py); the engine itself refuses it."""
    config = parse(dict(parallel=dict(tensor=T2), data=dict(sequence_length=6)))
    with pytest.raises(ConfigError, match=r"sequence_parallel: True splits a sequence.*Try False\."):
        refuse(config)


# -- which positions a rank has ----------------------------------------------------------------------------------------

SPLITS = [ContextConfig(), *(ContextConfig(n, kind) for n in (2, 3) for kind in ("ring", "all_to_all"))]


@pytest.mark.parametrize("t", [1, 2, 3, 4])
@pytest.mark.parametrize("context", SPLITS, ids=lambda context: f"{context.kind}{context.size}")
def test_each_position_is_on_one_rank_between_blocks(context: ContextConfig, t: int) -> None:
    """A rank's tokens, its positions and the shape of its activations agree, in the order of ranks of t."""
    tensor = TensorConfig("1d", t, sequence_parallel=True)
    length = 2 * ParallelConfig(tensor=tensor, context=context).sequence_parts
    device, columns = torch.device("cpu"), torch.arange(length).expand(B, -1)
    found = []
    for rank in range(context.size * t):
        mode = mode_of(rank, tensor, torch.float64, context)
        samples, local, hidden = mode.activation_shape(B, length, H)
        positions = mode.positions_between(local, device)
        assert (samples, len(positions), hidden) == (B, length // (context.size * t), H)
        assert torch.equal(mode.tokens_between(columns), positions.expand(B, -1))
        inside = mode.sequence.positions(length // context.size, device)
        assert torch.equal(positions, inside.chunk(t)[mode.mesh.axis("t").rank])
        found.append(positions)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(length))
