"""docs/adding_a_model.md: what it quotes is in the files, and a family needs no more than a folder and an entry.

The family here is unlike the others: in a block, attention and the feed-forward stand side by side behind one norm, as
in GPT-J, its files have q, k and v in one tensor by heads, as GPT-NeoX's, and nothing says where a token is.
"""

import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from textwrap import indent
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from models.family import FAMILIES, Family
from models.shape import ModelShape
from models.shapes import from_hugging_face
from parallel.engine.context import Place
from parallel.tensor import Mode
from tests.harness import run
from tests.parity import relative
from tests.test_docs import ROOT, blocks
from training import metrics
from training.config import read_config
from training.preflight import prepare
from training.run import run_job

PAGE = ROOT / "docs/adding_a_model.md"

SHAPE = """\
from dataclasses import dataclass

from models.shape import Kept, ModelShape, Normal, Size, common_problems
from parallel.layout.sources import by_head, whole


@dataclass(frozen=True)
class ToyShape(ModelShape):
    model_type = "toy"
    architecture = "ToyForCausalLM"
    may_change = frozenset()
    base = "toy."
    blocks = "toy.blocks"
    embedding = "toy.embed.weight"

    vocab_size: Size = 37
    hidden_size: Size = 24
    num_hidden_layers: Size = 2
    num_attention_heads: Size = 4
    inner_size: Size = 36
    max_position_embeddings: Size = 16
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | None = 0

    def inner_widths(self):
        return {"inner_size": self.inner_size}

    def problems(self):
        return common_problems(self)

    def first_tensors(self):
        return {self.embedding: (self.vocab_size, self.hidden_size)}

    def block_tensors(self, layer):
        hidden, inner = self.hidden_size, self.inner_size
        attention = {"qkv.weight": (3 * hidden, hidden), "o.weight": (hidden, hidden)}
        return {"norm.weight": (hidden,), **attention, "up.weight": (inner, hidden), "down.weight": (hidden, inner)}

    def last_tensors(self):
        return {"toy.norm.weight": (self.hidden_size,)}

    def names(self):
        inner = {"norm": "norm", "attention.qkv": "qkv", "attention.out": "o"}
        feed_forward = {"feed_forward.up": "up", "feed_forward.down": "down"}
        return {"embed.table": "toy.embed", "head.norm": "toy.norm", "head.table": "lm_head", **inner, **feed_forward}

    def sources_of(self, names, shapes):
        (name,), (shape,) = names, shapes
        return by_head(name, shape, 3, self.num_attention_heads) if ".qkv." in name else whole(name, shape)

    def initial(self, name):
        return Normal(mean=1.0) if name.endswith("norm.weight") else Normal(std=0.1)

    def kept(self):
        return Kept(2 * self.hidden_size, 4 * self.hidden_size + 2 * self.inner_size + self.num_attention_heads, 1)


SIZES = {"toy-tiny": ToyShape()}
"""

LAYERS = """\
from torch import nn

from models.attention import Attention, AttentionOptions
from models.layer import Embed, FeedForward, Head, layers


class SideBySide(nn.Module):
    def __init__(self, shape, mode):
        super().__init__()
        hidden, inner = shape.hidden_size, shape.inner_size
        self.norm = norm_of(shape, mode)
        self.attention = Attention(shape, mode, AttentionOptions(bias=False, out_bias=False), seed=0)
        self.feed_forward = FeedForward(mode, hidden, inner, activation="silu", bias=False)

    def forward(self, x, batch):
        h = self.norm(x)
        return x + self.attention(h, batch) + self.feed_forward(h)


def layers_of(shape, mode, seed):
    return layers(
        shape,
        embed=lambda: Embed(shape, mode),
        block=lambda index: SideBySide(shape, mode),
        head=lambda: Head(shape, mode, norm=norm_of(shape, mode)),
    )


def norm_of(shape, mode):
    return mode.norm("rms_norm", shape.hidden_size, eps=1e-5)
"""

RUN = (
    *("model.name=toy-tiny", "data.sequence_length=6", "data.validation_fraction=0.2", "train.steps=4"),
    *("train.global_batch_size=8", "train.micro_batch_size=2", "train.precision=fp64", "optimizer.lr=0.01"),
    *("train.clip_grad_norm=0.5", "lr_scheduler.warmup_steps=2", "output.checkpoint_every=2"),
)
SPLIT = "parallel={'pipeline': 2, 'tensor': {'mode': '2d', 'size': 2, 'rows': 1}}"


@contextmanager
def registered(folder: Path) -> Iterator[None]:
    """Make the family one of those that the program has: its folder can be imported, and it has an entry."""
    with patch.object(sys, "path", [str(folder), *sys.path]), patch.dict(sys.modules):
        shape = import_module("toy.shape")
        with patch.dict(FAMILIES, toy=Family(shape.ToyShape, shape.SIZES, "toy.layers")):
            yield


