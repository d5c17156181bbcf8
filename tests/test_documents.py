"""Packed documents: each is trained on as if it were alone, in every layout, and its labels are its own tokens."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend

from models.data import packed as packing
from models.data.corpus import load_tokens
from models.data.documents import DocumentRow
from models.data.packed import PackedRow, pack_documents
from models.data.samples import TokenRow
from parallel.config import parse
from parallel.errors import ConfigError, DataError
from parallel.pipeline.microbatch import Limits, batch_problem, labels_of
from parallel.sequence import UNSPLIT, AttentionDropout, Documents, Masking, kernels, whole
from tests.chat_templates import EOS, save_tokenizer
from tests.families import MISTRAL, saved
from tests.harness import run
from tests.parity import (
    SHAPE,
    Batch,
    Raw,
    Trace,
    batches_of,
    compare,
    config_of,
    engine_of,
    reference,
    relative,
    train,
)
from tests.tables import rows
from training import preflight

S = 10
BOUND = 1e-9  # in fp64, that of the parity tests


def ends_of(sample: int) -> list[int]:
    """Return where the documents of a sample end: some samples have one, some a document of a single token."""
    return [[S], [4, S], [1, 2, 7, S], [3, 5, 6, S], [9, S]][sample % 5]


def packed(batch: Batch, *, padded: bool = False) -> Batch:
    """Return the batch with documents. Their first tokens are no labels, which is so by default.

    The numbers of documents need neither begin at 0 nor be consecutive. `padded`: the first document of some samples is
    padded at its beginning, and the last document of others at its end.
    """
    ids, mask = batch["input_ids"].clone(), torch.ones_like(batch["input_ids"])
    numbers, labels = torch.empty_like(ids), ids.clone()
    for sample in range(len(ids)):
        start = 0
        for place, end in enumerate(ends_of(sample)):
            numbers[sample, start:end] = 3 * place + sample - 2
            labels[sample, start] = -100
            if padded and sample % 3 == 0 and start == 0 and end > 3:
                mask[sample, :2] = 0
            if padded and sample % 3 == 1 and end == S and end - start > 2:
                mask[sample, -1] = 0
            start = end
    labels = labels.masked_fill(mask == 0, -100)
    mask_of = dict(attention_mask=mask) if padded else {}
    return dict(input_ids=ids.masked_fill(mask == 0, 1), labels=labels, document_ids=numbers, **mask_of)


def loss_of_documents(model: Any, batch: Batch) -> Tensor:
    """Return the mean loss over all labels, with every document given to Hugging Face's model by itself."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for sample in range(len(batch["input_ids"])):
        start = 0
        for end in ends_of(sample):
            ids, labels = (batch[key][sample : sample + 1, start:end] for key in ("input_ids", "labels"))
            mask = batch["attention_mask"][sample : sample + 1, start:end] if "attention_mask" in batch else None
            logits = model(ids, attention_mask=mask).logits
            total = total + F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum")
            count += int((labels[0, 1:] != -100).sum())
            start = end
    return total / count


