"""Access to parameters by hand meets what an engine saves and loads, and a parameter has one engine."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import seal
from tests.harness import run
from tests.test_damage import STRANGE, leaves
from tests.test_module_engine import config_of, engine_of
from tests.test_parameter_access import engine_with, message_of
from tests.test_user_writes import linears, step_of, weights_of


def saving_in_full_parameters(rank: int, world_size: int, stage: int, folder: Path) -> list[str]:
    """Return what is said to each method that saves or loads in `full_parameters`, which changes nothing."""
    engine, _, _ = engine_with(rank, world_size, stage)
    step_of(engine, 0, rank, world_size)
    engine.save_checkpoint(folder)
    state = engine.state_dict()
    methods: list[Callable[[], Any]] = [
        lambda: engine.save_checkpoint(folder / "within"),
        lambda: engine.load_checkpoint(folder),
        lambda: engine.load_weights(folder),
        lambda: engine.save_pretrained(folder / "within"),
        engine.state_dict,
        lambda: engine.load_state_dict(state),
        lambda: engine.clip_grad_norm_(1.0),
        lambda: engine.full_gradients().__enter__(),
    ]
    with engine.full_parameters(writable=True) as weights:
        weights["first.weight"].fill_(7.0)
        found = [message_of(method) for method in methods]
    with engine.full_parameters() as weights:
        assert bool((weights["first.weight"] == 7).all())
    assert not (folder / "within").exists()
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_nothing_is_saved_or_loaded_within_full_parameters(stage: int, tmp_path: Path) -> None:
    """A checkpoint in it would have had the values before it; one that was loaded in it would have been overwritten."""
    for found in run(saving_in_full_parameters, 2, stage, tmp_path):
        assert all("nothing is computed or saved in this context. Leave it first" in message for message in found)


def state_after_a_write(rank: int, world_size: int, precision: str) -> list[float]:
    """Return the values of a parameter that was written into, in the state_dict and in an engine that has loaded it."""
    engine, module, _ = engine_with(rank, world_size, 1, precision=precision)
    step_of(engine, 0, rank, world_size)
    with torch.no_grad():
        module.first.weight.fill_(0.5)
    state = engine.state_dict()
    saved = [x for name, x in state["tensors"].items() if name.startswith("master/first.weight")]
    other, loaded, _ = engine_with(rank, world_size, 1, precision=precision)
    other.load_state_dict(state)
    return [float(x) for x in torch.cat([x.flatten() for x in (*saved, loaded.first.weight.detach().float())]).unique()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_state_dict_has_what_was_written_into_parameters(precision: str) -> None:
    assert run(state_after_a_write, 2, precision) == [[0.5], [0.5]]


def steps_that_differ(rank: int, world_size: int, stage: int) -> list[str]:
    """Return what is said to a step for which ranks have other hyperparameters, which then changes nothing."""
    found = []
    for change in CHANGES:
        module = linears()
        groups: list[dict[str, Any]] = [dict(params=[module.first.weight])]
        groups.append(dict(params=list(module.layers[0].parameters()), lr=torch.tensor(0.5)))
        update = torch.optim.AdamW(groups, lr=0.25)
        engine, _ = engine_of(rank, world_size, config_of(stage, precision="fp32"), module, optimizer=update)
        before = weights_of(engine)
        if rank == 1:
            change(update, module)
        found.append(message_of(lambda: step_of(engine, 0, rank, world_size)))  # noqa: B023
        after = weights_of(engine)
        assert all(torch.equal(after[n], before[n]) for n in before)
    return found


CHANGES: list[Callable[[torch.optim.Optimizer, Any], Any]] = [
    lambda update, module: update.param_groups[1]["lr"].fill_(0.125),
    lambda update, module: update.param_groups[0].update(weight_decay=0.75),
    lambda update, module: update.add_param_group(dict(params=[module.layers[1].bias])),
]


@pytest.mark.parametrize("stage", [0, 2])
def test_every_hyperparameter_of_every_group_is_the_same_on_all_ranks(stage: int) -> None:
    """A schedule that follows a rank's own loss would give each rank weights of its own in stage 0."""
    told = run(steps_that_differ, 2, stage)
    assert told[0] == told[1]
    rate, decay, groups = told[0]
    assert "rank 0: a step with learning rate 0.25, 2 param groups, [1] lr 0.5; rank 1:" in rate
    assert "rank 1: a step with learning rate 0.25, 2 param groups, [1] lr 0.125" in rate
    assert "rank 1: a step with learning rate 0.25, 2 param groups, [0] weight_decay 0.75, [1] lr 0.5" in decay
    assert "rank 1: a step with learning rate 0.25, 3 param groups, [1] lr 0.5" in groups


