"""Everything in a batch is used or refused by name; positions are as in Hugging Face's OPT, in every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding, BertForSequenceClassification, OPTForCausalLM

from parallel.errors import DataError
from tests import test_any_loss
from tests.harness import run
from tests.losses import Loss, bert, language, opt, tags
from tests.parity import SHAPE, Batch, Raw, batches_of, compare, config_of, engine_of, reference, save_model, train
from tests.tables import rows


def packed(batch: Batch) -> Batch:
    """Return the batch with several documents in each sample, padding at the end of some, and labels within documents.

    Positions begin anew at each document, and go on with -1 at padding, as Hugging Face's own do.
    """
    ids = batch["input_ids"]
    rows, columns = torch.meshgrid(torch.arange(len(ids)), torch.arange(ids.shape[1]), indexing="ij")
    start = 1 + rows % (ids.shape[1] - 2)
    mask = ((columns < ids.shape[1] - 1) | (rows % 4 != 0)).long()
    positions = torch.where(columns < start, columns, columns - start).masked_fill(mask == 0, -1)
    labels = ids.masked_fill((positions == 0) | (mask == 0), -100)
    return dict(input_ids=ids, labels=labels, attention_mask=mask, position_ids=positions)


LAYOUTS: dict[str, tuple[int, Raw]] = {
    "one rank": (1, {}),
    "1d, data": (4, dict(tensor=dict(mode="1d", size=2))),
    "2d": (4, dict(tensor=dict(mode="2d", size=4))),
    "2.5d": (4, dict(tensor=dict(mode="2.5d", size=4))),
    "ring": (3, dict(context=3)),
    "all_to_all, pipeline": (4, dict(pipeline=2, context=dict(size=2, kind="all_to_all"))),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("positions"), **SHAPE)


@pytest.mark.parametrize(("layout", "stage"), [(name, 3 * (name in ("1d, data", "ring"))) for name in LAYOUTS])
def test_positions_of_a_batch_are_those_of_hugging_faces_opt(layout: str, stage: int, folder: Path) -> None:
    """fp64: the bound is that of the parity tests."""
    ranks, section = LAYOUTS[layout]
    train_section = dict(steps=2, micro_batch_size=3 if layout == "1d, data" else 4)
    model = dict(path=str(folder), dropout=0.0)
    raw = config_of(section, model=model, zero=dict(stage=stage), train=train_section)
    batches = [packed(batch) for batch in batches_of(2)]
    got = run(train, ranks, raw, batches)[0]
    assert got is not None
    compare(got, reference(folder, raw, batches), 1e-9, is_fp64=True)


def losses_with(rank: int, world_size: int, folder: Path, batches: list[dict[str, Any]]) -> list[float]:
    engine = engine_of(rank, world_size, config_of({}, model=dict(path=str(folder), dropout=0.0)))
    return [engine.evaluate([batch]) for batch in batches]


def test_a_value_of_none_is_the_same_as_no_key(folder: Path) -> None:
    """Positions, in contrast, matter: without them the loss of packed documents is another one."""
    batch = packed(batches_of(1)[0])
    nothing: dict[str, Any] = dict.fromkeys(("attention_mask", "position_ids", "labels", "sample_ids"))
    ids = dict(input_ids=batch["input_ids"])
    without, absent, given, left_out = run(
        losses_with, 1, folder, [ids, nothing | ids, batch, {k: x for k, x in batch.items() if k != "position_ids"}]
    )[0]
    assert without == absent
    assert abs(given - left_out) > 1e-3


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)


def losses_or_errors(rank: int, world_size: int, folder: Path, batches: list[Batch]) -> list[float | str]:
    engine = engine_of(rank, world_size, config_of({}, model=dict(path=str(folder), dropout=0.0)))
    found: list[float | str] = []
    for batch in batches:
        try:
            found.append(engine.evaluate([batch]))
        except (DataError, NotImplementedError) as error:
            found.append(str(error))
    return found


def test_integers_of_any_dtype_are_those_of_int64(folder: Path) -> None:
    """The label −100 was 156 in uint8, and was counted; wider unsigned integers ended in an error of torch."""
    batch = packed(batches_of(1)[0]) | dict(document_ids=torch.arange(6).expand(12, 6) // 3)
    unsigned = batch | dict(position_ids=batch["position_ids"].clamp_min(0))
    del batch["labels"], unsigned["labels"]  # the default is made of the tokens, in their dtype
    narrow = [{key: x.to(dtype) for key, x in unsigned.items()} for dtype in INTEGERS]
    found = run(losses_or_errors, 1, folder, [unsigned, *narrow])[0]
    assert found == [found[0]] * len(found)


IDS = torch.arange(24).reshape(4, 6)
SPLIT_MODEL: dict[str, tuple[Any, str]] = {
    "a misspelt key": (dict(attention_masks=IDS * 0), "batch: 'attention_masks' is no key of a batch."),
    "the nearest key": (dict(label=IDS), "Did you mean 'labels'?"),
    "a key that is like no other": (dict(zzz=IDS), "Known: input_ids, labels, attention_mask, position_ids"),
    "positions of one sample": (dict(position_ids=IDS[:1]), "position_ids: wanted integers [4, 6], got torch.int64 [1"),
    "a position too large": (dict(position_ids=IDS), "position_ids: 16 is outside -1 … 15"),
    "a position too small": (dict(position_ids=IDS * 0 - 2), "position_ids: -2 is outside -1 … 15"),
    "a list": (dict(labels=IDS.tolist()), "labels: wanted integers [4, 6], got list"),
    "numbers of documents that fall": (dict(document_ids=IDS.flip(1)), "document_ids: 4 comes after 5 in sample 0."),
    "numbers of documents as a mask": (
        dict(attention_mask=IDS % 3),
        "nor 0, padding. The numbers of packed documents are",
    ),
}


def refused_by_the_split_model(rank: int, world_size: int) -> dict[str, str]:
    engine = engine_of(rank, world_size, config_of({}, model=SHAPE))
    found = {
        name: test_any_loss.message(engine.train_step, dict(input_ids=IDS) | extra)
        for name, (extra, _) in SPLIT_MODEL.items()
    }
    return found | {"a tensor": test_any_loss.message(engine.train_step, IDS)}


def test_a_split_model_refuses_what_it_would_not_use() -> None:
    found = run(refused_by_the_split_model, 1)[0]
    assert "batch: wanted a dict of tensors with the key 'input_ids', got Tensor." in found.pop("a tensor")
    for name, text in found.items():
        assert text.startswith("DataError: "), name
        assert SPLIT_MODEL[name][1] in text, name


# -- a module of the user's own


class Anything(nn.Module):
    """A module whose forward takes keyword arguments of any name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = opt(OPTForCausalLM)

    def forward(self, input_ids: Tensor, **others: Any) -> Any:
        return self.inner(input_ids=input_ids, labels=others["labels"], attention_mask=others["attention_masks"])


