"""Models that are changed in and after sharded_init: embeddings, adapters, heads, dtypes, and what an export has of it.

The reference is plain transformers, peft and torch in one process.
"""

import copy
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    OPTConfig,
    OPTForCausalLM,
)

import parallel
from parallel.errors import ColonnadeError
from parallel.modules.sharded import is_sharded, unshard_parameter
from tests.harness import run
from tests.parity import SHAPE
from tests.tables import rows

OPT: dict[str, Any] = SHAPE
VOCABULARY: int = OPT["vocab_size"]
IDS = torch.arange(16).view(2, 8) + 4
Values = dict[str, Tensor]


def launch(rank: int, world_size: int, stage: int, precision: str = "fp32") -> None:
    """Do as a script under torchrun does, in ranks that have joined a process group already."""
    train = dict(global_batch_size=12, micro_batch_size=1, device="cpu", precision=precision, clip_grad_norm=None)
    with patch.dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1"):
        parallel.launch_from_torch(dict(zero=dict(stage=stage), train=train))


@dataclass
class Said:
    """The lines that the library logs in a block."""

    lines: list[str] = field(default_factory=list)

    def write(self, text: str, *values: Any) -> None:
        self.lines.append(text % values)


@contextmanager
def heard() -> Any:
    said = Said()
    with (
        patch("parallel.modules.construction.log.warning", said.write),
        patch("parallel.modules.precision.log.warning", said.write),
    ):
        yield said


def refusal(action: Callable[[], Any]) -> str:
    """Return the message with which a ColonnadeError refuses the action, or an empty text."""
    try:
        action()
    except ColonnadeError as error:
        return str(error)
    except Exception as error:
        return f"not refused: {type(error).__name__}"
    return ""


