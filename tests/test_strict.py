"""A load refuses by name what only the checkpoint or only the engine has, or names it: nothing is silent."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from parallel.checkpoint.checkpoint import resolve_latest
from parallel.engine.module_engine import ModuleEngine
from parallel.errors import CheckpointError
from tests import test_resume
from tests.checkpoints import seal
from tests.harness import run
from tests.parity import Raw, batches_of, share_of
from tests.parity import config_of as config_of_opt
from tests.parity import engine_of as engine_of_opt
from tests.tables import rows
from tests.test_resume import (
    ROUNDING,
    Make,
    adamw,
    added,
    config_of,
    engine_of,
    fields,
    freeze,
    inputs,
    net,
    sgd,
    sum_in_plain_torch,
    sums_of,
    train,
    train_in_plain_torch,
    with_tensor_lr,
)


class Own:
    """A class of the user's."""


class Said(logging.Handler):
    """The messages that were logged while this handler was there."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> "Said":
        logging.getLogger("parallel").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("parallel").removeHandler(self)


def refusal(call: Callable[[], object]) -> str:
    """Return the words of a CheckpointError; an empty string where there is none."""
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return ""


class Claims:
    """Loads of checkpoints of one engine into others, on one rank of two. Each method returns what was found."""

    def __init__(self, rank: int, world_size: int, folder: Path) -> None:
        self.where: Any = dict(rank=rank, world_size=world_size)
        self.rank, self.folder = rank, folder
        self.saved = self.engine(net(), stage=1)
        self.saved.module.notes = {7: "seven"}  # type: ignore[assignment]
        train(self.saved, 0, 2)
        self.saved.save_checkpoint(folder, dict(rng=torch.full((2,), rank), rank=rank, step=2))

    def engine(self, module: nn.Module, optimizer: Make = adamw, *, stage: int = 3) -> ModuleEngine:
        module = module.double()
        return engine_of(module, optimizer(module), raw=config_of(stage), **self.where)

    def load(self, engine: ModuleEngine, **options: Any) -> tuple[str, str]:
        """Return the refusal and the messages of a load."""
        with Said() as said:
            refused = refusal(lambda: engine.load_checkpoint(self.folder, **options))
        return refused, "\n".join(said.messages)

    def extra(self) -> dict[str, Any]:
        return self.engine(net()).load_checkpoint(self.folder)

    def unstorable(self) -> tuple[str, str, bool]:
        """Return both refusals, of which only rank 1's `extra` is a reason for the first; whether a folder was made."""
        bad = dict(scheduler=dict(lr_lambdas=[lambda step: 1.0] if self.rank else []))
        first = refusal(lambda: self.saved.save_checkpoint(self.folder / "bad", bad))
        self.saved.optimizer.inner.param_groups[0]["mine"] = Own()  # type: ignore[union-attr]
        second = refusal(lambda: self.saved.save_checkpoint(self.folder / "bad"))
        del self.saved.optimizer.inner.param_groups[0]["mine"]  # type: ignore[union-attr]
        return first, second, (self.folder / "bad").exists()

    def frozen(self) -> tuple[str, str]:
        return self.load(self.engine(freeze(net(), frozen=True)))

    def fewer(self) -> tuple[str, str, float]:
        """Return what is said of a model with a layer less, and the sum of a weight after a load without `strict`."""
        module = net()
        del module.blocks[1]
        engine = self.engine(module)
        strict = self.load(engine)[0]
        before = sums_of(engine)
        assert self.load(engine)[0] == strict
        assert sums_of(engine) == before  # a refusal changes nothing
        said = self.load(engine, strict=False)
        assert said[0] == ""
        return strict, said[1], sums_of(engine).get("master/head.weight", 0.0)

    def more(self) -> tuple[str, str, float]:
        """Return the same of a model with a layer more, which then takes a step with new states."""
        module = net()
        module.more = nn.Linear(2, 2)
        with torch.no_grad():
            module.more.weight.fill_(5.0)
        engine = self.engine(module)
        strict, said = self.load(engine)[0], self.load(engine, strict=False)[1]
        return strict, said, sums_of(engine).get("master/more.weight", 0.0)

    def shapes(self) -> tuple[str, str]:
        engine = self.engine(net(5))
        return self.load(engine)[0], self.load(engine, strict=False)[0]

    def another_class(self) -> tuple[str, str]:
        engine = self.engine(net(), sgd)
        return self.load(engine)[0], self.load(engine, strict=False)[1]

    def groups(self) -> tuple[str, str, str]:
        """Return what is said of an optimizer without the head, and of one with a field more, and then not strict."""
        without = self.engine(
            net(), lambda m: torch.optim.AdamW([p for n, p in m.named_parameters() if "head" not in n])
        )
        field = self.engine(net(), lambda m: torch.optim.AdamW([dict(params=list(m.parameters()), mine=1)], lr=0.5))
        found = self.load(without)[0], self.load(field)[0], self.load(field, strict=False)[1]
        assert fields(field.optimizer.inner)[0]["lr"] == 0.1  # type: ignore[union-attr]
        assert fields(field.optimizer.inner)[0]["mine"] == 1  # type: ignore[union-attr]
        return found

    def weights(self) -> tuple[dict[str, float], int, Any]:
        """Return the sums of an engine that takes a step, loads weights, and takes a step more; its steps and notes."""
        engine = self.engine(net(), sgd)
        engine.load_weights(self.folder)
        notes = dict(engine.module.notes)  # type: ignore[arg-type]
        train(engine, 5, 6)
        return sums_of(engine), engine.num_steps, notes

    def local_state(self) -> tuple[bool, str, str]:
        """Return whether a state_dict, carried by torch.save, goes on bit for bit; and two refusals."""
        file = self.folder / f"state{self.rank}.pt"
        engine = self.engine(net(), with_tensor_lr, stage=1)
        train(engine, 0, 2)
        torch.save(dict(engine=engine.state_dict()), file)
        train(engine, 2, 4)
        want = [(piece.name, piece.data.clone()) for piece in engine.state_pieces()]
        state = torch.load(file, weights_only=True)["engine"]
        other = self.engine(net(), with_tensor_lr, stage=1)
        other.load_state_dict(state)
        train(other, 2, 4)
        got = [(piece.name, piece.data) for piece in other.state_pieces()]
        same = all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(got, want, strict=True))
        elsewhere = self.engine(net(), with_tensor_lr, stage=3)
        fewer = net()
        del fewer.blocks[1]
        smaller = self.engine(fewer, with_tensor_lr, stage=1)
        refused = refusal(lambda: elsewhere.load_state_dict(state)), refusal(lambda: smaller.load_state_dict(state))
        return same, *refused

    def unused_gradients(self) -> tuple[str, bool]:
        engine = self.engine(net(), stage=2)
        x = inputs(0).tensor_split(2)[self.rank]
        engine.backward(engine(x).square().mean())
        with Said() as said:
            engine.save_checkpoint(self.folder / "gradients")
        engine.load_checkpoint(self.folder)
        return "\n".join(said.messages), engine.has_gradients


