"""Inputs of recomputed layers on the host change nothing of a training but where they lie."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import parallel
from parallel.activations.offload import HostPool, InputsOnHost, Kept
from parallel.engine.engine import Engine
from parallel.engine.module_engine import ModuleEngine
from parallel.storage.transfer import Copies
from tests.accounts import Held
from tests.harness import run
from tests.parity import SHAPE, Raw, Trace, batches_of, config_of, engine_of, share_of, train
from tests.test_module_engine import Plain, batches, loss_of
from tests.test_module_engine import config_of as module_config
from tests.test_module_engine import engine_of as module_engine
from tests.test_zero import assert_equal

ACTIVATION = 4 * 6 * 24 * 8  # bytes: a microbatch of 4 samples, a sequence of 6, a hidden size of 24, fp64

# -- our models --------------------------------------------------------------------------------------------------------

ONE_D: Raw = dict(tensor=dict(mode="1d", size=2))
GPIPE: Raw = dict(pipeline=dict(size=2, schedule="gpipe"))
RUNS: dict[str, tuple[int, Raw, str, int, Raw]] = {  # ranks, parallel, precision, samples in a microbatch, zero
    "single": (1, {}, "fp32", 4, {}),
    "fp16": (1, {}, "fp16", 4, {}),
    "pp2-1d2": (4, dict(pipeline=2) | ONE_D, "bf16", 3, {}),
    "pp2-gpipe": (2, GPIPE, "fp64", 3, dict(stage=1)),
    "dp2-stage3-cpu": (2, {}, "fp32", 3, dict(stage=3, tensor_placement_policy="cpu")),
    "dp2-stage2-auto": (2, {}, "bf16", 3, dict(stage=2, tensor_placement_policy="auto", device_memory="120KiB")),
    "2d4": (4, dict(tensor=dict(mode="2d", size=4)), "fp64", 4, {}),
}


def raw_of(parallel: Raw, checkpointing: str, **sections: Any) -> Raw:
    train = sections.pop("train", {}) | dict(activation_checkpointing=checkpointing)
    return config_of(parallel, train=train, **dict(model=SHAPE) | sections)


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.gpu) for name in RUNS if name not in ("2d4", "dp2-stage2-auto")),
        *("dp2-stage2-auto", pytest.param("2d4", marks=pytest.mark.slow)),
    ],
)
def test_inputs_on_the_host_with_dropout_equal_no_recompute_bit_for_bit(name: str) -> None:
    ranks, parallel, precision, micro, zero = RUNS[name]

    def trace(checkpointing: str) -> Trace:
        options: Raw = dict(micro_batch_size=micro, precision=precision)
        if "device_memory" in zero:
            options |= dict(device="cpu")  # no GPU can be capped at so little
        model = SHAPE | dict(num_hidden_layers=4, dropout=0.3, attention_dropout=0.3)
        raw = raw_of(parallel, checkpointing, model=model, train=options, zero=zero)
        found = run(train, ranks, raw, batches_of(3))[0]
        assert found is not None
        return found

    assert_equal(trace("offload"), trace("none"))


def held_between(rank: int, world_size: int, raw: Raw) -> int:
    """Bytes that a forward leaves behind for its backward, on the device or wherever they were not before it."""
    engine = engine_of(rank, world_size, raw)
    batch = share_of(batches_of(1)[0], engine)
    engine.train_step(batch)  # from now on buffers on the host are there
    (microbatch, *_), _ = engine._microbatches(batch)
    held = Held()
    with held:
        loss = engine.stage(None, microbatch)
    kept = held.now
    loss.backward()
    return kept


@pytest.mark.gpu
def test_what_waits_on_the_device_for_a_backward_does_not_grow_with_the_number_of_blocks() -> None:
    def kept(checkpointing: str, blocks: int) -> int:
        return run(held_between, 1, raw_of({}, checkpointing, model=SHAPE | dict(num_hidden_layers=blocks)))[0]

    assert kept("offload", 5) == kept("offload", 2)
    assert kept("full", 5) == kept("full", 2) + 3 * ACTIVATION


def traffic(rank: int, world_size: int, raw: Raw) -> list[tuple[int, int, int]]:
    """(inputs that went down so far, bytes of the host's buffers, how many of them are free): after each of three
    steps, and after an evaluation.
    """
    engine = engine_of(rank, world_size, raw)
    inputs = _inputs(engine)
    lent, lend = 0, inputs.pool.lend

    def count(size: int) -> Tensor:
        nonlocal lent
        lent += 1
        return lend(size)

    inputs.pool.lend = count  # type: ignore[method-assign]
    seen = []
    for batch in batches_of(3):
        engine.train_step(share_of(batch, engine))
        seen.append((lent, inputs.pool.nbytes, len(inputs.pool._free)))
    engine.evaluate([share_of(batches_of(1)[0], engine)])
    return [*seen, (lent, inputs.pool.nbytes, len(inputs.pool._free))]


def _inputs(engine: Engine | ModuleEngine) -> InputsOnHost:
    assert engine.inputs is not None
    return engine.inputs


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("parallel", "wanted"),
    [  # of each rank: inputs that go down in a step of three microbatches, and at most at once
        ({}, [(9, 3)]),  # a backward begins with the newest input, which stays
        (dict(pipeline=dict(size=2, layers=[2, 2])), [(5, 3), (3, 1)]),  # on the first stage F0 F1 B0 F2 B1 B2
    ],
)
def test_buffers_are_as_many_as_inputs_wait_at_once_and_an_evaluation_keeps_none(
    parallel: Raw, wanted: list[tuple[int, int]]
) -> None:
    raw = raw_of(parallel, "offload", model=SHAPE | dict(num_hidden_layers=4))
    for found, (a_step, at_once) in zip(run(traffic, len(wanted), raw), wanted, strict=True):
        assert found == [(k * a_step, at_once * ACTIVATION, at_once) for k in (1, 2, 3, 3)]


def order(rank: int, world_size: int, raw: Raw) -> list[str]:
    """What a step's backward asks for and computes."""
    engine, events = engine_of(rank, world_size, raw), list[str]()
    up, down = Copies.upload, Copies.download

    def note_up(*args: Any, **kwargs: Any) -> Any:
        events.append("up")
        return up(*args, **kwargs)

    def note_down(*args: Any, **kwargs: Any) -> Any:
        events.append("down")
        return down(*args, **kwargs)

    Copies.upload, Copies.download = note_up, note_down  # type: ignore[method-assign]
    for i, recomputed in enumerate(engine.stage.units.values()):
        layer = recomputed.get_submodule("layer")
        layer.register_forward_pre_hook(lambda module, inputs, i=i: events.append(f"block {i}"))
    engine.train_step(batches_of(1)[0])
    return events


@pytest.mark.gpu
def test_an_input_goes_down_and_comes_up_while_a_layer_computes() -> None:
    raw = raw_of({}, "offload", model=SHAPE | dict(num_hidden_layers=4), train=dict(micro_batch_size=12))
    forward = ["block 0", "down", "block 1", "down", "block 2", "down", "block 3"]
    backward = ["up", "block 3", "up", "block 2", "up", "block 1", "block 0"]
    assert run(order, 1, raw)[0] == forward + backward


# -- any module --------------------------------------------------------------------------------------------------------

SMALL: Any = dict(vocab_size=31)


def opt(blocks: int) -> nn.Module:
    shape = SMALL | dict(hidden_size=12, num_hidden_layers=blocks, num_attention_heads=3, ffn_dim=20)
    return OPTForCausalLM(OPTConfig(**shape, max_position_embeddings=16, dropout=0.2, word_embed_proj_dim=12))


def gpt2(blocks: int) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=12, n_layer=blocks, n_head=3, n_positions=16))