def values_of(model: nn.Module) -> Values:
    """Return the values of all parameters, gathered where they are sharded."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = torch.empty(parameter.shape, dtype=parameter.dtype)
        if is_sharded(parameter):
            unshard_parameter(parameter, found[name])
        else:
            found[name].copy_(parameter.detach())
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp(name) for name in ("opt", "bert", "out")}
    torch.manual_seed(1)
    models = {"opt": OPTForCausalLM(OPTConfig(**OPT)), "bert": BertModel(BertConfig(**BERT))}
    for name, model in models.items():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(found[name])
    return found


BERT: dict[str, Any] = dict(
    vocab_size=37,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
)


# -- changes inside the block, in every stage


class Changed(nn.Module):
    """A module whose constructor computes with its parameters in ways of its own, and reads values of them."""

    def __init__(self) -> None:
        super().__init__()
        source = torch.arange(24.0).view(6, 4).sin()
        self.old, self.new = nn.Embedding.from_pretrained(source, freeze=False), nn.Linear(4, 8, bias=False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        self.low_rank, self.kept = nn.Linear(4, 6, bias=False), nn.Linear(4, 2)
        self.kept.load_state_dict({"weight": torch.ones(2, 4) / 3, "bias": torch.tensor([1.0, 2.0])})
        old, new = self.old.weight.data, self.new.weight.data
        new[:6] = old
        new[6:] = old.mean(0) + old.std()
        new[[7, 0]] = old[[5, 1]]
        new[new > 0.9] = 5.0
        if self.old.weight.max() > 0.5:
            new[2] = torch.from_numpy(old.numpy()[3] * 2)
        u, s, v = torch.linalg.svd(old, full_matrices=False)
        self.low_rank.weight.data = u @ torch.diag(s * torch.tensor([1.0, 0.5, 0.0, 0.0])) @ v
        self.register_buffer("total", old.sum())
        nn.init.ones_(self.normed.parametrizations.weight.original0)
        nn.init.eye_(self.normed.parametrizations.weight.original1)
        nn.init.zeros_(self.normed.bias)
        assigned = torch.empty(3)
        assigned[:] = 2.0
        self.assigned = nn.Parameter(assigned)
        filled = torch.empty(3)
        filled.numpy()[:] = 3.0
        self.filled = nn.Parameter(filled)
        self.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)


@dataclass
class Inside:
    """The models of a rank after the block."""

    resized: Values
    shrunk: Values
    head: Values
    bert: Values
    changed: Values
    buffer: Tensor
    differing: Tensor
    said: list[str]
    loss: float
    norm: float | None


def change_inside(rank: int, world_size: int, folders: dict[str, Path], stage: int) -> Inside:
    launch(rank, world_size, stage)
    torch.manual_seed(7 + rank)
    with heard() as said, parallel.sharded_init():
        resized = OPTForCausalLM.from_pretrained(folders["opt"])
        resized.resize_token_embeddings(VOCABULARY + 5)
        shrunk = OPTForCausalLM.from_pretrained(folders["opt"])
        shrunk.resize_token_embeddings(VOCABULARY - 5)
        head = AutoModelForSequenceClassification.from_pretrained(folders["opt"], num_labels=3)
        bert = BertForSequenceClassification.from_pretrained(folders["bert"], num_labels=3)
        changed = Changed()
    with parallel.sharded_init():
        torch.manual_seed(rank)
        differing = nn.Linear(3, 2)
        with torch.no_grad():
            differing.bias.fill_(1.0 + rank)
            differing.weight[1] = torch.from_numpy(np.full(3, rank, dtype=np.float32))
    outputs = parallel.initialize(differing)[0](torch.eye(3)).detach()
    lost = values_of(shrunk), values_of(head), values_of(bert), values_of(changed)
    with patch.object(resized.config, "use_cache", False):
        engine, *_ = parallel.initialize(resized, torch.optim.SGD(resized.parameters(), lr=0.1))
        engine.eval()
        loss = engine(input_ids=IDS, labels=IDS).loss
        engine.backward(loss)
        norm = engine.step().grad_norm
    engine.save_pretrained(folders["out"] / f"resized{world_size}{stage}")
    values = dict(
        AutoModelForCausalLM.from_pretrained(folders["out"] / f"resized{world_size}{stage}").named_parameters()
    )
    total = changed.get_buffer("total")
    return Inside({n: x.detach() for n, x in values.items()}, *lost, total, outputs, said.lines, loss.item(), norm)


@pytest.fixture(scope="module")
def inside(folders: dict[str, Path]) -> list[list[Inside]]:
    return [run(change_inside, world_size, folders, stage) for world_size, stage in ((1, 0), (2, 2), (2, 3))]


def test_a_model_changed_inside_the_block_is_one_model_in_every_stage(inside: list[list[Inside]]) -> None:
    """Each rank has another seed. Ranks average equal gradients: in fp32 halving and doubling are exact, but the sum of
    the squares of a norm is taken in another order.
    """
    want = inside[0][0]
    for got in (found for ranks in inside for found in ranks):
        for name in ("resized", "shrunk", "head", "bert", "changed"):
            mine, theirs = getattr(got, name), getattr(want, name)
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                assert torch.equal(mine[key], value), (name, key)
        assert torch.equal(got.differing, want.differing)
        assert got.loss == pytest.approx(want.loss, rel=1e-6)
        assert got.norm == pytest.approx(want.norm, rel=1e-5)


def test_a_resized_embedding_keeps_its_rows_and_a_smaller_one_is_that_of_one_process(
    inside: list[list[Inside]], folders: dict[str, Path]
) -> None:
    plain = OPTForCausalLM.from_pretrained(folders["opt"])
    plain.resize_token_embeddings(VOCABULARY - 5)
    for name, parameter in plain.named_parameters():
        assert torch.equal(inside[-1][0].shrunk[name], parameter), name
    before = OPTForCausalLM.from_pretrained(folders["opt"]).get_input_embeddings().weight
    after = inside[-1][0].resized["model.decoder.embed_tokens.weight"]
    trained = VOCABULARY + 5, OPT["hidden_size"]
    assert after.shape == trained
    # One step of SGD moves a row by 0.1 of its gradient, whose norm is known.
    assert (after[:VOCABULARY] - before).norm() <= 0.1 * float(inside[-1][0].norm or 0)
    # Hugging Face draws new rows around the mean of the old ones, at a distance of 1e-4.5 of their deviation.
    assert (after[VOCABULARY:] - before.mean(0)).norm() <= 0.1 * float(inside[-1][0].norm or 0) + 1e-3


def test_a_new_head_is_drawn_by_hugging_faces_rule_and_said_once(inside: list[list[Inside]]) -> None:
    """Both models draw their heads with a standard deviation of 0.02. That of N draws has a relative error of 1/√(2N),
    of which six are allowed.
    """
    for ranks in inside:
        for rank, found in enumerate(ranks):
            said = [line for line in found.said if "has no weights of this shape" in line]
            assert len(said) == (2 if rank == 0 else 0)
            assert all(name in "".join(said) for name in ("score.weight", "classifier.bias, classifier.weight") if said)
            drawn = torch.cat([found.head["score.weight"].flatten(), found.bert["classifier.weight"].flatten()])
            assert abs(drawn.std() / 0.02 - 1) < 6 / (2 * drawn.numel()) ** 0.5
            assert not found.bert["classifier.bias"].any()


def test_operations_on_weights_inside_the_block_are_those_of_plain_torch(inside: list[list[Inside]]) -> None:
    """The same operations run on the same numbers, except that an SVD may differ in its last bits."""
    plain = Changed()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(inside[-1][1].changed[name], parameter.detach(), rtol=0, atol=1e-6)
    assert torch.equal(inside[-1][1].buffer, plain.get_buffer("total"))


def test_values_that_differ_by_rank_are_the_first_ranks(inside: list[list[Inside]]) -> None:
    """The last output is 1, the bias of the first rank, whose row of weights is zero. Another rank keeps these."""
    for found in (one for ranks in inside for one in ranks):
        assert torch.equal(found.differing[:, 1], torch.ones(3))


# -- refusals, on every rank


def unequal(rank: int) -> None:
    with parallel.sharded_init():
        nn.Linear(3, 2 + rank)


def unequal_later(rank: int) -> None:
    with parallel.sharded_init():
        nn.Sequential(*[nn.Linear(3, 3) for _ in range(1 + rank)])


def one_fails(rank: int) -> None:
    with parallel.sharded_init():
        model = nn.Linear(3, 2)
        if rank == 1:
            raise parallel.DataError(f"{model.in_features} is a bad number")


def complex_numbers(rank: int) -> None:
    model = nn.Linear(3, 2)
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    parallel.initialize(model)


def write_row(model: Any) -> None:
    model.lm_head.weight.data[0] = 1.0


def refuse(rank: int, world_size: int, folders: dict[str, Path]) -> dict[str, str]:
    """Return the words in which each action is refused on this rank."""
    launch(rank, world_size, 3)
    actions: dict[str, Callable[[], Any]] = {
        "unequal": lambda: unequal(rank),
        "unequal later": lambda: unequal_later(rank),
        "one fails": lambda: one_fails(rank),
        "lazy": lambda: parallel.initialize(nn.LazyLinear(3)),
        "complex": lambda: complex_numbers(rank),
    }
    changes: dict[str, Callable[[Any], Any]] = {
        "resized": lambda model: model.resize_token_embeddings(50),
        "written": write_row,
        "called": lambda model: model(input_ids=IDS),
        "saved": lambda model: torch.save(model.state_dict(), folders["out"] / "never.pt"),
        "dora": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"], use_dora=True)),
    }
    found = {name: refusal(action) for name, action in actions.items()}
    for name, change in changes.items():
        with parallel.sharded_init():
            model = OPTForCausalLM.from_pretrained(folders["opt"])
        found[name] = refusal(lambda: change(model))  # noqa: B023
    return found


@pytest.fixture(scope="module")
def refused(folders: dict[str, Path]) -> list[dict[str, str]]:
    return run(refuse, 2, folders)


def test_what_differs_by_rank_or_needs_values_that_are_elsewhere_is_refused_on_every_rank(
    refused: list[dict[str, str]],
) -> None:
    used = "is used after the block, where each rank holds a shard of it"
    words = {
        "unequal": "rank 1: Linear: weight, trained, float32[3, 3]",
        "unequal later": "the ranks do different things",
        "one fails": "3 is a bad number",
        "resized": f"model.decoder.embed_tokens.weight {used}",
        "written": f"model.decoder.embed_tokens.weight {used}",
        "called": used,
        "saved": used,
        "dora": f"q_proj.weight {used}",
        "lazy": "it has no shape yet",
        "complex": "can be trained. Freeze it.",
    }
    for found in refused:
        assert found.keys() == words.keys()
        for name, text in words.items():
            assert text in found[name], (name, found[name])


def change_after(rank: int, world_size: int, folders: dict[str, Path]) -> Values:
    launch(rank, world_size, 3)
    with parallel.sharded_init():
        model: Any = OPTForCausalLM.from_pretrained(folders["opt"])
    torch.manual_seed(rank)
    model = get_peft_model(copy.deepcopy(model.to(torch.float64).requires_grad_(False)), ADAPTERS["modules_to_save"]())
    engine, *_ = parallel.initialize(model, torch.optim.SGD(trained(model), lr=0.0))
    engine.backward(engine(input_ids=IDS, labels=IDS).loss)
    engine.step()
    engine.save_pretrained(folders["out"] / "after", merge=True)
    return {name: x.detach() for name, x in base_of({"opt": folders["out"] / "after"}).named_parameters()}


def test_changes_that_need_no_values_work_after_the_block(folders: dict[str, Path]) -> None:
    """A new LoRA adds nothing, and the learning rate is zero: what is merged is what was loaded."""
    plain = dict(base_of(folders).named_parameters())
    for found in run(change_after, 2, folders):
        for name, value in found.items():
            assert torch.equal(value, plain[name.replace("lm_head", "model.decoder.embed_tokens")]), name


# -- adapters


ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "dora": lambda: LoraConfig(r=2, target_modules=["fc1"], use_dora=True, bias="lora_only"),
    "pissa": lambda: LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    "modules_to_save": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": lambda: LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "tied": lambda: LoraConfig(r=2, target_modules=["lm_head"]),
}


@dataclass
class Adapted:
    logits: Tensor
    norms: list[float]
    refused: str
    unchanged: bool  # by an export


def adapt(rank: int, world_size: int, folders: dict[str, Path], stage: int, kinds: list[str]) -> dict[str, Adapted]:
    launch(rank, world_size, stage)
    found = {}
    for kind in kinds:
        torch.manual_seed(3)
        with parallel.sharded_init():
            model = get_peft_model(OPTForCausalLM.from_pretrained(folders["opt"]), ADAPTERS[kind]())
        engine, *_ = parallel.initialize(model, torch.optim.SGD(trained(model), lr=0.5))
        engine.eval()
        out = folders["out"] / f"{kind}{world_size}{stage}"
        engine.save_pretrained(out / "start")
        norms = []
        for _ in range(2):
            engine.backward(engine(input_ids=IDS, labels=IDS).loss)
            norms.append(engine.step().grad_norm)
        with torch.no_grad():
            logits = engine(input_ids=IDS).logits
        engine.save_pretrained(out / "adapter")
        engine.save_pretrained(out / "merged")  # an adapter that a merged model replaces
        problem = refusal(lambda: engine.save_pretrained(out / "merged", merge=True))  # noqa: B023
        with torch.no_grad():
            unchanged = torch.equal(logits, engine(input_ids=IDS).logits)
        found[kind] = Adapted(logits, norms, problem, unchanged)
    return found


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.fixture(scope="module")
def adapted(folders: dict[str, Path]) -> dict[int, list[dict[str, Adapted]]]:
    return {
        3: run(adapt, 2, folders, 3, list(ADAPTERS)),
        1: run(adapt, 2, folders, 1, ["lora", "modules_to_save"]),
    }


def base_of(folders: dict[str, Path]) -> Any:
    return OPTForCausalLM.from_pretrained(folders["opt"]).eval()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_trains_is_exported_and_is_merged_as_by_peft_in_one_process(
    adapted: dict[int, list[dict[str, Adapted]]], folders: dict[str, Path], kind: str
) -> None:
    """Plain peft starts from the adapter that the engine exported before the first step. Two steps in fp32, of the same
    operations: sums over ranks are exact halves, and a few roundings remain in the norm and in products of the logits,
    which are of the order of 1.
    """
    for stage in (stage for stage in adapted if kind in adapted[stage][0]):
        out = folders["out"] / f"{kind}2{stage}"
        assert {file.name for file in (out / "adapter").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        plain = PeftModel.from_pretrained(base_of(folders), out / "start").eval()
        for name, parameter in plain.named_parameters():
            is_adapter = any(word in name for word in ("lora_", "modules_to_save", "_delta", "prompt_encoder"))
            parameter.requires_grad_(is_adapter or (kind == "dora" and name.endswith("fc1.base_layer.bias")))
        optimizer, norms = torch.optim.SGD(trained(plain), lr=0.5), []
        for _ in range(2):
            optimizer.zero_grad()
            plain(input_ids=IDS, labels=IDS).loss.backward()
            norms.append(nn.utils.get_total_norm([x.grad for x in trained(plain) if x.grad is not None]).item())
            optimizer.step()
        back = PeftModel.from_pretrained(base_of(folders), out / "adapter").eval()
        with torch.no_grad():
            want, read = plain(input_ids=IDS).logits, back(input_ids=IDS).logits
        for found in (ranks[kind] for ranks in adapted[stage]):
            assert found.norms == pytest.approx(norms, rel=1e-5)
            torch.testing.assert_close(found.logits, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.logits, read, rtol=1e-6, atol=1e-6)
            assert found.unchanged
        if kind in ("prompt", "tied"):
            return
        merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
        assert not list((out / "merged").glob("adapter*"))
        expected = dict(back.merge_and_unload().named_parameters())
        assert dict(merged.named_parameters()).keys() == expected.keys()
        for name, parameter in merged.named_parameters():
            assert torch.equal(parameter, expected[name]), name


def test_a_merge_that_makes_another_model_or_none_is_refused(adapted: dict[int, list[dict[str, Adapted]]]) -> None:
    for found in adapted[3]:
        assert "it has no merge_and_unload" in found["prompt"].refused
        assert "lm_head.base_layer.weight, which share a weight" in found["tied"].refused
        assert not any(found[kind].refused for kind in ADAPTERS if kind not in ("prompt", "tied"))


# -- dtypes


class Mixed(nn.Module):
    """A model in bf16 with a router in fp32, and parameters that are no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.router = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4, bias=False)
        self.order = nn.Parameter(torch.tensor([2, 0, 1, 3]), requires_grad=False)
        self.phase = nn.Parameter(torch.tensor([1j, 2.0]), requires_grad=False)
        nn.init.constant_(self.router.weight, 1 / 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x.to(self.body.weight.dtype))
        y: Tensor = self.router(hidden.to(self.router.weight.dtype))[:, self.order]
        return y