def classifier() -> Loss:
    return Loss(bert(BertForSequenceClassification), {})


def taught() -> Loss:
    return test_any_loss.made("mean over labels")


ROWS = torch.arange(8)
MODULE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a misspelt key": (
        lambda: Loss(opt(OPTForCausalLM), {}),
        language() | dict(attention_masks=language()["labels"]),
        "batch: The model's forward does not take 'attention_masks'. Did you mean 'attention_mask'?",
    ),
    "label for labels": (classifier, dict(input_ids=language()["input_ids"], label=ROWS % 2), "Did you mean 'labels'?"),
    "a key beside a criterion's": (taught, tags() | dict(weights=ROWS), "does not take 'weights'"),
    "neither labels nor ids": (taught, dict(pixels=ROWS), "it has neither 'labels' nor 'input_ids', but pixels."),
    "a count of the caller's": (classifier, language() | dict(num_items_in_batch=3), "'num_items_in_batch' is counted"),
    "a list of numbers": (classifier, language() | dict(labels=[1] * 8), "'labels' holds int, which cannot be cut"),
    "rows that are no samples": (
        classifier,
        language() | dict(position_ids=torch.arange(6)[None]),
        "'position_ids' has 1 rows, and the batch has 8 samples",
    ),
    "a nested tensor": (
        classifier,
        dict(labels=ROWS, input_ids=torch.nested.nested_tensor([ROWS, ROWS[:3]])),
        "'input_ids' is a nested tensor",
    ),
    "no sample": (classifier, dict(input_ids=IDS[:0]), "it has no samples, but input_ids"),
    "a pair": (taught, (IDS, IDS), "batch: wanted a dict of tensors, got tuple."),  # type: ignore[dict-item]
    "no loss": (lambda: Loss(taught().module, {}), dict(input_ids=IDS), "got NoneType. Pass a criterion."),
    "no label that counts": (taught, tags() | dict(labels=tags()["labels"] * 0 - 100), "no label to learn from"),
}


