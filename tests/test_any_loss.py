"""The loss and the gradients of any module equal those of plain torch, which has all samples in one batch.

What a loss counts is not told to the engine: it has to find out. Samples have different numbers of labels, some have
none, and so have microbatches and replicas.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import parallel
from parallel.config import parse
from parallel.engine.context import Place, make_context, use
from parallel.engine.module_engine import ModuleEngine
from tests.harness import run
from tests.losses import LOSSES, REFUSED, Batch, Loss, cross_entropy, mean_times_samples, tagger
from tests.once import once
from tests.parity import BOUND, Raw, relative, whole
from tests.patience import LIMIT
from tests.tables import rows

FP32 = {
    "a language model that shifts its labels",
    "a subclass with any name",
    "a language model without labels in the batch",
    "seq2seq (T5)",
    "mixture of experts without a router loss",
}
"""The models of Hugging Face that compute their loss or their norms in fp32, whatever their own dtype is."""


def bound_of(name: str) -> float:
    """Return how far two runs of the same operations in another order, or on another device, may be apart, relatively.

    There are terms of both signs, and 1e-10 is far above the rounding of fp64. With some operations in fp32 there are
    some dozens of roundings of 6e-8. A CPU makes the same ones for a sample in every microbatch, a GPU others. A label
    that is counted wrongly changes the result by percents.
    """
    return BOUND["fp32"] if name in FP32 else 1e-10


def made(name: str) -> Loss:
    torch.manual_seed(5)
    return LOSSES[name]() if name in LOSSES else REFUSED[name][0]()


Result = tuple[float, float, dict[str, Tensor]]
"""The losses of an evaluation and of a step, and the weights after it."""


def forward_by_torch(name: str) -> tuple[nn.Module, Tensor]:
    """Return the module, and its loss by plain torch in fp64, with all samples in one batch."""
    one = made(name)
    module, batch = one.module.double().train(), dict(one.batch)
    if one.criterion is None:
        if not batch.keys() & {"labels", "start_positions"}:
            batch["labels"] = batch["input_ids"]
        loss: Any = module(**batch).loss
    else:
        labels = batch.pop("labels")
        loss = one.criterion(module(**batch), labels)
    return module, loss[0] / loss[1] if isinstance(loss, tuple) else loss


@cache
def by_torch(name: str) -> Result:
    """Train by plain torch, with all samples in one batch, for one step of SGD in fp64."""
    module, loss = forward_by_torch(name)
    loss.backward()
    torch.optim.SGD(module.parameters(), lr=1.0).step()
    return loss.item(), loss.item(), {name: p.detach() for name, p in module.named_parameters()}


def config_of(stage: int, **train: Any) -> Raw:
    base: Raw = dict(precision="fp64", clip_grad_norm=None, global_batch_size=12, micro_batch_size=3)
    return dict(zero=dict(stage=stage), train=base | train)


def engine_of(rank: int, world_size: int, raw: Raw, one: Loss, **more: Any) -> ModuleEngine:
    use(make_context(parse(raw, world_size=world_size), Place(rank, world_size, rank, world_size)))
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(one.module.parameters(), lr=1.0)
    engine: ModuleEngine = parallel.initialize(one.module, optimizer, criterion=one.criterion, **more)[0]
    return engine


def share_of(batch: Batch, rank: int, world_size: int) -> Batch:
    return {name: x.tensor_split(world_size)[rank] for name, x in batch.items()}


def by_engine(rank: int, world_size: int, raw: Raw, names: list[str]) -> dict[str, Result | str]:
    """Return what is found for each of these losses, or the error that is raised."""
    found: dict[str, Result | str] = {}
    for name in names:
        one = made(name)
        engine = engine_of(rank, world_size, raw, one)
        batch = share_of(one.batch, rank, world_size)
        try:
            evaluated, stepped = engine.evaluate([batch]), engine.train_step(batch).loss
            found[name] = evaluated, stepped, whole(engine, [chunk.master for chunk in engine.chunks])
        except (parallel.ColonnadeError, IndexError) as error:
            found[name] = str(error)
        engine.mesh.close()
    return found


def update(name: str, weights: dict[str, Tensor]) -> Tensor:
    """Return what a step changed, of all weights."""
    before = made(name).module.double().state_dict()
    return torch.cat([(weights[key].cpu() - before[key]).flatten() for key in sorted(weights)])


def assert_equal(name: str, got: Result | str, want: Result, bound: float) -> None:
    assert not isinstance(got, str), f"{name}: {got}"
    assert got[0] == pytest.approx(want[0], rel=bound), f"evaluation: {name}"
    assert got[1] == pytest.approx(want[1], rel=bound), f"step: {name}"
    assert relative(update(name, got[2]), update(name, want[2])) <= bound, f"gradient: {name}"


@cache
def by_engines(stage: int) -> list[dict[str, Result | str]]:
    """Return what two ranks find for every loss. They have three samples in a microbatch, and one in the last."""
    return once(f"losses in stage {stage}", partial(run, by_engine, 2, config_of(stage), list(LOSSES)))


ROWS = {  # of the documentation's table, with the losses that show them
    "a mean over labels, in a class of any name": [
        "a language model that shifts its labels",
        "a subclass with any name",
        "a language model without labels in the batch",
        "a language model that does not shift",
        "seq2seq (Bart)",
        "seq2seq (T5)",
        "masked language model",
        "token classification",
        "image classification",
        "sequence classification",
        "mixture of experts without a router loss",
        "mean over labels",
        "mean with another ignored label",
        "mean of selected labels",
    ],
    "class weights, smoothed labels": [
        "mean with class weights",
        "mean with smoothed labels",
        "smoothed labels and class weights",
    ],
    "a loss over all elements: mse, bce, l1, a mean": [
        "multi-label classification",
        "regression",
        "mse",
        "l1",
        "huber",
        "bce",
        "mean of means of samples",
        "probabilities as targets",
    ],
    "a sum that is divided by a tensor, `(losses * mask).sum() / mask.sum()`": [
        "mean of a mask",
        "sum divided by a count",
        "mean of a mask that may be empty",
        "mean of what is not filled",
        "mean of what is set to zero",
        "mean over channels",
        "mean with weights of samples",
    ],
    "a sum that is divided by a number, `losses.sum() / len(losses)`": [
        "sum divided by the samples",
        "sum divided by a number of labels",
        "kl divergence",
    ],
    'a sum, `reduction="sum"`': ["sum over labels"],
    "several terms, as in question answering": ["several means", "question answering"],
    "a criterion that returns `(sum, count)`": ["sum and count"],
    "no label on a microbatch or a replica": ["mean of a mask", "mean with class weights", "mean over labels"],
}
REFUSED_ROWS = {
    "a sum that is divided by a tensor, `(losses * mask).sum() / mask.sum()`": "a sum by a tensor",
    "means of single samples that are added": "means of samples",
    "products of all samples with each other: a contrastive loss, as of CLIP": "a contrastive loss",
    "a sum that is divided by a number, `losses.sum() / len(losses)`": "a sum by a constant",
    "several terms, as in question answering": "a mean times its labels",
    "a router's loss beside that of the labels (`output_router_logits=True`)": "a router's loss",
    "a loss that adds another function of the batch, a norm for example": "a norm",
    "a loss that adds what has no gradient": "what has no gradient",
    "a sum times a number, which may be one over the count": "a sum times a number",
    "losses that are multiplied or divided, maybe by their count, before they are added": "a sum of quotients",
    "terms that are means over different labels": "means over different labels",
    "a list of means, one for each sample": "one mean for each sample",
    "an output without a `.loss`, and no criterion": "no loss at all",
}
NO_LABEL = "no label on any replica"  # tested beside the keys of batches
OF_SIZE = "a mean times a whole number that is as large as every microbatch, `mean * len(labels)`"  # by its own test


def test_the_table_of_losses_has_no_row_without_a_test() -> None:
    table = {row.what for row in rows("docs/library.md", "What a loss counts")}
    assert table == ROWS.keys() | REFUSED_ROWS.keys() | {NO_LABEL, OF_SIZE}
    assert {name for names in ROWS.values() for name in names} == LOSSES.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("row", ROWS)
def test_every_loss_equals_plain_torchs_with_all_samples_in_one_batch(row: str, stage: int) -> None:
    for got in by_engines(stage):
        for name in ROWS[row]:
            assert_equal(name, got[name], by_torch(name), bound_of(name))


class Narrowed(TorchDispatchMode):
    """See whether torch runs an operation that has an fp64 tensor as input and an fp32 tensor as output."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        given, returned = ({x.dtype for x in tree_leaves(some) if isinstance(x, Tensor)} for some in (args, out))
        self.seen |= torch.float64 in given and torch.float32 in returned
        return out


