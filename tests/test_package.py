"""The wheel has what the tree has, and an installation works in a folder with packages and a config of our names."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.layering import PACKAGES
from tests.patience import LIMIT
from tests.test_records import lines_in, parquet_in

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("pyproject.toml", "LICENSE", "launch.py")

DATA_FILES = ("models/words.model", "models/opt/tables/a.json.gz")
"""Files that a package might have one day, of any name, also in a folder without Python."""

CONFIG = """
model = dict(hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
data = dict(path="story.txt", sequence_length=16)
train = dict(steps=2, device="cpu", global_batch_size=4)
output = dict(checkpoint_every=2)
"""


def files_of_packages() -> list[str]:
    """Return the files of our packages, by their names in the tree."""
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    return [str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what a package is built from, with data files, and with what a used clone has beside it."""
    folder = tmp_path_factory.mktemp("source")
    for name in (*BUILT_FROM, *files_of_packages()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for litter in ("models/__pycache__/a.cpython-311.pyc", "models/opt/__pycache__/b.pyc", "runs/x/config.json"):
        (folder / litter).parent.mkdir(parents=True, exist_ok=True)
        (folder / litter).touch()
    for name in DATA_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("data")
    return folder


def pip(*arguments: str) -> None:
    """Run pip, which is to load nothing from anywhere: setuptools is installed."""
    options = ("--quiet", "--disable-pip-version-check", "--no-input")
    done = subprocess.run(
        [sys.executable, "-m", "pip", *options, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the working directory of a user, with packages and a config that have names of ours."""
    for name in ("models", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('this is of the user')")
    shutil.copy(tmp_path / "training/__init__.py", tmp_path / "training/run.py")
    (tmp_path / "parallel.py").write_text(CONFIG)
    (tmp_path / "story.txt").write_text("The cat sat on the mat. " * 40)
    lines_in(tmp_path / "story.jsonl.gz", [{"text": "The cat sat on the mat."}] * 40)
    lines_in(tmp_path / "chat.jsonl", [{"prompt": "Where sat ", "completion": "the cat?"}] * 40)
    return tmp_path


def run(command: Sequence[str], cwd: Path, **environment: str) -> str:
    """Run a command that must succeed and return what it printed. Of our tree it has nothing on its path."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_wheel_has_every_file_of_our_packages_and_nothing_else(wheel: Path) -> None:
    """models.data and four others were once left out of the list of packages, which is now no list."""
    with zipfile.ZipFile(wheel) as content:
        found = {name for name in content.namelist() if not name.endswith("/")}
    info = {name for name in found if re.match(r"colonnade-[\d.]+\.dist-info/", name)}
    assert found - info == {*files_of_packages(), *DATA_FILES}
    assert {name.partition("/")[2] for name in info} >= {"METADATA", "entry_points.txt", "licenses/LICENSE"}


SCRIPT = """
import sys
sys.path.insert(1, {site!r})
from colonnade.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""
MARK = """
import os
open(f"imported_by_{os.getpid()}", "x").close()
"""


def test_what_is_installed_trains_on_two_ranks_in_a_folder_with_packages_of_our_names(
    wheel: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The fork server of --nprocs once searched the working directory first, and imported the user's `training`.

    The script is as pip writes it. Where one process imports training.run, the ranks are forks of it.
    """
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site)
    with (site / "training/run.py").open("a") as file:
        file.write(MARK)
    script = site / "bin" / "colonnade"
    script.parent.mkdir()
    script.write_text(SCRIPT.format(site=str(site)))
    shown = run([sys.executable, str(script), "train", "--config", "parallel.py", "--nprocs", "2"], folder)
    assert "2 ranks = data 2" in shown
    assert (folder / "runs/parallel/export/model.safetensors").exists()
    assert len(list(folder.glob("imported_by_*"))) == 1


# -- the whole story, in an environment of its own ---------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """A new virtual environment, which sees the other packages of this Python, torch among them, but none of ours."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def colonnade(self) -> str:
        return str(self.folder / "bin" / "colonnade")

    @property
    def torchrun(self) -> list[str]:
        return [self.python, "-m", "torch.distributed.run", "--nproc-per-node", "2"]

    def install(self, *what: str) -> None:
        pip("--python", self.python, "install", "--no-deps", "--no-index", "--no-build-isolation", *what)


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Return an environment. A folder in a .pth file is searched last, and the .pth files in it are not read."""
    made = Environment(tmp_path_factory.mktemp("environment") / "venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made.folder)], check=True)
    (site,) = (made.folder / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made


Step = Callable[[Environment], list[str]]


def train_on(environment: Environment, path: str, *changes: str, resume: str | None = None) -> list[str]:
    """Return the command that trains two ranks on these data."""
    resuming = [] if resume is None else ["--resume", resume]
    own = ("--config", "parallel.py", "--nprocs", "2", "--set", f"data.path={path}", *changes)
    return [environment.colonnade, "train", *resuming, *own]


STEPS: dict[str, tuple[Step, str]] = {
    "the version": (lambda e: [e.colonnade, "--version"], ""),
    "a check": (lambda e: [e.colonnade, "check", "--config", "parallel.py", "--world", "2"], ""),
    "texts": (
        lambda e: [e.colonnade, "train", "--config", "parallel.py"],
        "runs/parallel/checkpoints/step_000002/checkpoint.json",
    ),
    "a resume on two ranks": (
        lambda e: [
            *(e.colonnade, "train", "--config", "parallel.py", "--nprocs", "2", "--resume", "auto"),
            *("--set", "train.steps=4", "parallel.pipeline=2"),
        ],
        "runs/parallel/checkpoints/step_000004/checkpoint.json",
    ),
    "torchrun -m": (
        lambda e: [
            *(*e.torchrun, "-m", "colonnade", "train", "--config", "parallel.py", "--resume", "runs/parallel"),
            *("--set", "train.steps=6", "output.dir=runs/third"),
        ],
        "runs/third/export/config.json",
    ),
    "records in lines": (
        lambda e: train_on(e, "story.jsonl.gz", "output.dir=runs/lines"),
        "runs/lines/export/model.safetensors",
    ),
    "a resume on records in lines": (
        lambda e: train_on(e, "story.jsonl.gz", "output.dir=runs/lines", "train.steps=4", resume="auto"),
        "runs/lines/checkpoints/step_000004/checkpoint.json",
    ),
    "Parquet, with conversations for validation": (
        lambda e: train_on(e, "story.parquet", "data.validation_path=chat.jsonl", "output.dir=runs/table"),
        "runs/table/export/model.safetensors",
    ),
    "conversations": (
        lambda e: train_on(e, "chat.jsonl", "output.dir=runs/chat"),
        "runs/chat/export/model.safetensors",
    ),
    "an export": (lambda e: [e.colonnade, "export", "runs/third", "--to", "hf"], "hf/model.safetensors"),
    "training from the export": (
        lambda e: [
            *(e.python, "-m", "colonnade", "train", "--config", "parallel.py", "--set", "model={'path': 'hf'}"),
            *("data.tokenizer=hf", "output.dir=runs/fourth"),
        ],
        "runs/fourth/export/tokenizer.json",
    ),
}
"""Steps that a user takes one after another in one folder: the command of each, and a file that it leaves."""


@pytest.mark.slow
def test_a_wheel_in_a_new_environment_does_what_the_clone_does(
    wheel: Path, environment: Environment, folder: Path
) -> None:
    environment.install(str(wheel))
    parquet_in(folder / "story.parquet", [{"text": "The cat sat on the mat."}] * 40)
    for name, (step, left) in STEPS.items():
        run(step(environment), folder)
        assert (folder / left).exists(), name
    same = "model.safetensors"
    assert (folder / "hf" / same).read_bytes() == (folder / "runs/third/export" / same).read_bytes()


@pytest.mark.slow
def test_an_editable_installation_and_launch_py_use_their_clone_in_any_folder(
    source: Path, environment: Environment, folder: Path
) -> None:
    """launch.py is started as it is documented, with a config of the name of a package."""
    environment.install("--editable", str(source))
    program = "import colonnade, models, training.run, parallel; print(models.__file__, training.__file__)"
    files = [str(source / name / "__init__.py") for name in ("models", "training")]
    assert run([environment.python, "-c", program], folder).split() == files
    launch = str(source / "launch.py")
    run([environment.colonnade, "train", "--config", "parallel.py", "--nprocs", "2"], folder)
    run([environment.python, launch, "--config", "parallel.py", "--nprocs", "2"], folder)
    run([*environment.torchrun, launch, "--config", "parallel.py"], folder)
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["parallel", "parallel.1", "parallel.2"]
