"""The documents say what is: configs parse, links lead somewhere, the code draws the pictures, the example is right."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.shapes import resolve
from parallel.config import load_raw, parse
from parallel.conjugate import reduce
from parallel.labels import shift
from parallel.mesh import Mesh
from parallel.pipeline.schedule import SCHEDULES, Action, batches, with_transfers
from parallel.pipeline.timeline import draw, simulate
from parallel.tensor.layers import Linear, Sharded
from parallel.tensor.mode import Mode
from parallel.topology import Topology
from tests.harness import run
from tests.mutant_table import MUTANTS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = {"model", "data", "parallel", "zero", "train", "optimizer", "lr_scheduler", "output"}


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a language, those inside a list or another indent left out."""
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def is_config(code: str) -> bool:
    """Whether nothing but config sections is assigned."""
    names = {
        target.id
        if isinstance(statement, ast.Assign) and isinstance(target := statement.targets[0], ast.Name)
        else None
        for statement in ast.parse(code).body
    }
    return names <= SECTIONS


def test_the_readme_has_a_config_that_parses_and_says_every_section(tmp_path: Path) -> None:
    (config,) = filter(is_config, blocks(ROOT / "README.md", "python"))
    file = tmp_path / "readme.py"
    file.write_text(config, encoding="utf-8")
    raw = load_raw(file)
    assert raw.keys() == SECTIONS
    assert parse(raw, world_size=8, resolve=resolve).num_microbatches(8) == 4


def test_the_readme_counts_the_mutants() -> None:
    assert f" {len(MUTANTS)} bugs" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_the_documents_compiles(document: Path) -> None:
    for code in blocks(document, "python"):
        compile(code, document.name, "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_to_a_file_and_a_heading(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(document: Path) -> set[str]:
    """GitHub's anchors for the headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_files_that_the_documents_name_exist(document: Path) -> None:
    for name in re.findall(
        r"`((?:parallel|models|training|tests|configs)/[\w/]+\.\w+)`", document.read_text(encoding="utf-8")
    ):
        assert (ROOT / name).is_file() or name == "parallel/tensor/sliced.py", name


def test_the_timeline_in_the_architecture_is_what_draw_draws() -> None:
    picture = draw(simulate(with_transfers(SCHEDULES["1f1b"](4, 8)), forward_cost=1, backward_cost=2))
    rows = with_transfers(SCHEDULES["1f1b"](2, 2)).ranks
    actions = "\n".join(f"rank {rank}  {'  '.join(map(posted, batches(row)))}" for rank, row in enumerate(rows))
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert picture in text
    assert actions in text


def posted(step: Action | tuple[Action, ...]) -> str:
    return str(step) if isinstance(step, Action) else f"{{{' '.join(map(str, step))}}}"


# -- the mode that adding_a_mode.md writes -----------------------------------------------------------------------------

B, S, H, N, V = 4, 3, 6, 10, 7


def sliced_mode(rank: int, world_size: int) -> Mode:
    (code,) = (code for code in blocks(ROOT / "docs/adding_a_mode.md", "python") if "class Sliced" in code)
    namespace: dict[str, Any] = {"__name__": "sliced"}
    exec(code, namespace)
    kind: type[Mode] = namespace["Sliced"]
    topology = Topology({"pipe": 1, "data": 1, "context": 1, "s": world_size})
    return kind(Mesh(topology, rank, merged=kind.merged_axes()), torch.float64)


def fill(part: Sharded, **wholes: Tensor) -> None:
    for name, whole in wholes.items():
        box = tuple(slice(*ends) for ends in part.layouts[name].box)
        getattr(part, name).data.copy_(whole[box])


def train_in_sliced(rank: int, world_size: int, wholes: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The loss, and each gradient as one process has it, summed over its layout's axes and gathered."""
    mode = sliced_mode(rank, world_size)
    embedding = mode.vocabulary(V, H, padding_idx=1)
    into, out = mode.linear_in(N, H), mode.linear_out(H, N)
    fill(embedding, weight=wholes["embedding"])
    fill(into, weight=wholes["into"], bias=wholes["bias"])
    fill(out, weight=wholes["out"])
    x = mode.lookup(tokens, embedding)
    assert x.shape == mode.activation_shape(B, S, H)
    loss = mode.lm_loss(x + out(into(x).relu()), embedding, shift(tokens))
    loss.backward()
    found = {"loss": reduce(loss.detach(), mode.mesh.world)}
    named: dict[str, tuple[Sharded | Linear, str]] = dict(
        embedding=(embedding, "weight"), into=(into, "weight"), bias=(into, "bias"), out=(out, "weight")
    )
    for name, (part, attribute) in named.items():
        grad, layout = getattr(part, attribute).grad, part.layouts[attribute]
        for axis in layout.sync:
            grad = reduce(grad, axis)
        whole = torch.zeros(layout.shape, dtype=grad.dtype)
        whole[tuple(slice(*ends) for ends in layout.box)] = grad if layout.owner else 0
        found[name] = reduce(whole, mode.mesh.world)
    return found


def test_the_mode_written_in_the_documents_equals_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = dict(embedding=(V, H), into=(N, H), bias=(N,), out=(H, N))
    wholes = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    tokens = torch.randint(0, V, (B, S), generator=generator)
    got = run(train_in_sliced, 2, wholes, tokens)[0]

    want = {name: whole.clone().requires_grad_() for name, whole in wholes.items()}
    x = F.embedding(tokens, want["embedding"], padding_idx=1)
    x = x + F.linear(F.linear(x, want["into"], want["bias"]).relu(), want["out"])
    logits = F.linear(x, want["embedding"])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss.backward()
    torch.testing.assert_close(got.pop("loss"), loss.detach(), rtol=1e-12, atol=0)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name].grad, rtol=1e-12, atol=1e-12)