@dataclass
class Computed:
    dtypes: dict[str, torch.dtype]
    said: list[str]
    loss: float
    order: Tensor
    phase: Tensor
    merge: str


def compute(rank: int, world_size: int, folders: dict[str, Path], stage: int) -> dict[str, Computed]:
    found = {}
    for precision in ("bf16", "fp32"):
        launch(rank, world_size, stage, precision)
        torch.manual_seed(0)
        with parallel.sharded_init():
            model = Mixed()
        with heard() as said:
            engine, *_ = parallel.initialize(model, torch.optim.SGD(trained(model), lr=0.1))
        loss = engine(torch.ones(2, 4)).float().square().mean()
        engine.backward(loss)
        engine.step()
        folder = folders["out"] / f"mixed{precision}{world_size}{stage}"
        problem = refusal(lambda: engine.save_pretrained(folder, merge=True))  # noqa: B023
        engine.save_pretrained(folder)
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        found[precision] = Computed(dtypes, said.lines, loss.item(), model.order.data, model.phase.data, problem)
    return found


@pytest.fixture(scope="module")
def computed(folders: dict[str, Path]) -> list[list[dict[str, Computed]]]:
    return [run(compute, world_size, folders, stage) for world_size, stage in ((1, 0), (2, 3))]


def test_a_wide_parameter_in_a_narrow_model_keeps_its_dtype_and_whole_numbers_stay(
    computed: list[list[dict[str, Computed]]], folders: dict[str, Path]
) -> None:
    """An index that was divided over ranks was all zeros after the block once, since no chunk took it over."""
    for found in (one for ranks in computed for one in ranks):
        wide = {name for name, dtype in found["bf16"].dtypes.items() if dtype == torch.float32}
        assert wide == {"router.weight"}
        assert found["bf16"].dtypes["body.weight"] == torch.bfloat16
        assert {found["fp32"].dtypes[name] for name in ("body.weight", "router.weight")} == {torch.float32}
        for one in found.values():
            assert one.order.tolist() == [2, 0, 1, 3]
            assert one.phase.tolist() == [1j, 2.0]
            assert "merge=True merges the adapters of a peft model, and Mixed is none" in one.merge
        assert found["bf16"].loss == computed[0][0]["bf16"].loss
    first, second = computed[-1]
    assert "2 of bfloat16 in bfloat16, 1 of float32 in float32" in first["bf16"].said[0]
    assert "2 of bfloat16 in float32, 1 of float32 in float32" in first["fp32"].said[0]
    assert not second["bf16"].said


