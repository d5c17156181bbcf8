"""Nothing from a file is ever unpickled or executed: by the source of every module, and by what a run does."""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import parallel
from models.generation.job import Request, continued
from parallel.config import parse
from parallel.engine.context import Place, make_context, use
from tests.layering import PACKAGES
from tests.test_loop import prepared
from tests.test_records import dataset_in, parquet_in
from training.export import export_checkpoint, find_saved_model
from training.run import run_job

ROOT = Path(__file__).parent.parent

UNPICKLERS = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
    "yaml",
}
"""Modules that make objects of any class from a file, or run its code."""

BETWEEN_RANKS = {"parallel/engine/agreed_batches.py", "parallel/engine/part_iterators.py"}
"""The modules that pickle what one rank of a run sends to another; they open no file."""

CALLS = {
    "torch.load": "it unpickles: use safetensors",
    "torch.jit.load": "it executes what it reads",
    "torch.export.load": "it executes what it reads",
    "torch.hub.load": "it executes what it reads",
    "np.load": "it may unpickle: use np.lib.format.open_memmap, which does not",
    "numpy.load": "it may unpickle: use np.lib.format.open_memmap, which does not",
    "np.loadtxt": "it may execute a converter",
    "pandas.read_pickle": "it unpickles",
    "pd.read_pickle": "it unpickles",
    "eval": "it executes what it reads",
}
KEYWORDS = {"trust_remote_code", "allow_pickle", "weights_only"}
"""Arguments that allow another library to execute or unpickle what it reads."""

EXECUTES = {"parallel/config/parsing.py"}
"""The one place where a file of Python is executed: a config that the user names."""


def found_in(source: str) -> list[str]:
    """Return what a module imports or calls that could make objects of what is in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {x.name}" for x in node.names if x.name.partition(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{x.name}" for x in node.names)]
            found += [f"from {name}" for name in names[:1] if name.partition(".")[0] in UNPICKLERS]
            found += [f"from {name}" for name in names[1:] if name in CALLS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [f"{name}(): {CALLS[name]}"] if name in CALLS else []
            found += ["exec()"] if name == "exec" else []
            found += [f"{name}({key.arg}=...)" for key in node.keywords if key.arg in KEYWORDS]
    return found


def test_no_module_can_unpickle_or_execute_a_file() -> None:
    found = {}
    for file in (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))):
        name, text = str(file.relative_to(ROOT)), file.read_text()
        own = [x for x in found_in(text) if not (x == "import pickle" and name in BETWEEN_RANKS)]
        found[name] = [x for x in own if not (x == "exec()" and name in EXECUTES)]
        if name in BETWEEN_RANKS:
            assert "open(" not in text
            assert "pickle.load(" not in text
    assert len(found) > 200
    assert {name: x for name, x in found.items() if x} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import dill.source",
        "from pickle import loads",
        "from torch import load",
        "torch.load(file, weights_only=True)",
        "np.load(file)",
        "eval(text)",
        "exec(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_check_of_the_source_finds(source: str) -> None:
    assert found_in(source)


class Watch:
    """Counts what this process unpickles while it is on. Python has no way to remove such a hook again."""

    def __init__(self) -> None:
        self.is_on, self.found = False, list[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_on and event == "pickle.find_class":
            self.found.append(f"{arguments}")

    @contextmanager
    def on(self) -> Iterator[None]:
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


def test_the_watch_notices_a_pickle(watch: Watch, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pt")
    with watch.on():
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert any("_rebuild_tensor_v2" in text for text in watch.found)
    watch.found.clear()


def test_a_run_from_data_to_texts_unpickles_nothing(watch: Watch, tmp_path: Path) -> None:
    """Records of each kind, weights and a tokenizer of a Hugging Face directory, resuming, an export, and texts."""
    options = ("train.steps=2", "output.checkpoint_every=1", "data.sequence_length=4", "data.validation_fraction=0")
    np.save(tmp_path / "ids.npy", np.arange(400, dtype=np.uint16) % 250)
    (np.arange(400, dtype="<u2") % 250).tofile(tmp_path / "ids.bin")
    run_job(prepared(tmp_path / "first", *options))  # whatever is imported with it
    kinds = [tmp_path / "ids.npy", tmp_path / "ids.bin", parquet_in(tmp_path / "a.parquet")]
    kinds += [dataset_in(tmp_path / "set")]
    with watch.on():
        for i, path in enumerate(kinds):
            run_job(prepared(tmp_path / f"run{i}", *options, f"data.path={path}"))
        started = (f"model.path={tmp_path}/first/export", f"data.tokenizer={tmp_path}/first/export")
        run_job(prepared(tmp_path / "run", *options, *started))
        run_job(prepared(tmp_path / "run", *options, *started, "train.steps=3", resume="auto"))
        export_checkpoint(find_saved_model(str(tmp_path / "run")), tmp_path / "hf")
        continued(Request(tmp_path / "run", ["a"]))
        continued(Request(tmp_path / "hf", ["a"]))
    assert watch.found == []


def test_an_engine_of_any_module_loads_and_exports_without_pickle(watch: Watch, tmp_path: Path) -> None:
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20,
                               max_position_embeddings=8, word_embed_proj_dim=8)
    )  # fmt: skip
    use(make_context(parse(dict(train=dict(device="cpu"))), Place()))
    engine, *_ = parallel.initialize(model)
    extra = dict(values=[torch.ones(2), np.ones(2), {1: (2, b"3")}, {4}])
    engine.save_checkpoint(tmp_path, extra)
    with watch.on():
        engine.load_checkpoint(tmp_path)
        engine.load_weights(tmp_path)
        engine.load_state_dict(engine.state_dict())
        engine.save_pretrained(tmp_path / "hf")
    assert watch.found == []
