"""Imports go down only, folder by folder; the check in `layering.py` finds each way of breaking that rule."""

from pathlib import Path

import pytest

from tests.layering import folder_measures, modules_under, violations

ROOT = Path(__file__).parent.parent


def test_imports_go_down_only() -> None:
    assert modules_under(ROOT), "found nothing to check"
    assert violations(ROOT) == []


BROKEN = {
    "an upward import": (
        {"parallel/mesh/mesh.py": "import parallel.engine.engine"},
        "in the layer parallel.mesh.* imports parallel.engine.engine from the layer parallel.engine.* above",
    ),
    "an upward import inside a function": (
        {"parallel/errors.py": "def f():\n    from models.shapes import SHAPES"},
        "parallel/errors.py:2: parallel.errors in the layer parallel.errors imports models.shapes",
    ),
    "an upward import in a facade": (
        {"parallel/__init__.py": "from training.loop import fit"},
        "imports training.loop from the layer training.* above",
    ),
    "an upward import, relative": (
        {"parallel/tensor/line.py": "from ..modules import flatten", "parallel/modules/flatten.py": ""},
        "imports parallel.modules.flatten from the layer parallel.modules.* above",
    ),
    "an upward import by name": (
        {"parallel/layout/rng.py": "import importlib\nimportlib.import_module('launch')"},
        "parallel.layout.rng in the layer parallel.layout.* imports launch",
    ),
    "a folder that imports the folder above it": (
        {"parallel/ops/products.py": "from parallel.sequence import ring", "parallel/sequence/ring.py": ""},
        "imports parallel.sequence.ring from the layer parallel.sequence.* above",
    ),
    "a circle": (
        {
            "parallel/config/reader.py": "import parallel.config.sections",
            "parallel/config/sections.py": "from parallel.config import reader",
        },
        "circle: parallel.config.reader -> parallel.config.sections -> parallel.config.reader",
    ),
    "its own package": (
        {"models/data.py": "from models import build"},
        "imports the __init__.py of its own package",
    ),
    "an unknown module": ({"parallel/misc.py": ""}, "parallel/misc.py: no layer; give it a layer"),
    "an unknown folder": ({"parallel/misc/new.py": ""}, "parallel/misc/new.py: no layer; give it a layer"),
    "an import of an unknown module": ({"launch.py": "import parallel.misc"}, "give it a layer"),
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
        "which it must not depend on",
    ),
    "zero importing tensor": (
        {"parallel/zero/reducer.py": "from parallel.tensor import mode"},
        "which it must not depend on",
    ),
    "storage importing the mesh": (
        {"parallel/storage/disk.py": "from parallel.mesh import topology"},
        "which it must not depend on",
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
    assert all("uses torch.distributed" in problem for problem in found)


def test_the_check_passes_a_tree_in_order(tmp_path: Path) -> None:
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


def test_folders_and_arrows_are_counted(tmp_path: Path) -> None:
    files = {
        "parallel/__init__.py": "from parallel.engine.engine import Engine",
        "parallel/errors.py": "",
        "parallel/mesh/__init__.py": "",
        "parallel/mesh/mesh.py": "from parallel.errors import ConfigError\nfrom parallel.mesh import topology",
        "parallel/mesh/topology.py": "import parallel.zero.gatherer",
        "parallel/zero/gatherer.py": "from parallel.mesh import mesh, topology\nimport parallel.errors",
        "parallel/engine/engine.py": "from parallel.zero.gatherer import Gatherer\nfrom models import data",
        "models/data.py": "import parallel.engine.engine",
    }
    assert list(folder_measures(write(tmp_path, files))) == [
        "folders of parallel/: 3; modules in no folder: 2; layers: 5",
        "arrows between these: 6; in a circle: 2; upward: 1",
    ]


def test_another_checkout_is_measured_by_its_own_layers(tmp_path: Path) -> None:
    files = {
        "parallel/one.py": "import parallel.two",
        "parallel/two.py": "import parallel.three",
        "parallel/three.py": "",
        "tests/layering.py": 'FLOORS = (("parallel.one", "parallel.two"), ("parallel.three",))',
    }
    assert list(folder_measures(write(tmp_path, files))) == [
        "folders of parallel/: 0; modules in no folder: 3; layers: 2",
        "arrows between these: 2; in a circle: 0; upward: 1",
    ]