# -- the table in the documents

HEAD = test_a_new_head_is_drawn_by_hugging_faces_rule_and_said_once
RESIZED = test_a_resized_embedding_keeps_its_rows_and_a_smaller_one_is_that_of_one_process
OPERATIONS = test_operations_on_weights_inside_the_block_are_those_of_plain_torch
FIRST = test_values_that_differ_by_rank_are_the_first_ranks
REFUSED = test_what_differs_by_rank_or_needs_values_that_are_elsewhere_is_refused_on_every_rank
AFTER = test_changes_that_need_no_values_work_after_the_block
ADAPTED = test_an_adapter_trains_is_exported_and_is_merged_as_by_peft_in_one_process
MERGES = test_a_merge_that_makes_another_model_or_none_is_refused
DTYPES = test_a_wide_parameter_in_a_narrow_model_keeps_its_dtype_and_whole_numbers_stay
CHECKS: dict[str, Callable[..., None]] = {
    "`resize_token_embeddings` in the block": RESIZED,
    "`get_peft_model` in the block": ADAPTED,
    "a new head, or a weight that is missing in the files": HEAD,
    "weights that your own code computes in the block": OPERATIONS,
    "values that differ by rank in the block": FIRST,
    "models that differ by rank": REFUSED,
    "a block that fails on one rank": REFUSED,
    "`resize_token_embeddings` after the block, in stage 3": REFUSED,
    "freezing, casts, copies, `to` and `get_peft_model` with LoRA after the block": AFTER,
    "parameters of several dtypes": DTYPES,
    "frozen integers, quantized or complex numbers": DTYPES,
    "a lazy layer that has seen no input": REFUSED,
    "`save_pretrained` of a peft model": ADAPTED,
    "`save_pretrained` with `merge=True`": ADAPTED,
    "`merge=True` without adapters, or with prompt tuning": MERGES,
    "`merge=True` where the adapter is on one of two tied layers": MERGES,
}


def test_every_row_of_the_table_has_a_test_that_looks_for_its_words() -> None:
    table = rows("docs/library.md", "Changing a model")
    assert [row.what for row in table] == list(CHECKS)
    source = Path(__file__).read_text(encoding="utf-8")
    for row in table:
        quoted = [text for text in row.answer.split("`")[1::2] if " " in text]
        assert all(text in source for text in quoted), quoted