A2A2 = dict(size=2, kind="all_to_all")
LAYOUTS: dict[str, tuple[int, Raw]] = {
    "single": (1, {}),
    "1d2": (2, dict(tensor=dict(mode="1d", size=2))),
    "2d4": (4, dict(tensor=dict(mode="2d", size=4))),
    "2.5d8": (8, dict(tensor=dict(mode="2.5d", size=8, depth=2))),
    "3d8": (8, dict(tensor=dict(mode="3d", size=8))),
    "pp2": (2, dict(pipeline=2)),
    "dp2": (2, {}),
    "a2a2": (2, dict(context=A2A2)),
    "dp2-pp2-a2a2": (8, dict(pipeline=2, context=A2A2)),
}
USUAL = {("pp2", "opt", True), ("1d2", "mistral", True), ("2d4", "gpt2", False), ("a2a2", "llama", False)}
FAMILIES = ("opt", "llama", "mistral", "qwen3", "gpt2")
EVERY = [(layout, family, padded) for layout in LAYOUTS for family in FAMILIES for padded in (False, True)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents")


def raw_of(parallel: Raw, model: Raw, **more: Any) -> Raw:
    return config_of(parallel, steps=2, model=model, data=dict(sequence_length=S), **more)


def trained(layout: str, raw: Raw, batches: list[Batch]) -> Trace:
    trace = run(train, LAYOUTS[layout][0], raw, batches)[0]
    assert trace is not None
    return trace


@pytest.mark.parametrize(
    ("layout", "family", "padded"),
    [pytest.param(*case, marks=[] if case in USUAL else pytest.mark.slow) for case in EVERY],
)
def test_packed_documents_are_trained_on_as_each_by_itself(
    layout: str, family: str, padded: bool, folder: Path
) -> None:
    """The reference has no mask of documents and no positions: Hugging Face's model is given one document at a time."""
    path = saved(folder, family)
    more: Raw = dict(train=dict(micro_batch_size=3), zero=dict(stage=3)) if layout.startswith("dp2") else {}
    raw = raw_of(LAYOUTS[layout][1], dict(path=str(path)), **more)
    batches = [packed(batch, padded=padded) for batch in batches_of(2, sequence=S)]
    compare(trained(layout, raw, batches), reference(path, raw, batches, loss_of_documents), BOUND, is_fp64=True)


# -- dropout, recomputation, compiled code


DROPPED: dict[str, Raw] = {
    "opt": SHAPE | dict(name="opt-tiny", dropout=0.25, attention_dropout=0.25, init_std=0.3),
    "mistral": MISTRAL | dict(name="mistral-7b", attention_dropout=0.25, num_key_value_heads=6, initializer_range=0.3),
}


@pytest.mark.parametrize(
    ("layout", "family"),
    [
        ("a2a2", "mistral"),
        *(pytest.param(layout, "opt", marks=pytest.mark.slow) for layout in ("2.5d8", "dp2-pp2-a2a2")),
    ],
)
def test_dropout_within_documents_is_that_of_a_single_rank(layout: str, family: str) -> None:
    """Blocks are recomputed, too. The bounds are those of the drawn layouts, in tests/test_property.py."""
    batches = [packed(batch, padded=True) for batch in batches_of(2, sequence=S)]
    train_section = dict(activation_checkpointing="full", micro_batch_size=3 if layout.startswith("dp2") else 4)
    more = dict(train=train_section, optimizer=dict(eps=1e-3))
    raw, single = (raw_of(LAYOUTS[name][1], DROPPED[family], **more) for name in (layout, "single"))
    compare(trained(layout, raw, batches), trained("single", single, batches), 1e-12, is_fp64=False)


def compiles_or_skips() -> None:
    try:
        preflight.check_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("family", DROPPED)
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("layout", ["single", "a2a2"])
def test_compiled_code_stays_within_documents(layout: str, family: str, drops: bool) -> None:
    """Compiled code sums in another order. The numbers of documents and their lengths differ from batch to batch."""
    compiles_or_skips()
    batches = [packed(batch) for batch in batches_of(2, sequence=S)]
    batches[1]["document_ids"] = torch.arange(S).expand(12, S) // 4
    model = DROPPED[family] | ({} if drops else {key: 0.0 for key in DROPPED[family] if key.endswith("dropout")})
    more = dict(optimizer=dict(eps=1e-3))
    got, want = (
        trained(layout, raw_of(LAYOUTS[layout][1], model, train=dict(compile=on), **more), batches)
        for on in (True, False)
    )
    compare(got, want, 1e-12, is_fp64=False)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_in_bf16_on_a_gpu_stay_within_documents(compiled: bool) -> None:
    """Flash attends there. Losses are those of fp64 within bf16's rounding, which is far below what a mask changes."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    batches = [packed(batch) for batch in batches_of(2, sequence=S)]
    batches[1]["document_ids"] = torch.arange(S).expand(12, S) // 4
    model = SHAPE | dict(name="opt-tiny", hidden_size=64, num_attention_heads=4, init_std=0.3)
    raw = {
        precision: raw_of({}, model, train=dict(precision=precision, compile=compiled and precision == "bf16"))
        for precision in ("bf16", "fp64")
    }
    got, want = (trained("single", raw[precision], batches).losses for precision in ("bf16", "fp64"))
    plain = [{key: x for key, x in batch.items() if key != "document_ids"} for batch in batches]
    other = trained("single", raw["fp64"], plain).losses
    for ours, exact, without in zip(got, want, other, strict=True):
        assert abs(ours - exact) < 0.01 * exact
        assert abs(ours - exact) < 0.2 * abs(without - exact)


def test_samples_of_one_document_are_as_without_documents() -> None:
    """A microbatch in which no sample has two documents, beside one in which some have, needs no mask."""
    batches = batches_of(2, sequence=S)
    raw = raw_of({}, DROPPED["opt"])
    numbered = [batch | dict(document_ids=torch.arange(12).unsqueeze(1).expand(12, S)) for batch in batches]
    got, want = trained("single", raw, numbered), trained("single", raw, batches)
    assert got.losses == want.losses


# -- attention, as its formula says ------------------------------------------------------------------------------------


def documents_of(samples: int) -> Documents:
    ids = [[sum(column >= end for end in ends_of(sample)) for column in range(S)] for sample in range(samples)]
    return Documents.of(torch.tensor(ids))


def test_documents_are_read_as_their_docstring_says() -> None:
    found = Documents.of(torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]]))
    assert found.positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert found.bounds.tolist() == [[0, 3, 4], [4, 8, 8]]
    assert found.longest == 4
    assert found.cumulative().tolist() == [0, 3, 4, 4, 8, 8]
    assert found.split(1)[1].cumulative().tolist() == [0, 4, 4]  # of a microbatch, from its own first token
    assert not found.is_one_per_sample
    assert Documents.of(torch.tensor([[3, 3], [5, 5]])).is_one_per_sample


def formula(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attend within each document by itself, as the formula says: q[B, heads, S, D] -> y[B, S, heads · D]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    samples = []
    for sample in range(len(q)):
        parts = []
        for start, end in pairwise([0, *ends_of(sample)]):
            queries, keys, values = (x[sample, :, start:end] for x in (q, k, v))
            seen = torch.ones(end - start, end - start, dtype=torch.bool).tril().triu(1 - (window or S))
            scores = (queries @ keys.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
            parts.append(scores.softmax(-1) @ values)
        samples.append(torch.cat(parts, 1))
    return torch.stack(samples).transpose(1, 2).flatten(2)


HEADS = {"whole": (4, 4), "grouped": (4, 2)}


def drawn(heads: tuple[int, int], dtype: torch.dtype = torch.float64, size: int = 8) -> tuple[Tensor, ...]:
    """Return q, k, v [B, heads or kv_heads, S, D], in memory as a linear leaves them, and dy [B, S, heads · D]."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(5, S, n, size, generator=generator, dtype=dtype) for n in (*heads, heads[1], heads[0]))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dy.flatten(2)


def with_gradients(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    *tensors, dy = inputs
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    y = attend(q, k, v)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]


NONE_DROPPED = AttentionDropout(0.0, torch.tensor(1), torch.arange(20).reshape(5, 4))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("kernel", ["torch's", "unfused"])
def test_attention_stays_within_documents(heads: str, window: int | None, kernel: str) -> None:
    """Each number is a sum of a few products in fp64: 1e-13 is far above rounding."""
    masking = Masking(None, NONE_DROPPED if kernel == "unfused" else None, window, documents_of(5))
    inputs = drawn(HEADS[heads])
    found = with_gradients(lambda q, k, v: UNSPLIT.attend(q, k, v, masking), inputs)
    for got, want in zip(found, with_gradients(lambda q, k, v: formula(q, k, v, window), inputs), strict=True):
        assert relative(got, want) < 1e-13


# -- flash with a sequence for each document: on a GPU by itself, on a CPU with torch's operators written out ----------


def flash_forward(q: Tensor, k: Tensor, v: Tensor, *sizes: Any, **limits: Any) -> tuple[Tensor, Tensor, None]:
    """Do as torch's `_flash_attention_forward` on sequences of several lengths: q[T, heads, D], k, v[T, groups, D]."""
    starts, of_keys, longest, longest_key, dropout_p, is_causal, debugs = sizes
    assert starts is of_keys
    assert starts.dtype == torch.int32
    assert starts.is_contiguous()
    assert (dropout_p, is_causal, debugs) == (0.0, True, False)
    left = limits.get("window_size_left")
    assert (starts[0], starts[-1]) == (0, len(q))
    assert (lengths := starts.diff()).min() >= 0
    assert longest == longest_key >= lengths.max()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    parts, sums = [], []
    for start, end in pairwise(starts.tolist()):
        queries, keys, values = (x[start:end].transpose(0, 1) for x in (q, k, v))
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if left is not None:
            seen = seen.triu(-left)
        scores = (queries @ keys.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ values).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    return torch.cat(parts), torch.cat(sums, 1), None


def flash_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any, **limits: Any) -> tuple[Tensor, ...]:
    """Do as torch's `_flash_attention_backward`."""
    y, logsumexp, *sizes, dropout_p, is_causal, _, _ = others
    with torch.enable_grad():
        tensors = [x.detach().requires_grad_() for x in (q, k, v)]
        again, sums, _ = flash_forward(*tensors, *sizes, dropout_p, is_causal, False, **limits)
        assert relative(y, again.detach()) < 1e-13
        assert relative(logsumexp, sums.detach()) < 1e-13
        return torch.autograd.grad(again, tensors, dy)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 2])
