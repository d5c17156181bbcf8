"""Training gives the same numbers with the inputs of recomputed layers on the host, and keeps less on the device."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import parallel
from parallel.activations.host_pool import HostPool
from parallel.activations.kept_input import KeptInput
from parallel.activations.offload import InputsOnHost
from parallel.engine.engine import Engine
from parallel.engine.module_engine import ModuleEngine
from parallel.storage.transfer import Copies
from tests.accounts import Allocations
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
            options |= dict(device="cpu")  # a GPU cannot be capped at so little
        model = SHAPE | dict(num_hidden_layers=4, dropout=0.3, attention_dropout=0.3)
        raw = raw_of(parallel, checkpointing, model=model, train=options, zero=zero)
        found = run(train, ranks, raw, batches_of(3))[0]
        assert found is not None
        return found

    assert_equal(trace("offload"), trace("none"))


def held_between(rank: int, world_size: int, raw: Raw) -> int:
    """Return the bytes that a forward keeps for its backward, on the device or in new memory on the host."""
    engine = engine_of(rank, world_size, raw)
    batch = share_of(batches_of(1)[0], engine)
    engine.train_step(batch)  # from now on there are buffers on the host
    staged, _ = engine.batches.staged(batch, engine.num_samples)
    microbatch = staged.on(engine.mesh.device).microbatches[0]
    held = Allocations()
    with held:
        loss = engine.part(None, microbatch, 0)
    kept = held.now
    loss.backward()
    return kept


@pytest.mark.gpu
def test_what_is_kept_on_the_device_does_not_grow_with_the_number_of_blocks() -> None:
    def kept(checkpointing: str, blocks: int) -> int:
        return run(held_between, 1, raw_of({}, checkpointing, model=SHAPE | dict(num_hidden_layers=blocks)))[0]

    assert kept("offload", 5) == kept("offload", 2)
    assert kept("full", 5) == kept("full", 2) + 3 * ACTIVATION


def traffic(rank: int, world_size: int, raw: Raw) -> list[tuple[int, int, int]]:
    """Return, after each of three steps and after an evaluation, how many inputs were offloaded so far, the bytes of
    the host's buffers, and how many of the buffers are free.
    """
    engine = engine_of(rank, world_size, raw)
    inputs = _inputs(engine)
    offloaded, acquire = 0, inputs.pool.acquire

    def count(size: int) -> Tensor:
        nonlocal offloaded
        offloaded += 1
        return acquire(size)

    inputs.pool.acquire = count  # type: ignore[method-assign]
    seen = []
    for batch in batches_of(3):
        engine.train_step(share_of(batch, engine))
        seen.append((offloaded, inputs.pool.nbytes, len(inputs.pool._free)))
    engine.evaluate([share_of(batches_of(1)[0], engine)])
    return [*seen, (offloaded, inputs.pool.nbytes, len(inputs.pool._free))]


def _inputs(engine: Engine | ModuleEngine) -> InputsOnHost:
    assert engine.inputs is not None
    return engine.inputs


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("parallel", "wanted"),
    [  # for each rank: inputs offloaded in a step of three microbatches, and the most that are on the host at once
        ({}, [(9, 3)]),  # a backward begins with the newest input, which stays on the device
        (dict(pipeline=dict(size=2, layers=[2, 2])), [(5, 3), (3, 1)]),  # on the first stage F0 F1 B0 F2 B1 B2
    ],
)
def test_there_are_as_many_buffers_as_inputs_on_the_host_at_once_and_an_evaluation_keeps_none(
    parallel: Raw, wanted: list[tuple[int, int]]
) -> None:
    raw = raw_of(parallel, "offload", model=SHAPE | dict(num_hidden_layers=4))
    for found, (a_step, at_once) in zip(run(traffic, len(wanted), raw), wanted, strict=True):
        assert found == [(k * a_step, at_once * ACTIVATION, at_once) for k in (1, 2, 3, 3)]


def order(rank: int, world_size: int, raw: Raw) -> list[str]:
    """Return the uploads, downloads and blocks of a step, in the order in which they are launched."""
    engine, events = engine_of(rank, world_size, raw), list[str]()
    upload, download = Copies.upload, Copies.download

    def noted_upload(*args: Any, **kwargs: Any) -> Any:
        events.append("upload")
        return upload(*args, **kwargs)

    def noted_download(*args: Any, **kwargs: Any) -> Any:
        events.append("download")
        return download(*args, **kwargs)

    Copies.upload, Copies.download = noted_upload, noted_download  # type: ignore[method-assign]
    for i, recomputed in enumerate(engine.part.units.values()):
        layer = recomputed.get_submodule("layer")
        layer.register_forward_pre_hook(lambda module, inputs, i=i: events.append(f"block {i}"))
    engine.train_step(batches_of(1)[0])
    return events


@pytest.mark.gpu
def test_an_input_is_offloaded_and_copied_back_while_a_layer_computes() -> None:
    raw = raw_of({}, "offload", model=SHAPE | dict(num_hidden_layers=4), train=dict(micro_batch_size=12))
    forward = ["block 0", "download", "block 1", "download", "block 2", "download", "block 3"]
    backward = ["upload", "block 3", "upload", "block 2", "upload", "block 1", "block 0"]
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
    """A model that gives one tensor to two layers, to one of them for both of its arguments."""

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
    torch.manual_seed(rank)  # for dropout
    for step, parts in enumerate(batches()):
        shares = [ids.tensor_split(world_size)[rank] for ids in parts]
        first, second = (loss_of(engine, ids, step=step) for ids in shares[:2])
        engine.backward(first, retain_graph=True)
        third = loss_of(engine, shares[2], step=step)
        for loss in (first, second, third):
            engine.backward(loss)
        engine.step()
    if engine.inputs is not None:
        assert sum(map(len, engine.inputs.pool._free.values())) == engine.inputs.pool.nbytes > 0  # all are free again
    return {piece.name + str(piece.box): piece.data.clone() for piece in engine.weights()}


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["cuda", "cpu"])
@pytest.mark.parametrize(("model", "stage"), [("opt", 3), ("gpt2", 0), ("llama", 2), ("plain", 3), ("twice", 1)])
def test_a_users_own_module_trains_the_same_bit_for_bit(model: str, stage: int, policy: str) -> None:
    def weights(checkpointing: str) -> list[dict[str, Tensor]]:
        zero = dict(stage=stage, tensor_placement_policy=policy)
        return run(trained, 2, module_config(stage, activation_checkpointing=checkpointing) | dict(zero=zero), model)

    for got, want in zip(weights("offload"), weights("none"), strict=True):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def held_by_a_module(rank: int, world_size: int, raw: Raw, model: str, blocks: int) -> int:
    """Return what `held_between` returns, for a module. Its first forward has no backward, and frees its buffers."""
    engine, _ = module_engine(rank, world_size, raw, MODELS[model](blocks))
    engine.train()
    ids = batches()[0][0]
    unused = loss_of(engine, ids, step=0)
    del unused
    held = Allocations()
    with held:
        loss = loss_of(engine, ids, step=0)
    kept = held.now
    engine.backward(loss)
    return kept


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["opt", "gpt2", "llama", "twice"])
def test_what_is_kept_on_the_device_does_not_grow_with_a_modules_layers(model: str) -> None:
    def kept(checkpointing: str, blocks: int) -> int:
        raw = module_config(0, activation_checkpointing=checkpointing)
        return run(held_by_a_module, 1, raw, model, blocks)[0]

    assert kept("offload", 5) == kept("offload", 3)
    assert kept("full", 5) >= kept("full", 3) + 2 * 12 * 6 * 12 * 8


class ChangesItsInput(Twice):
    """A model that changes a layer's input in place after the layer has run."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            y = block(x, dict(other=x))
            x.add_(1)
            x = y
        found: Tensor = self.head(x)
        return found


