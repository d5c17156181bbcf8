"""Imports go down only, folder by folder, and the check of `layering.py` would say so if they did not."""

import tomllib
from pathlib import Path

import pytest

from tests.layering import modules_under, violations

ROOT = Path(__file__).parent.parent


def test_imports_go_down_only() -> None:
    assert modules_under(ROOT), "found nothing to check"
    assert violations(ROOT) == []


def test_pyproject_lists_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    folders = {".".join(module.path.parent.parts) for module in modules_under(ROOT).values()} - {""}
    assert folders <= listed


BROKEN = {
    "an upward arrow": (
        {"parallel/mesh/mesh.py": "import parallel.engine.engine"},
        "on the floor of parallel.mesh.* imports parallel.engine.engine from that of parallel.engine.* above",
    ),
    "an upward arrow inside a function": (
        {"parallel/errors.py": "def f():\n    from models.shapes import SHAPES"},
        "parallel/errors.py:2: parallel.errors on the floor of parallel.errors imports models.shapes",
    ),
    "an upward arrow in a facade": (
        {"parallel/__init__.py": "from training.loop import fit"},
        "imports training.loop from that of training.* above",
    ),
    "an upward arrow, relative": (
        {"parallel/tensor/line.py": "from ..modules import flatten", "parallel/modules/flatten.py": ""},
        "imports parallel.modules.flatten from that of parallel.modules.* above",
    ),
    "an upward arrow by name": (
        {"parallel/layout/rng.py": "import importlib\nimportlib.import_module('launch')"},
        "parallel.layout.rng on the floor of parallel.layout.* imports launch",
    ),
    "a folder that imports its neighbour's user": (
        {"parallel/ops/products.py": "from parallel.sequence import ring", "parallel/sequence/ring.py": ""},
        "imports parallel.sequence.ring from that of parallel.sequence.* above",
    ),
    "a circle": (
        {
            "parallel/config/reader.py": "import parallel.config.sections",
            "parallel/config/sections.py": "from parallel.config import reader",
        },
        "circle: parallel.config.reader -> parallel.config.sections -> parallel.config.reader",
    ),
    "the facade from inside": ({"models/data.py": "from models import build"}, "the facade of its own package"),
    "an unknown module": ({"parallel/misc.py": ""}, "parallel/misc.py: no floor; give it a floor"),
    "an unknown folder": ({"parallel/misc/new.py": ""}, "parallel/misc/new.py: no floor; give it a floor"),
    "an import of an unknown module": ({"launch.py": "import parallel.misc"}, "give it a floor"),
    "torch in a pure module": (
        {"models/shapes.py": "from torch.nn import Module"},
        "imports torch, but is listed as pure",
    ),
    "torch in a pure module at second hand": (
        {"parallel/pipeline/schedule.py": "from parallel.mesh.mesh import Mesh"},
        "is listed as pure, but imports parallel.mesh.mesh",
    ),
    "pipeline importing tensor": (
        {"parallel/pipeline/stage.py": "import parallel.tensor.mode"},
        "must not know each other",
    ),
    "zero importing tensor": (
        {"parallel/zero/reducer.py": "from parallel.tensor import mode"},
        "must not know each other",
    ),
    "storage importing the mesh": (
        {"parallel/storage/disk.py": "from parallel.mesh import topology"},
        "must not know each other",
    ),
}

STRAY = {
    "import": "import torch.distributed",
    "import as": "import torch.distributed as dist",
    "import of what is in it": "import torch.distributed.nn",
    "from torch": "from torch import distributed",
    "from it": "from torch.distributed import all_reduce",
    "attribute": "import torch\nx = torch.distributed.get_rank()",
    "attribute of another name": "import torch as t\nt.distributed.get_rank()",
    "attribute by a submodule's import": "import torch.nn\ndef f(): return torch.distributed",
    "by name": "__import__('torch.distributed')",
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    return root


@pytest.mark.parametrize(("files", "complaint"), BROKEN.values(), ids=BROKEN)
def test_the_check_finds(files: dict[str, str], complaint: str, tmp_path: Path) -> None:
    found = violations(write(tmp_path, files))
    assert len(found) == 1, found
    assert complaint in found[0]


@pytest.mark.parametrize("source", STRAY.values(), ids=STRAY)
def test_the_check_finds_a_stray_torch_distributed(source: str, tmp_path: Path) -> None:
    found = violations(write(tmp_path, {"parallel/engine/engine.py": source}))
    assert found, "not noticed"
    assert all("says torch.distributed" in problem for problem in found)


def test_the_check_passes_a_house_in_order(tmp_path: Path) -> None:
    files = {
        "parallel/__init__.py": "from parallel.engine.engine import Engine\nfrom .mesh.mesh import Mesh",
        "parallel/errors.py": "",
        "parallel/config/parsing.py": "import dataclasses\nfrom ..errors import ConfigError",
        "parallel/mesh/process_groups.py": "import torch.distributed as dist",
        "parallel/mesh/mesh.py": "from parallel.mesh import process_groups, topology",
        "parallel/mesh/topology.py": "",
        "parallel/tensor/__init__.py": "from parallel.tensor.line import Line",
        "parallel/tensor/line.py": "import torch.nn.functional as F\nfrom . import mode",
        "parallel/tensor/mode.py": "from ..mesh.mesh import Axis",
        "parallel/engine/engine.py": "import torch\nfrom parallel.tensor import Line\ntorch.nn.distributed",
        "models/opt.py": "import parallel\nfrom models.shapes import SHAPES",
        "models/shapes.py": "from parallel.errors import ConfigError",
        "launch.py": "import models\nfrom training import loop",
        "training/loop.py": "def fit():\n    import models.data",
    }
    assert violations(write(tmp_path, files)) == []