def test_flash_of_documents_equals_the_formula(heads: str, window: int | None) -> None:
    """The bound is rounding in fp64, and in bf16 on a GPU a few of its roundings, relative to a whole tensor."""
    masking, inputs = Masking(None, None, window, documents_of(5)), drawn(HEADS[heads])
    want = with_gradients(lambda q, k, v: formula(q, k, v, window), inputs)
    if torch.cuda.is_available():
        masking = replace(masking, documents=documents_of(5).apply(lambda x: x.cuda()))
        inputs = tuple(x.cuda().bfloat16() for x in inputs)
        assert kernels.needs_no_mask(inputs[0], masking)
        assert kernels.kernel_for(inputs[0], masking) is kernels.FLASH_OF_DOCUMENTS
        found, bound = with_gradients(lambda q, k, v: UNSPLIT.attend(q, k, v, masking), inputs), 2**-6
    else:
        with (
            patch.object(torch.ops.aten, "_flash_attention_forward", flash_forward),
            patch.object(torch.ops.aten, "_flash_attention_backward", flash_backward),
            patch.object(whole, "kernel_for", lambda *_, **__: kernels.FLASH_OF_DOCUMENTS),
        ):
            attend = lambda q, k, v: whole.whole_attention(q, k, v, masking).transpose(1, 2).flatten(2)  # noqa: E731
            found, bound = with_gradients(attend, inputs), 1e-13
    for got, wanted in zip(found, want, strict=True):
        assert relative(got.cpu(), wanted) < bound