def refused_by_a_module(rank: int, world_size: int) -> dict[str, tuple[str, str]]:
    """Return what is raised for each of these batches, which rank 1 alone is given."""
    found = {}
    for name, (make, batch, _) in MODULE.items():
        one = make()
        engine = test_any_loss.engine_of(rank, world_size, test_any_loss.config_of(0), one)
        found[name] = test_any_loss.message(engine.train_step, batch), test_any_loss.message(engine.evaluate, [batch])
        engine.mesh.close()
    return found


def test_a_module_is_given_no_batch_that_it_would_not_use() -> None:
    for found in run(refused_by_a_module, 2):
        for name, (stepped, evaluated) in found.items():
            assert MODULE[name][2] in stepped, name
            assert MODULE[name][2] in evaluated or name == "no label that counts", name


def used_by_a_module(rank: int, world_size: int) -> list[float]:
    """Return the loss of a batch in several forms, which all hold the same."""
    batch = language()
    mask = torch.ones_like(batch["input_ids"])
    mask[2:, 3:] = 0
    found = []
    forms: list[tuple[nn.Module, Any]] = [
        (opt(OPTForCausalLM), batch | dict(attention_mask=mask)),
        (opt(OPTForCausalLM), BatchEncoding(batch | dict(attention_mask=mask))),
        (opt(OPTForCausalLM), batch | dict(attention_mask=mask, position_ids=None, use_cache=False)),
        (Anything(), batch | dict(attention_masks=mask)),
    ]
    for module, form in forms:
        state = test_any_loss.made("a language model that shifts its labels").module.state_dict()
        getattr(module, "inner", module).load_state_dict(state)
        engine = test_any_loss.engine_of(rank, world_size, test_any_loss.config_of(0), Loss(module, {}))
        found.append(engine.evaluate([form]))
        with torch.inference_mode():
            found.append(engine.evaluate([{key: x.clone() for key, x in form.items() if isinstance(x, Tensor)}]))
        engine.mesh.close()
    return found


def test_forms_of_one_batch_have_one_loss() -> None:
    """The loss in torch's inference mode is the same, too."""
    first, *others = run(used_by_a_module, 1)[0]
    assert others == [first] * 7


def documented(heading: str) -> dict[str, str]:
    return {row.what: row.answer for row in rows("docs/library.md", heading)}


HOLDS = {  # rows of the documentation's table with a refusal, and the case above that shows it
    "a key that the forward does not take": "a misspelt key",
    "a tensor with another number of rows": "rows that are no samples",
    "numbers in a list": "a list of numbers",
    "a nested tensor": "a nested tensor",
    "`num_items_in_batch`": "a count of the caller's",
    "no sample": "no sample",
    "a tuple": "a pair",
}
USED = {  # the other rows: tested by `test_forms_of_one_batch_have_one_loss`, and by the losses of test_any_loss.py
    "`labels`",
    "labels under the forward's own names, `start_positions` for example",
    "a forward with `**kwargs`",
    "None, a number, a bool or a text",
    "tensors in lists and dicts, a BatchEncoding",
    "a number of samples that is no multiple of `train.micro_batch_size`",
}
KEYS_REFUSED = {
    "`attention_mask`": "numbers of documents as a mask",
    "positions outside of the model's table": "a position too large",
    "another key": "the nearest key",
    "a list in place of a tensor": "a list",
    "documents whose numbers fall along a sample": "numbers of documents that fall",
}
KEYS_REFUSED_IN_A_RING = {"documents where a ring splits sequences"}  # tested in tests/test_documents.py
KEYS_USED = {
    "`input_ids` [samples, sequence]",
    "`labels`",
    "`position_ids`",
    "`document_ids`",
    "`sample_ids` [samples]",
    "a value of None",
}


def test_the_tables_of_batches_have_no_row_without_a_test() -> None:
    """The words that a row quotes are in the message of its case."""
    table = documented("What a batch holds")
    assert table.keys() == HOLDS.keys() | USED
    found = run(refused_by_a_module, 1)[0]
    for row, case in HOLDS.items():
        assert table[row].split("`")[1] in found[case][0], row
    table, refusals = documented("Keys of a batch"), run(refused_by_the_split_model, 1)[0]
    assert table.keys() == KEYS_REFUSED.keys() | KEYS_USED | KEYS_REFUSED_IN_A_RING
    for row, case in KEYS_REFUSED.items():
        assert table[row].split("`")[1] in refusals[case], row