def all_claims(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    claims = Claims(rank, world_size, folder)
    names = [name for name in vars(Claims) if not name.startswith("_") and name not in ("engine", "load")]
    return {name: getattr(claims, name)() for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("claims")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """Return the claims of both ranks."""
    return run(all_claims, 2, folder)


def test_each_rank_has_its_own_extra_again(found: list[dict[str, Any]]) -> None:
    for rank, claims in enumerate(found):
        extra = claims["extra"]
        assert extra["rng"].tolist() == [rank, rank]
        assert (extra["rank"], extra["step"]) == (rank, 2)


def test_another_number_of_ranks_has_the_extra_of_rank_0_with_a_warning(
    found: list[dict[str, Any]], folder: Path
) -> None:
    module = net().double()
    with Said() as said:
        extra = engine_of(module, adamw(module)).load_checkpoint(folder)
    assert extra["rank"] == 0
    assert "extra differed between the 2 ranks that saved it; rank 0's is used" in said.messages[0]


def test_an_object_on_one_rank_is_refused_on_all_before_anything_is_written(found: list[dict[str, Any]]) -> None:
    for claims in found:
        extra, group, is_made = claims["unstorable"]
        assert 'extra["scheduler"]["lr_lambdas"][0]: a value of type function cannot be stored in a checkpoint' in extra
        assert 'param_groups[0]["mine"]: a value of type tests.test_strict.Own cannot be stored' in group
        assert not is_made


def test_states_of_what_is_frozen_now_are_left_out_with_a_warning(found: list[dict[str, Any]]) -> None:
    refused, said = found[0]["frozen"]
    assert refused == ""
    assert (
        "blocks.0.bias, blocks.1.bias, blocks.1.weight, first.weight is frozen now: its optimizer states are left out"
        in said
    )


def trained_in_plain_torch() -> nn.Module:
    module = net().double()
    train_in_plain_torch(module, adamw(module), range(2))
    return module


def test_names_left_over_and_missing_are_refused_on_every_rank_and_named_without_strict(
    found: list[dict[str, Any]],
) -> None:
    for claims in found:
        assert "has blocks.1.bias, blocks.1.weight, which the model lacks" in claims["fewer"][0]
        assert "lacks more.bias, more.weight, which the model has" in claims["more"][0]
        assert "strict=False" in claims["fewer"][0]
    assert "left out" in found[0]["fewer"][1]
    assert "which the model lacks" in found[0]["fewer"][1]
    assert "exp_avg of blocks.1.bias" in found[0]["fewer"][1]
    assert "has no optimizer states of more.bias, more.weight: they start as new ones" in found[0]["more"][1]
    head = sum_in_plain_torch(trained_in_plain_torch().get_parameter("head.weight"))
    assert sum(claims["fewer"][2] for claims in found) == pytest.approx(head, rel=ROUNDING)
    kept = sum_in_plain_torch(torch.full((2, 2), 5.0))
    assert sum(claims["more"][2] for claims in found) == pytest.approx(kept, rel=1e-6)


def test_other_shapes_are_refused_with_and_without_strict(found: list[dict[str, Any]]) -> None:
    for claims in found:
        assert all("first.weight is (6, 4), the model needs (5, 4)" in refused for refused in claims["shapes"])


def test_another_optimizer_is_refused_by_its_name(found: list[dict[str, Any]]) -> None:
    for claims in found:
        words = "the checkpoint's optimizer is torch.optim.AdamW, and this one torch.optim.SGD"
        assert words in claims["another_class"][0]
    assert words in found[0]["another_class"][1]


def test_other_groups_are_refused_by_their_names(found: list[dict[str, Any]]) -> None:
    for claims in found:
        names, field, _ = claims["groups"]
        assert (
            "param_groups[0]: the checkpoint has the parameters head.bias, head.weight in it, the optimizer not"
            in names
        )
        assert "param_groups[0]: the optimizer has the fields mine in it, the checkpoint not" in field
    assert "the fields mine" in found[0]["groups"][2]


def test_weights_are_loaded_without_states(found: list[dict[str, Any]]) -> None:
    module = trained_in_plain_torch()
    train_in_plain_torch(module, sgd(module), range(5, 6))
    got = added([claims["weights"][0] for claims in found])
    for name, parameter in module.named_parameters():
        assert got[f"master/{name}"] == pytest.approx(sum_in_plain_torch(parameter), rel=1e-10), name
    assert got["buffer/seen"] == 3
    assert found[1]["weights"][1:] == (1, {7: "seven"})


def test_a_state_dict_goes_on_bit_for_bit_and_is_refused_elsewhere(found: list[dict[str, Any]]) -> None:
    for rank, claims in enumerate(found):
        same, elsewhere, smaller = claims["local_state"]
        assert same
        place = f"rank {rank} of 2 (data 2) in ZeRO stage"
        assert f"the state is of {place} 1 with torch.optim.AdamW, and this is {place} 3" in elsewhere
        assert "engine.save_checkpoint" in elsewhere
        assert "blocks.1" in smaller


def test_gradients_that_no_step_has_used_are_named_and_dropped(found: list[dict[str, Any]]) -> None:
    assert found[0]["unused_gradients"] == ("save_checkpoint: the gradients since the last step are not saved", False)


def older(folder: Path) -> Path:
    """Make a checkpoint what version 0.1.0 wrote: without frozen parameters, with lr alone of each group."""
    index = resolve_latest(folder / "checkpoints") or folder
    content = json.loads((index / "checkpoint.json").read_text())
    metadata, tensors = content["metadata"], content["tensors"]
    gone = [n for n in tensors if n.startswith("value/") or n.partition("/")[2] in metadata["frozen"]]
    content["tensors"] = {name: tensor for name, tensor in tensors.items() if name not in gone}
    steps = {name: count for name, count in metadata["steps"].items() if count}
    content["metadata"] = dict(counters=metadata["counters"], steps=steps, rates=[0.25], extra=dict(note=1))
    (index / "checkpoint.json").write_text(json.dumps(content))
    seal(index)
    return folder


def test_a_checkpoint_of_an_earlier_version_is_loaded_with_a_warning(tmp_path: Path) -> None:
    module = freeze(net().double(), frozen=True)
    engine = engine_of(module, adamw(module))
    train(engine, 0, 2)
    engine.save_checkpoint(tmp_path)
    want = sums_of(engine)
    module = freeze(net().double(), frozen=True)
    optimizer = adamw(module)
    engine = engine_of(module, optimizer)
    with Said() as said:
        assert engine.load_checkpoint(older(tmp_path)) == dict(note=1)
    assert sums_of(engine) == want
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert "is of an older version without frozen parameters" in "\n".join(said.messages)


# -- a split model -----------------------------------------------------------------------------------------------------


def split_model(rank: int, world_size: int, raw: Raw, folder: Path) -> tuple[bool, str, bool]:
    """Return whether a state_dict and a checkpoint each go on bit for bit, and the refusal of another layout."""
    engine = engine_of_opt(rank, world_size, raw)
    batches = [share_of(batch, engine) for batch in batches_of(4)]
    uneven = {name: x[:4] for name, x in batches[1].items()}
    engine.train_step(batches[0])
    engine.train_step(uneven)
    torch.save(engine.state_dict(), folder / f"{rank}.pt")
    engine.save_checkpoint(folder, dict(place={3: 4}))
    want = [engine.train_step(batch) for batch in batches[2:]]
    got = []
    for load in ("state_dict", "checkpoint"):
        again = engine_of_opt(rank, world_size, raw | dict(train=raw["train"] | dict(seed=0)))
        if load == "checkpoint":
            assert again.load_checkpoint(folder) == dict(place={3: 4})
        else:
            again.load_state_dict(torch.load(folder / f"{rank}.pt", weights_only=True))
        assert again.num_samples == engine.data.size * (len(batches[0]["input_ids"]) + 4)
        got.append([again.train_step(batch) for batch in batches[2:]] == want)
    weights = engine_of_opt(rank, world_size, raw)
    weights.load_weights(folder)
    assert weights.num_steps == 0
    other = engine_of_opt(rank, world_size, raw | dict(zero=dict(stage=1)))
    state = torch.load(folder / f"{rank}.pt", weights_only=True)
    return got[0], refusal(lambda: other.load_state_dict(state)), got[1]


def test_a_split_model_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Dropout depends on the samples' numbers over the run, also after a step of another size."""
    layout = dict(tensor=dict(mode="1d", size=2))
    raw = config_of_opt(layout, precision="fp32", model=dict(name="opt-tiny", dropout=0.1, num_hidden_layers=1))
    for rank, (same, refused, resumed) in enumerate(run(split_model, 2, raw, tmp_path)):
        assert same
        assert resumed
        assert f"the state is of rank {rank} of 2 (t 2) in ZeRO stage 0 with the config's AdamW" in refused


# -- the table ---------------------------------------------------------------------------------------------------------

CHECKS: dict[str, Callable[..., None]] = {
    "fields of param groups: betas, momentum, weight_decay, a tensor lr, your own": (
        test_resume.test_every_field_of_every_group_resumes_in_every_stage_and_placement_as_in_plain_torch
    ),
    "a scheduler's state_dict in `extra`": test_resume.test_a_resumed_schedule_equals_plain_torchs,
    "a function, or an object of your class, in `extra` or in a group": (
        test_an_object_on_one_rank_is_refused_on_all_before_anything_is_written
    ),
    "another `extra` on each rank": test_each_rank_has_its_own_extra_again,
    "frozen parameters, buffers, and what a module's `get_extra_state` returns": (
        test_resume.test_what_is_frozen_is_saved_and_what_is_thawed_starts_with_new_states
    ),
    "a parameter that was trained, and is frozen now": test_states_of_what_is_frozen_now_are_left_out_with_a_warning,
    "a parameter that was frozen, and is trained now": (
        test_resume.test_what_is_frozen_is_saved_and_what_is_thawed_starts_with_new_states
    ),
    "a model with fewer or more names": (
        test_names_left_over_and_missing_are_refused_on_every_rank_and_named_without_strict
    ),
    "a model with other shapes": test_other_shapes_are_refused_with_and_without_strict,
    "an optimizer of another class": test_another_optimizer_is_refused_by_its_name,
    "param groups of other parameters or with other fields": test_other_groups_are_refused_by_their_names,
    "weights alone": test_weights_are_loaded_without_states,
    "`torch.save(engine.state_dict(), file)`, a file for each rank": (
        test_a_state_dict_goes_on_bit_for_bit_and_is_refused_elsewhere
    ),
    "a state_dict of another rank or layout": test_a_state_dict_goes_on_bit_for_bit_and_is_refused_elsewhere,
    "gradients that no step has used yet": test_gradients_that_no_step_has_used_are_named_and_dropped,
    "a checkpoint of version 0.1.0": test_a_checkpoint_of_an_earlier_version_is_loaded_with_a_warning,
}


def test_every_row_of_the_table_has_a_check() -> None:
    assert [row.what for row in rows("docs/library.md", "What a checkpoint brings back")] == list(CHECKS)