def test_flash_takes_documents_in_half_precision_on_a_gpu_alone() -> None:
    class OnGpu(Tensor):
        is_cuda = True

    half = torch.empty(5, 4, S, 8, dtype=torch.bfloat16).as_subclass(OnGpu)
    documents = Masking(documents=documents_of(5))
    with patch.object(torch, "_fused_sdp_choice", lambda *_, **__: SDPBackend.CUDNN_ATTENTION.value):
        assert kernels.kernel_for(half, documents) is kernels.FLASH_OF_DOCUMENTS
        assert kernels.kernel_for(half, Masking()) is kernels.ON_GPU[SDPBackend.CUDNN_ATTENTION]
        padded = replace(documents, tokens=torch.ones(5, S, dtype=torch.bool))
        assert kernels.kernel_for(half, padded) is kernels.unfused(False)
    assert kernels.needs_no_mask(half, documents)
    assert not kernels.needs_no_mask(half, padded)
    assert not kernels.needs_no_mask(half.float(), documents)
    assert not kernels.needs_no_mask(torch.empty(5, 4, S, 8, dtype=torch.bfloat16), documents)


# -- refusals


def test_a_ring_refuses_documents_in_a_config() -> None:
    raw = dict(parallel=dict(context=2), data=dict(document_mask=True))
    with pytest.raises(ConfigError, match=r"data\.document_mask: parallel\.context of kind 'ring'.*kind='all_to_all'"):
        parse(raw)
    parse(raw | dict(parallel=dict(context=A2A2)))
    parse(raw | dict(parallel=dict(context=1)))