def load_damaged(rank: int, world_size: int, folder: Path) -> list[str]:
    """Return what is said to a checkpoint of which a bit was flipped, by an engine that stays as it was."""
    engine, *_ = engine_with(rank, world_size, 1)
    step_of(engine, 0, rank, world_size)
    path = engine.save_checkpoint(folder)
    module = linears()
    update = torch.optim.SGD(module.parameters(), lr=0.5)
    other, _ = engine_of(rank, world_size, config_of(1, precision="fp32"), module, optimizer=update)
    before = weights_of(other)
    if rank == 0:
        file = path / "rank_00000.safetensors"
        content = bytearray(file.read_bytes())
        content[-8] ^= 1
        file.write_bytes(content)
    other.agree_on("a damaged file")
    found = [message_of(lambda: other.load_checkpoint(folder)), message_of(lambda: other.load_weights(folder))]
    after = weights_of(other)
    assert update.param_groups[0]["lr"] == 0.5
    assert other.num_steps == 0
    assert all(torch.equal(after[n], before[n]) for n in before)
    return found


def test_a_flipped_bit_in_a_checkpoint_is_refused_on_every_rank_and_changes_nothing(tmp_path: Path) -> None:
    for found in run(load_damaged, 2, tmp_path):
        assert all(
            "rank_00000.safetensors is damaged, or another file: its bytes are not those that were" in text
            for text in found
        )


METADATA: list[dict[str, Any]] = [
    dict(counters=None),
    dict(counters=dict(step="x", updates=0)),
    dict(counters=dict(step=1, updates=2)),
    dict(counters=dict(step=1, updates=1, loss_scale=-1.0)),
    dict(counters=dict(step=1, updates=1, placement=dict(key="x"))),
    dict(format="2"),
    dict(steps=[1]),
    dict(frozen="first.weight"),
    dict(group_names=[1]),
    dict(optimizer=3),
    dict(values=[]),
    dict(values=[3]),
    dict(values=[dict(json={}, tensors=[["float32", [2**50]]])]),  # 4 PiB
    dict(values=[dict(json={}, tensors=[["float32", [0, -1]]])]),
    dict(values=[dict(json={}, tensors=[["no_dtype", [0]]])]),
    dict(values=[dict(json={}, tensors=3)]),
    dict(values=[dict(json={"extra": {"$bytearray": 2**50}}, tensors=[])]),
    dict(values=[dict(json={"extra": {"$code": "x"}}, tensors=[])]),
    dict(values=[dict(json={"extra": {"$device": "x"}}, tensors=[])]),
    dict(values=[dict(json={"extra": {"$tensor": 5}}, tensors=[])]),
    dict(values=[dict(json=[], tensors=[])]),
]
"""Changes of a checkpoint's metadata, with which its checksums are right."""


def load_strange_metadata(rank: int, world_size: int, folder: Path) -> list[str]:
    """Return what is said to checkpoints whose metadata somebody has changed, by an engine that stays as it was."""
    engine, *_ = engine_with(rank, world_size, 1)
    step_of(engine, 0, rank, world_size)
    path = engine.save_checkpoint(folder)
    module = linears()
    update = torch.optim.SGD(module.parameters(), lr=0.5)
    other, _ = engine_of(rank, world_size, config_of(1, precision="fp32"), module, optimizer=update)
    before, index, found = weights_of(other), json.loads((path / "checkpoint.json").read_text()), []
    for change in METADATA:
        (path / "checkpoint.json").write_text(json.dumps(index | dict(metadata=index["metadata"] | change)))
        seal(path)
        found += [message_of(lambda: other.load_checkpoint(folder)), message_of(lambda: other.load_weights(folder))]
    after = weights_of(other)
    assert (update.param_groups[0]["lr"], other.num_steps) == (0.5, 0)
    assert all(torch.equal(after[n], before[n]) for n in before)
    return found