def test_the_losses_with_a_wider_bound_are_those_that_do_not_stay_in_fp64() -> None:
    """The norms of T5 do not. On a CPU they round alike in every microbatch, so that only a GPU showed it."""
    narrowed = set()
    for name in LOSSES:
        with Narrowed() as mode:
            forward_by_torch(name)
        narrowed |= {name} if mode.seen else set()
    assert narrowed == FP32


def refusal(rank: int, world_size: int, raw: Raw, names: list[str]) -> dict[str, tuple[str, str]]:
    """Return what an evaluation and a step raise for each of these losses."""
    found = {}
    for name in names:
        one = made(name)
        engine = engine_of(rank, world_size, raw, one)
        batch = share_of(one.batch, rank, world_size)
        found[name] = message(engine.evaluate, [batch]), message(engine.train_step, batch)
        engine.mesh.close()
    return found


def message(act: Callable[[Any], Any], given: Any) -> str:
    try:
        return f"nothing, but returned {act(given)}"
    except parallel.ColonnadeError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("stage", [0, 3])
def test_a_loss_that_is_no_mean_over_labels_is_refused_by_name_on_every_rank(stage: int) -> None:
    """The words of the documentation are in the messages."""
    table = {row.what: row.answer for row in rows("docs/library.md", "What a loss counts")}
    documented = {name: table[row].split("`")[-2] for row, name in REFUSED_ROWS.items()}
    for found in run(refusal, 2, config_of(stage), list(REFUSED)):
        for name, (_, words) in REFUSED.items():
            for text in found[name]:
                assert words in text, name
                assert documented.get(name, "") in text, name
                assert text.startswith("ModelError: ")