def refused(rank: int, world_size: int, parallel: Raw, batches: list[Batch]) -> list[str]:
    engine = engine_of(rank, world_size, raw_of(parallel, DROPPED["opt"]) | dict(data=dict(sequence_length=8)))
    found = []
    for batch in batches:
        with pytest.raises(DataError) as error:
            engine.train_step(batch)
        found.append(str(error.value))
    return found


def test_a_batch_with_documents_that_cannot_be_used_is_refused() -> None:
    batch = packed(batches_of(1, sequence=S)[0])
    numbers = batch["document_ids"]
    falling = numbers.clone()
    falling[7, 5] = -9
    wrong = [batch | dict(document_ids=x) for x in (falling, numbers[:, :-1], numbers.double())]
    falls, short, floats = run(refused, 1, {}, wrong)[0]
    assert "document_ids: -9 comes after 11 in sample 7. The numbers of a sample's documents never fall" in falls
    assert "document_ids: wanted integers [12, 10], got torch.int64 [12, 9]" in short
    assert "document_ids: wanted integers [12, 10], got torch.float64 [12, 10]" in floats
    for (in_ring,) in run(refused, 2, dict(context=2), [{key: x[:, :8] for key, x in batch.items()}]):
        assert "batch: document_ids: parallel.context of kind 'ring' does not keep" in in_ring


def test_by_default_the_first_token_of_a_document_is_no_label() -> None:
    batch = packed(batches_of(1, sequence=S)[0])
    first, *others = (labels_of({key: batch[key] for key in keys}) for keys in (batch, ("input_ids", "document_ids")))
    assert torch.equal(first[:, 1:], others[0][:, 1:])  # that of a sample's first token is never used
    assert torch.equal(labels_of(dict(input_ids=batch["input_ids"])), batch["input_ids"])


def test_labels_and_positions_are_those_of_hugging_faces_collator_of_packed_documents() -> None:
    from transformers import DataCollatorWithFlattening

    lengths = (3, 1, 4, 2)
    documents = [dict(input_ids=list(range(10 * i, 10 * i + length))) for i, length in enumerate(lengths)]
    want = DataCollatorWithFlattening(return_position_ids=True, return_tensors="pt")(documents)
    ids = torch.tensor([[i for i, length in enumerate(lengths) for _ in range(length)]])
    assert torch.equal(Documents.of(ids).positions, want["position_ids"])
    ours = labels_of(dict(input_ids=want["input_ids"], document_ids=ids))
    assert torch.equal(ours[:, 1:], want["labels"][:, 1:])  # shifting drops the label of the first column


# -- samples


def document_row(lengths: list[int]) -> DocumentRow:
    starts = np.concatenate(([0], np.cumsum(lengths)))
    return DocumentRow(np.arange(100, 100 + starts[-1]), starts.astype(np.int64))


@given(st.lists(st.integers(1, 9), min_size=1), st.integers(2, 12))
def test_samples_are_the_row_with_the_documents_of_its_tokens(lengths: list[int], length: int) -> None:
    """Each token is compared with a list of documents that is written down token by token."""
    number = [document for document, size in enumerate(lengths) for _ in range(size)]
    row = document_row(lengths)
    plain = TokenRow(row.tokens, length)
    packed_row = PackedRow(row, length, np.arange(plain.num_samples))
    assert (packed_row.num_samples, packed_row.num_tokens) == (plain.num_samples, len(number))
    for index in range(packed_row.num_samples):
        sample = packed_row.sample(index)
        assert np.array_equal(sample["input_ids"], plain.sample(index)["input_ids"])
        at = range(index * length, (index + 1) * length)
        is_first = [place == at.start or number[place] != number[place - 1] for place in at]
        assert sample["document_ids"].tolist() == [sum(is_first[: i + 1]) - 1 for i in range(length)]
        assert sample["labels"].tolist() == [
            -100 if first else 100 + place for place, first in zip(at, is_first, strict=True)
        ]
        tensors = {key: torch.from_numpy(x)[None] for key, x in sample.items()}
        assert batch_problem(tensors, 1, Limits(200, 12)) is None