def test_metadata_of_no_engine_are_refused_and_change_nothing(tmp_path: Path) -> None:
    """Weights and groups had been loaded by then, and memory of a size in them was allocated."""
    (found,) = run(load_strange_metadata, 1, tmp_path)
    assert len(found) == 2 * len(METADATA)
    for text, change in zip(found, (change for change in METADATA for _ in range(2)), strict=True):
        assert "checkpoint" in text, (change, text)
        assert str(tmp_path) in text or "is damaged" in text, (change, text)
    assert sum("has no tensor value/0/0" in text for text in found) == 2  # before 4 PiB of memory are asked for


def load_with_fewer_states(rank: int, world_size: int, folder: Path) -> list[str]:
    """Return what is said to a checkpoint that lacks a state, and to such a state_dict, by an engine that stays as it
    was: in its groups are other fields, with which it has another state.
    """
    module, other = linears(), linears()
    updates = [
        torch.optim.SGD(module.parameters(), lr=0.25, momentum=0.5),
        torch.optim.SGD(other.parameters(), lr=0.5),
    ]
    engine, loaded = (
        engine_of(rank, world_size, config_of(1, precision="fp32"), *pair[:1], optimizer=pair[1])[0]
        for pair in zip((module, other), updates, strict=True)
    )
    step_of(engine, 0, rank, world_size)
    step_of(loaded, 1, rank, world_size)
    path, state, before = engine.save_checkpoint(folder), engine.state_dict(), loaded.state_dict()
    if rank == 0:
        index = json.loads((path / "checkpoint.json").read_text())
        del index["tensors"]["momentum_buffer/first.weight"]
        (path / "checkpoint.json").write_text(json.dumps(index))
        seal(path)
    engine.agree_on("a checkpoint without a state")
    for key in [key for key in state["tensors"] if key.startswith("momentum_buffer/")][:1]:  # rank 1 has padding alone
        del state["tensors"][key]
    found = [message_of(lambda: loaded.load_checkpoint(path)), message_of(lambda: loaded.load_state_dict(state))]
    after = loaded.state_dict()
    assert (updates[1].param_groups[0]["lr"], updates[1].param_groups[0]["momentum"]) == (0.5, 0)
    assert before["tensors"].keys() == after["tensors"].keys()
    assert all(torch.equal(x, after["tensors"][key]) for key, x in before["tensors"].items())
    assert before["counters"] == after["counters"]
    assert message_of(lambda: loaded.load_checkpoint(path, strict=False)) == "nothing"
    assert updates[1].param_groups[0]["momentum"] == 0.5
    return found


def test_a_refusal_of_states_leaves_the_groups_as_they_were(tmp_path: Path) -> None:
    """The learning rate of the checkpoint was taken over before its states were looked at."""
    for of_checkpoint, of_state in run(load_with_fewer_states, 2, tmp_path):
        assert "lacks momentum_buffer of first.weight, which the optimizer has" in of_checkpoint
        assert "load_state_dict: the state lacks momentum_buffer/" in of_state


def load_drawn_metadata(rank: int, world_size: int, folder: Path) -> int:
    """Return how many checkpoints were refused, of which a value of the metadata was replaced by a strange one.

    Any other error than a refusal would fail.
    """
    engine, *_ = engine_with(rank, world_size, 1)
    step_of(engine, 0, rank, world_size)
    extra = dict(a=[torch.ones(2), (1, {2: b"3"})], b=torch.float32)
    path = engine.save_checkpoint(folder, extra)
    whole, draw, refused = json.loads((path / "checkpoint.json").read_text()), random.Random(5), 0
    for _ in range(150):
        index = copy.deepcopy(whole)
        container, key = draw.choice(list(leaves(index["metadata"])))
        container[key] = draw.choice(STRANGE)
        (path / "checkpoint.json").write_text(json.dumps(index))
        seal(path)
        refused += message_of(lambda: engine.load_checkpoint(folder, strict=False)) != "nothing"
    return refused


def test_a_strange_value_anywhere_in_the_metadata_is_refused_or_loaded_but_never_breaks_down(tmp_path: Path) -> None:
    (refused,) = run(load_drawn_metadata, 1, tmp_path)
    assert refused > 50