def refused(rank: int, world_size: int, raw: Raw) -> str:
    engine, _ = module_engine(rank, world_size, raw, ChangesItsInput(2))
    try:
        engine.backward(loss_of(engine, batches()[0][0], step=0))
    except parallel.ModelError as error:
        return str(error)
    return ""


def test_an_input_changed_in_place_is_refused_instead_of_used() -> None:
    (message,) = run(refused, 1, module_config(0, activation_checkpointing="offload"))
    assert "changed in place" in message


def compiled(rank: int, world_size: int, raw: Raw) -> str:
    module_engine(rank, world_size, raw, plain(4))  # here our checkpoint calls what is compiled
    with pytest.raises(parallel.ConfigError) as caught:
        module_engine(rank, world_size, raw, opt(2))
    return str(caught.value)


def test_layers_that_are_compiled_with_their_own_recomputation_are_refused() -> None:
    (message,) = run(compiled, 1, module_config(0, activation_checkpointing="offload", compile=True))
    assert message.startswith("train.compile: ")


# -- an input and its buffer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [torch.rand(3, 4, 5).transpose(0, 2), torch.rand(4, 1).expand(4, 6), torch.rand(8, 6)[::2, 1:], torch.rand(0, 3)],
    ids=["transposed", "expanded", "sparse", "empty"],
)
def test_an_input_can_be_taken_from_the_host_repeatedly(x: Tensor) -> None:
    pool, want = HostPool(torch.device("cpu")), x.clone()
    kept = KeptInput(x, pool, lambda: None)
    kept.offload()
    x.fill_(torch.nan)
    for _ in range(2):
        found = kept.take()
        assert torch.equal(found, want)
        assert found.stride() == want.stride()


def test_sequences_of_many_lengths_share_the_buffers_of_the_longest() -> None:
    pool = HostPool(torch.device("cpu"))
    for size in (30, 10, 50, 20, 40, 50):
        buffers = [pool.acquire(size) for _ in range(3)]
        assert len({id(buffer) for buffer in buffers}) == 3
        assert min(map(len, buffers)) >= size
        for buffer in buffers:
            pool.release(buffer)
    assert pool.nbytes == 3 * 50