@given(st.lists(st.sampled_from([1, 1, 1, 5]), min_size=1), st.integers(2, 4), st.integers(1, 9))
def test_every_packed_sample_has_a_label(lengths: list[int], length: int, at_once: int) -> None:
    """A run ended in the middle, at a step whose samples were nothing but tokens that end a document."""
    row = document_row(lengths)
    whole = PackedRow(row, length, np.arange(len(row.tokens) // length))
    kept = [i for i in range(whole.num_samples) if (whole.sample(i)["labels"] != -100).any()]
    assume(kept)
    with patch.object(packing, "AT_ONCE", at_once):
        samples, messages = pack_documents(row, length)
    assert samples.numbers.tolist() == kept
    left_out = f"{whole.num_samples - len(kept)} of {whole.num_samples} samples are left out"
    assert (left_out in " ".join(messages)) == (len(kept) < whole.num_samples)


def test_documents_of_a_single_token_are_refused() -> None:
    with pytest.raises(DataError, match=r"each document has a single token.*document_mask=False"):
        pack_documents(document_row([1] * 9), 4)


IDS = [5, 6, 3, 7, 8, 3, 9, 5, 6, 7, 3, 8, 9]  # 3 ends a document
NUMBERS, LABELS = (
    [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1]],
    [[-100, 6, 3, -100], [-100, 3, -100, 5], [-100, 7, 3, -100]],
)


def read(folder: Path, **data: Any) -> list[dict[str, list[int]]]:
    config = parse(dict(data=dict(sequence_length=4, document_mask=True, validation_fraction=0.0) | data)).data
    corpus = load_tokens(config, 300, ends=(3,))
    assert corpus.tokens.tolist()[: len(IDS)] == IDS or data["path"] != str(folder / "ids.npy")
    return [
        {key: x.tolist() for key, x in corpus.training.sample(i).items()} for i in range(corpus.training.num_samples)
    ]


def test_documents_of_a_config_are_those_of_its_data(tmp_path: Path) -> None:
    """Token ids have a document up to each end token, and texts are documents. A sample may begin in one's middle."""
    np.save(tmp_path / "ids.npy", np.array(IDS))
    np.array(IDS, np.uint16).tofile(tmp_path / "ids.bin")
    for name in ("ids.npy", "ids.bin"):
        samples = read(tmp_path, path=str(tmp_path / name))
        assert [sample["document_ids"] for sample in samples] == NUMBERS, name
        assert [sample["labels"] for sample in samples] == LABELS, name
    (tmp_path / "texts.jsonl").write_text('{"text": "abc"}\n{"text": "de"}\n{"text": "f"}\n')
    samples = read(tmp_path, path=str(tmp_path / "texts.jsonl"))  # the token between two texts belongs to the first
    assert [sample["document_ids"] for sample in samples] == [[0, 0, 0, 0], [0, 0, 0, 1]]
    for sample in read(tmp_path, path="python-docs"):
        assert set(sample["document_ids"]) == {0}
        break


def test_documents_without_a_token_that_ends_them_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array(IDS))
    data = parse(dict(data=dict(path=str(tmp_path / "ids.npy"), sequence_length=4, document_mask=True))).data
    with pytest.raises(DataError, match=r"data\.document_mask: no token is known that ends a document.*eos_token_id"):
        load_tokens(data, 300)
    assert any("all of it is one document" in line for line in load_tokens(data, 300, ends=(99,)).messages)