def llama(blocks: int) -> nn.Module:
    shape = SMALL | dict(hidden_size=12, num_hidden_layers=blocks, num_attention_heads=3, intermediate_size=20)
    return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=16, num_key_value_heads=1))


def plain(blocks: int) -> nn.Module:
    return Plain()


class Twice(nn.Module):
    """One tensor is what two layers are given, one of them for both of its arguments; layers are no one's list's."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 12), nn.Linear(12, 31)
        self.blocks = nn.ModuleList(Pair() for _ in range(blocks))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = first = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x, dict(other=x.transpose(0, 1))) + block(first, dict(other=first))
        y: Tensor = self.head(x)
        return y


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.dropout = nn.Linear(12, 12), nn.Linear(12, 12), nn.Dropout(0.2)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.dropout(self.one(x).tanh() * self.two(more["other"]).tanh().mean())
        return found


MODELS = {"opt": opt, "gpt2": gpt2, "llama": llama, "plain": plain, "twice": Twice}


def trained(rank: int, world_size: int, raw: Raw, model: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    engine, _ = module_engine(rank, world_size, raw, MODELS[model](4))
    engine.train()
    torch.manual_seed(rank)  # of dropout
    for step, parts in enumerate(batches()):
        shares = [ids.tensor_split(world_size)[rank] for ids in parts]
        first, second = (loss_of(engine, ids, step=step) for ids in shares[:2])
        engine.backward(first, retain_graph=True)
        third = loss_of(engine, shares[2], step=step)
        for loss in (first, second, third):
            engine.backward(loss)
        engine.step()
    if engine.inputs is not None:
        assert sum(map(len, engine.inputs.pool._free.values())) == engine.inputs.pool.nbytes > 0  # all came back
    return {piece.name + str(piece.box): piece.data.clone() for piece in engine.weights()}


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["cuda", "cpu"])
@pytest.mark.parametrize(("model", "stage"), [("opt", 3), ("gpt2", 0), ("llama", 2), ("plain", 3), ("twice", 1)])
def test_a_module_of_ones_own_trains_bit_for_bit_too(model: str, stage: int, policy: str) -> None:
    def weights(checkpointing: str) -> list[dict[str, Tensor]]:
        zero = dict(stage=stage, tensor_placement_policy=policy)
        return run(trained, 2, module_config(stage, activation_checkpointing=checkpointing) | dict(zero=zero), model)

    for got, want in zip(weights("offload"), weights("none"), strict=True):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def held_by_a_module(rank: int, world_size: int, raw: Raw, model: str, blocks: int) -> int:
    """As `held_between`. A forward that no backward follows gives its buffers back."""
    engine, _ = module_engine(rank, world_size, raw, MODELS[model](blocks))
    engine.train()
    ids = batches()[0][0]
    del_me = loss_of(engine, ids, step=0)
    del del_me
    held = Held()
    with held:
        loss = loss_of(engine, ids, step=0)
    kept = held.now
    engine.backward(loss)
    return kept


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["opt", "gpt2", "llama", "twice"])
def test_what_waits_on_the_device_does_not_grow_with_a_modules_layers(model: str) -> None:
    def kept(checkpointing: str, blocks: int) -> int:
        raw = module_config(0, activation_checkpointing=checkpointing)
        return run(held_by_a_module, 1, raw, model, blocks)[0]

    assert kept("offload", 5) == kept("offload", 3)
    assert kept("full", 5) >= kept("full", 3) + 2 * 12 * 6 * 12 * 8


class Hasty(Twice):
    """Goes on in a layer's input."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            y = block(x, dict(other=x))
            x.add_(1)
            x = y
        found: Tensor = self.head(x)
        return found