def group_with_names(rank: int, world_size: int, folder: Path) -> list[str]:
    """Return what is said to groups of parameters that have a group, after one with names was added, saved and loaded
    by an optimizer without names.
    """
    module = linears()
    update = torch.optim.Adam(module.first.named_parameters(), lr=0.25)
    engine, _ = engine_of(rank, world_size, config_of(1, precision="fp32"), module, optimizer=update)
    update.add_param_group(dict(params=list(module.layers.named_parameters()), lr=0.5))
    step_of(engine, 0, rank, world_size)
    engine.save_checkpoint(folder)
    assert [len(group["param_names"]) for group in update.param_groups] == [1, 4]
    other = linears()
    without = torch.optim.Adam(other.first.parameters(), lr=0.75)
    loaded, _ = engine_of(rank, world_size, config_of(3, precision="fp32"), other, optimizer=without)
    without.add_param_group(dict(params=list(other.layers.parameters())))
    loaded.load_checkpoint(folder)
    assert [group["lr"] for group in without.param_groups] == [0.25, 0.5]
    before, after = weights_of(engine), weights_of(loaded)
    assert all(torch.equal(before[n], after[n]) for n in before)
    repeated = [[other.first.weight], [other.layers[0].bias]]
    return [message_of(lambda: without.add_param_group(dict(params=given))) for given in repeated]  # noqa: B023


def test_groups_with_names_are_added_and_loaded_and_no_parameter_has_two_groups(tmp_path: Path) -> None:
    """A rank without a part of the parameter would have added it again, and the others not."""
    for found in run(group_with_names, 2, tmp_path):
        assert found == [
            f"optimizer.add_param_group: {name} is in a group already, or twice in this one. Add each parameter to one"
            " group."
            for name in ("first.weight", "layers.0.bias")
        ]


def second_engine(rank: int, world_size: int, stage: int) -> str:
    """Return what is said to a second engine of a module; a copy of it has one, and both are trained."""
    engine, module, _ = engine_with(rank, world_size, stage)
    step_of(engine, 0, rank, world_size)
    with engine.full_parameters():
        other = copy.deepcopy(module)
    raw = config_of(stage, precision="fp32")
    found = message_of(lambda: engine_of(rank, world_size, raw, torch.nn.Sequential(module)))
    second, _ = engine_of(rank, world_size, raw, other)
    step_of(engine, 1, rank, world_size)
    step_of(second, 1, rank, world_size)
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_a_parameter_has_one_engine(stage: int) -> None:
    for found in run(second_engine, 2, stage):
        assert "model: 0.first.weight has an engine already" in found


def compiled_module(rank: int, world_size: int, folder: Path) -> list[str]:
    """Return what is wrong in a module that was compiled, whole and in parts, before its engine was made."""
    plain = linears()
    engine, _ = engine_of(rank, world_size, config_of(3, precision="fp32"), plain)
    step_of(engine, 0, rank, world_size)
    engine.save_checkpoint(folder)
    want = weights_of(engine)
    found = []
    for is_whole in (True, False):
        module = linears()
        module.layers[0] = torch.compile(module.layers[0], backend="eager")
        module = cast(torch.nn.Module, torch.compile(module, backend="eager")) if is_whole else module
        other, _ = engine_of(rank, world_size, config_of(3, precision="fp32"), module)
        step_of(other, 0, rank, world_size)
        got = weights_of(other)
        found += [name for name in want if not torch.equal(got[name], want[name])]
        other.load_checkpoint(folder)
        other.save_pretrained(folder / "export")
        names = load_file(folder / "export" / "model.safetensors").keys()
        found += sorted(names ^ {*want, "factor"})
    return found


def test_a_compiled_module_has_the_names_of_the_plain_one(tmp_path: Path) -> None:
    """An export had names with `_orig_mod.`, so that from_pretrained found none of the weights and drew them."""
    assert run(compiled_module, 2, tmp_path) == [[], []]


def on_meta(rank: int, world_size: int) -> str:
    module = torch.nn.Linear(4, 4, device="meta")
    return message_of(lambda: engine_of(rank, world_size, config_of(1), module))


def test_a_module_without_values_is_refused_by_the_name_of_its_first_parameter() -> None:
    for found in run(on_meta, 1):
        assert "weight: it is on the meta device, and has no values" in found