def messages_of_opt(folder: Path) -> str:
    """Return the messages about texts and a tokenizer that begins each with the token that ends one."""
    tokenizer = save_tokenizer(folder / "opt", None)
    content = json.loads((tokenizer / "tokenizer.json").read_bytes())
    content["post_processor"] = dict(
        type="TemplateProcessing",
        single=[dict(SpecialToken=dict(id="</s>", type_id=0)), dict(Sequence=dict(id="A", type_id=0))],
        pair=[],
        special_tokens={"</s>": dict(id="</s>", ids=[EOS], tokens=["</s>"])},
    )
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    (folder / "texts.jsonl").write_text('{"text": "he"}\n' * 9)
    data = dict(path=str(folder / "texts.jsonl"), tokenizer=str(tokenizer), sequence_length=4, document_mask=True)
    return " ".join(load_tokens(parse(dict(data=data)).data, 300).messages)


def test_an_end_token_that_begins_each_text_is_said_to_be_no_label(tmp_path: Path) -> None:
    """No text of OPT's tokenizer ends with a token of its own, and the first token of a document is never learned."""
    assert f"token {EOS}, which ends a text, is the first one of the next text" in messages_of_opt(tmp_path)
    texts = tmp_path / "texts.jsonl"
    data = parse(dict(data=dict(path=str(texts), sequence_length=4, document_mask=True))).data
    assert "is the first one" not in " ".join(load_tokens(data, 300).messages)


# -- the table in the documents


HELD: dict[str, str] = {  # by the first cell of a row, the test above that shows it
    "a document": "test_documents_of_a_config_are_those_of_its_data",
    "the token between two texts": "test_documents_of_a_config_are_those_of_its_data",
    "the first token of a document": "test_samples_are_the_row_with_the_documents_of_its_tokens",
    "a sample that begins in the middle of a document": "test_documents_of_a_config_are_those_of_its_data",
    "a sample that ends in the middle of a document": "test_documents_of_a_config_are_those_of_its_data",
    "learned and rotary positions, sliding windows, dropout, recomputation": (
        "test_dropout_within_documents_is_that_of_a_single_rank"
    ),
    "tensor modes, pipelines, ZeRO, offloading, `all_to_all`": (
        "test_packed_documents_are_trained_on_as_each_by_itself"
    ),
    "a ring, `parallel.context` of kind `ring`": "test_a_ring_refuses_documents_in_a_config",
    "token ids without a token that ends a document": ("test_documents_without_a_token_that_ends_them_are_refused"),
    "data of a single document": "test_documents_without_a_token_that_ends_them_are_refused",
    "a tokenizer that begins a text with its end token, as OPT's": (
        "test_an_end_token_that_begins_each_text_is_said_to_be_no_label"
    ),
    "a sample without a label, since each of its tokens is a document": "test_every_packed_sample_has_a_label",
    "documents of a single token alone": "test_documents_of_a_single_token_are_refused",
}


def test_each_row_of_the_documentation_has_a_test_and_its_words(tmp_path: Path) -> None:
    table = {row.what: row.answer for row in rows("docs/packed_documents.md", "Packed documents")}
    assert table.keys() == HELD.keys()
    assert all(name in globals() for name in HELD.values())
    np.save(tmp_path / "ids.npy", np.array(IDS))
    data = dict(path=str(tmp_path / "ids.npy"), sequence_length=4, document_mask=True)
    with pytest.raises(ConfigError) as in_ring:
        parse(dict(parallel=dict(context=2), data=data))
    with pytest.raises(DataError) as without_end:
        load_tokens(parse(dict(data=data)).data, 300)
    said = {
        "a ring, `parallel.context` of kind `ring`": str(in_ring.value),
        "token ids without a token that ends a document": str(without_end.value),
        "data of a single document": " ".join(load_tokens(parse(dict(data=data)).data, 300, ends=(99,)).messages),
        "a tokenizer that begins a text with its end token, as OPT's": messages_of_opt(tmp_path),
        "a sample without a label, since each of its tokens is a document": pack_documents(
            document_row([1, 1, 1, 5]), 2
        )[1][0],
    }
    for what, words in said.items():
        assert table[what].split("`")[1] in words, what