def refused(rank: int, world_size: int, raw: Raw) -> str:
    engine, _ = module_engine(rank, world_size, raw, Hasty(2))
    try:
        engine.backward(loss_of(engine, batches()[0][0], step=0))
    except parallel.ModelError as error:
        return str(error)
    return ""


def test_an_input_changed_in_place_is_refused_not_computed_with() -> None:
    (said,) = run(refused, 1, module_config(0, activation_checkpointing="offload"))
    assert "changed in place" in said


def compiled(rank: int, world_size: int, raw: Raw) -> str:
    module_engine(rank, world_size, raw, plain(4))  # a checkpoint of ours is around what is compiled
    with pytest.raises(parallel.ConfigError) as caught:
        module_engine(rank, world_size, raw, opt(2))
    return str(caught.value)


def test_layers_that_are_compiled_with_their_own_recomputation_are_refused() -> None:
    (said,) = run(compiled, 1, module_config(0, activation_checkpointing="offload", compile=True))
    assert said.startswith("train.compile: ")


# -- what is kept, and where -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [torch.rand(3, 4, 5).transpose(0, 2), torch.rand(4, 1).expand(4, 6), torch.rand(8, 6)[::2, 1:], torch.rand(0, 3)],
    ids=["transposed", "expanded", "sparse", "empty"],
)
def test_an_input_comes_back_as_it_was_as_often_as_it_is_wanted(x: Tensor) -> None:
    pool, want = HostPool(torch.device("cpu")), x.clone()
    kept = Kept(x, pool, lambda: None)
    kept.leave()
    x.fill_(torch.nan)
    for _ in range(2):
        found = kept.take()
        assert torch.equal(found, want)
        assert found.stride() == want.stride()


def test_sequences_of_many_lengths_share_the_buffers_of_the_longest() -> None:
    pool = HostPool(torch.device("cpu"))
    for size in (30, 10, 50, 20, 40, 50):
        buffers = [pool.lend(size) for _ in range(3)]
        assert len({id(buffer) for buffer in buffers}) == 3
        assert min(map(len, buffers)) >= size
        for buffer in buffers:
            pool.take_back(buffer)
    assert pool.nbytes == 3 * 50