def test_a_factor_that_may_be_the_number_of_samples_is_refused_unless_it_is_shown_to_be_a_constant() -> None:
    """Four microbatches of two samples: a mean times two may be a mean times the samples. Of three samples it may not.

    The mean of two terms is no such factor.
    """
    (row,) = (row for row in rows("docs/library.md", "What a loss counts") if row.what == OF_SIZE)
    words = row.answer.split("`")[1]
    losses: dict[str, Any] = dict(samples=mean_times_samples, twice=lambda o, y: 2 * cross_entropy(o, y))
    losses["of two"] = lambda o, y: (cross_entropy(o, y) + cross_entropy(-o, y)) / 2
    for name, loss in losses.items():
        for size in (2, 3):
            torch.manual_seed(5)
            one = tagger(loss)
            engine = engine_of(0, 1, config_of(0, micro_batch_size=size), one)
            wanted = loss(one.module(one.batch["input_ids"]), one.batch["labels"]).item()
            is_refused = name == "samples" or (name == "twice" and size == 2)
            if is_refused:
                for text in (message(engine.evaluate, [one.batch]), message(engine.train_step, one.batch)):
                    assert (words if size == 2 else "its constant factors differ") in text, name
            else:
                found = engine.evaluate([one.batch]), engine.train_step(one.batch).loss
                assert found == pytest.approx((wanted, wanted), rel=1e-10), name
            engine.mesh.close()


def test_one_microbatch_alone_is_trained_on_with_any_loss() -> None:
    """It is the whole batch: there is nothing to weigh it against."""
    raw = config_of(0, micro_batch_size=8, global_batch_size=8)
    for name, got in run(by_engine, 1, raw, ["a norm", "means over different labels"])[0].items():
        assert_equal(name, got, by_torch(name), 1e-10)
    for text in run(refusal, 1, raw, ["no loss at all"])[0]["no loss at all"]:
        assert "Pass a criterion" in text


def test_half_precision_is_as_near_as_with_all_samples_in_one_batch() -> None:
    """Sums of microbatches are rounded once more each; the roundings within the model are the same, and larger."""
    whole = dict(micro_batch_size=8, global_batch_size=8)
    for precision, bound in (("fp32", 2e-6), ("bf16", 2e-2)):
        want = run(in_a_precision, 1, precision, whole)[0]
        for got in run(in_a_precision, 2, precision, {}):
            for name in SOME:
                exact, near, own = by_torch(name), want[name], got[name]
                assert not isinstance(near, str)
                assert not isinstance(own, str)
                assert own[:2] == pytest.approx(exact[:2], rel=bound), name
                errors = [relative(update(name, x[2]), update(name, exact[2])) for x in (own, near)]
                assert errors[0] <= 1.5 * errors[1], name


@pytest.mark.slow
def test_compiled_layers_count_the_same_labels() -> None:
    for got in run(in_a_precision, 1, "fp32", dict(compile=True), timeout=LIMIT * 3):
        for name in SOME:
            assert_equal(name, got[name], by_torch(name), 2e-6)


SOME = ["a subclass with any name", "seq2seq (Bart)", "mean with class weights"]


def in_a_precision(rank: int, world_size: int, precision: str, train: dict[str, Any]) -> dict[str, Result | str]:
    raw = config_of(3 * (world_size > 1), precision=precision, **train)
    return by_engine(rank, world_size, raw, SOME)


@pytest.mark.parametrize("kind", ["none", "full", "offload"])
def test_recomputed_layers_count_no_label_twice(kind: str) -> None:
    for got in run(in_a_precision, 2, "fp64", dict(activation_checkpointing=kind)):
        for name in SOME:
            assert_equal(name, got[name], by_torch(name), bound_of(name))