def train(rank: int, world_size: int, folder: Path, name: str, changes: tuple[str, ...], resume: str | None) -> None:
    """Train a whole run of the command line on this rank, into a folder of this name."""
    place = Place(rank, world_size, rank, max(world_size, os.cpu_count() or 1))  # one thread: other tests run, too
    with registered(folder):
        settings = [*RUN, f"data.path={folder / 'tokens.npy'}", f"output.dir={folder / name}", *changes]
        run_job(prepare(read_config(None, settings, world_size), place, resume=resume))


def logits(weights: dict[str, Tensor], ids: Tensor, *, layers: int = 2, heads: int = 4) -> Tensor:
    """Return the toy model's logits, written down in plain torch: ids[B, S] -> [B, S, V]."""
    x = weights["toy.embed.weight"][ids]
    for layer in range(layers):
        w = {name: weights[f"toy.blocks.{layer}.{name}.weight"] for name in ("norm", "qkv", "o", "up", "down")}
        h = F.rms_norm(x, x.shape[-1:], w["norm"], 1e-5)
        q, k, v = (h @ w["qkv"].T).unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
        attention = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w["o"].T
        x = x + attention + F.silu(h @ w["up"].T) @ w["down"].T
    return F.rms_norm(x, x.shape[-1:], weights["toy.norm.weight"], 1e-5) @ weights["lm_head.weight"].T


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the family's package and a file of tokens."""
    (tmp_path / "toy").mkdir()
    for name, text in (("__init__", ""), ("shape", SHAPE), ("layers", LAYERS)):
        (tmp_path / "toy" / f"{name}.py").write_text(text, encoding="utf-8")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 37, 6 * 40).astype(np.int32))
    return tmp_path


def test_a_folder_and_an_entry_are_a_family(folder: Path) -> None:
    """It is drawn, trains in a pipeline of grids as in one process, saves, resumes in another layout and exports.

    Its loss is that of the model written down in plain torch. In fp64 runs differ by roundings of four steps.
    """
    train(0, 1, folder, "alone", (), None)
    run(train, 4, folder, "split", (SPLIT,), None)
    train(0, 1, folder, "resumed", (), str(folder / "split" / "checkpoints" / "step_000002"))
    want, *others = (
        load_file(folder / name / "export" / "model.safetensors") for name in ("alone", "split", "resumed")
    )
    for got in others:
        assert got.keys() == want.keys()
        assert max(relative(got[name], tensor) for name, tensor in want.items()) < 1e-9
    lines, split = (list(metrics.read(folder / name / "metrics.jsonl")) for name in ("alone", "split"))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in split] == pytest.approx([line[key] for line in lines], rel=1e-9)
    held_out = torch.from_numpy(np.load(folder / "tokens.npy")).long().view(40, 6)[-8:]
    loss = F.cross_entropy(logits(want, held_out)[:, :-1].flatten(0, 1), held_out[:, 1:].flatten())
    assert lines[-1]["validation_loss"] == pytest.approx(loss.item(), rel=1e-9)
    with registered(folder):
        assert from_hugging_face(folder / "alone" / "export").vocab_size == 37


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_code_of_the_page_is_that_of_the_files() -> None:
    files = sorted((ROOT / "models/gpt2").glob("*.py"))
    sources = [*(file.read_text(encoding="utf-8") for file in files), SHAPE, LAYERS]
    quoted = blocks(PAGE, "python")
    assert len(quoted) > 8
    for code in quoted:
        assert any(indent(code, space) in source for space in ("", "    ") for source in sources), code
    (entry,) = re.findall(r"`(.* Family\(.*)`", PAGE.read_text(encoding="utf-8"))
    assert f"    {entry}\n" in (ROOT / "models/family.py").read_text(encoding="utf-8")


SHARED_CHECKS = {"common_problems", "activation_problems"}


def test_the_table_of_the_page_has_all_that_a_shape_is_asked_for() -> None:
    table = PAGE.read_text(encoding="utf-8").split("What `ModelShape` asks")[1].split("GPT-2 has names")[0]
    named = set(re.findall(r"`(\w+)(?:\(\w*(?:, \w+)*\))?`", table))
    assert ModelShape.__abstractmethods__ | ModelShape.__annotations__.keys() <= named
    assert all(hasattr(ModelShape, name) for name in named - ModelShape.__annotations__.keys() - SHARED_CHECKS)


def test_the_vocabulary_of_the_page_is_that_of_a_mode() -> None:
    table = PAGE.read_text(encoding="utf-8").split("## The mode's vocabulary")[1]
    named = set(re.findall(r"`mode\.(\w+)\(", table))
    makes_layers = {name for name, made in vars(Mode).items() if "return" in getattr(made, "__annotations__", {})}
    assert named <= makes_layers
    assert {"norm", "head_norm", "linear_in", "linear_in_groups", "linear_out", "vocabulary", "lm_loss"} <= named


def test_the_page_counts_the_lines_of_the_family_that_is_unlike_the_others() -> None:
    counts = [sum(map(bool, text.splitlines())) for text in (SHAPE, LAYERS)]
    words = "took {} lines of shape, {} lines of layers and one entry".format(*counts)
    assert words in " ".join(PAGE.read_text(encoding="utf-8").split())
