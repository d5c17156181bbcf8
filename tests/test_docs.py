"""The documents say what is: configs parse, links lead somewhere, the code draws the pictures, the example is right."""

import ast
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import OPTConfig, OPTForCausalLM

import parallel
from models.shapes import resolve
from parallel.config import load_raw, parse
from parallel.errors import ColonnadeError
from parallel.layout.labels import shift
from parallel.mesh.conjugate import reduce
from parallel.mesh.mesh import Mesh
from parallel.mesh.topology import Topology
from parallel.pipeline.schedule import SCHEDULES, Action, batches, with_transfers
from parallel.pipeline.timeline import draw, simulate
from parallel.tensor.layers import Linear, Sharded
from parallel.tensor.mode import Mode
from tests.harness import run
from tests.mutant_table import MUTANTS
from tests.parity import owns
from tests.test_loop import ALONE
from training import loop, metrics, preflight

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
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


def test_the_readme_says_what_its_config_has_from_no_default(tmp_path: Path) -> None:
    """A line of it is deleted as if it were one: no checkpoint, then."""
    (config,) = filter(is_config, blocks(ROOT / "README.md", "python"))
    file = tmp_path / "readme.py"
    file.write_text(config, encoding="utf-8")
    ours, defaults = (parse(raw, resolve=resolve).to_dict() for raw in (load_raw(file), {}))
    differing = {
        name for section, keys in ours.items() for name, value in keys.items() if value != defaults[section][name]
    }
    said = {found[1] for line in config.splitlines() if (found := re.match(r"    (\w+)=.*# .*\bdefault\b", line))}
    assert said == differing


@pytest.mark.gpu
def test_the_readmes_numbers_are_what_its_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rounding of other machines: a sum of a million elements loses some 1e-13. One once had a wrong digit."""
    monkeypatch.chdir(ROOT)
    (script,) = (block for block in blocks(ROOT / "README.md", "sh") if "output.dir=runs/one" in block)
    shared, command = (re.search(pattern, script) for pattern in (r'S="(.*)"', r"--config (\S+) .*(parallel=\S+)"))
    assert shared is not None
    assert command is not None
    changes = [*shared[1].split(), command[2], f"output.dir={tmp_path / 'one'}"]
    loop.run(preflight.inspect(preflight.read_config(command[1], changes, 1), ALONE))
    found = [(line["loss"], line["grad_norm"]) for line in metrics.read(tmp_path / "one" / "metrics.jsonl")]
    rows = re.findall(r"^\| \d \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    for (one, eight, norm_one, norm_eight), (loss, norm) in zip(rows, found, strict=True):
        assert [float(one), float(eight)] == pytest.approx([loss] * 2, rel=1e-12)
        assert [float(norm_one), float(norm_eight)] == pytest.approx([norm] * 2, rel=1e-12)


def do_as_the_readme(rank: int, world_size: int, code: str) -> None:
    for key, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size).items():
        os.environ[key] = str(value)
    os.chdir(ROOT)
    exec(code, {})


@pytest.mark.gpu
def test_the_readmes_library_does_what_it_says(tmp_path: Path) -> None:
    """It once printed what an engine does not have."""
    (code,) = (block for block in blocks(ROOT / "README.md", "python") if "models.build(context)" in block)
    run(do_as_the_readme, 8, code.replace("runs/mine", str(tmp_path / "mine")))
    assert OPTForCausalLM.from_pretrained(tmp_path / "mine").config.vocab_size == 260


def test_the_readme_has_a_config_that_parses_and_says_every_section(tmp_path: Path) -> None:
    (config,) = filter(is_config, blocks(ROOT / "README.md", "python"))
    file = tmp_path / "readme.py"
    file.write_text(config, encoding="utf-8")
    raw = load_raw(file)
    assert raw.keys() == SECTIONS
    assert parse(raw, world_size=8, resolve=resolve).num_microbatches(8) == 4


def test_every_mutant_finds_its_line_exactly_once() -> None:
    """Three of them once did not, and were planted nowhere."""
    stale = [m.name for m in MUTANTS if (ROOT / m.file).read_text(encoding="utf-8").count(m.before) != 1]
    assert stale == []


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
        r"`((?:parallel|models|training|tests|configs|examples)/[\w/]+\.\w+)`", document.read_text(encoding="utf-8")
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
        whole[tuple(slice(*ends) for ends in layout.box)] = grad if owns(layout) else 0
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


# -- the library -------------------------------------------------------------------------------------------------------


def run_the_library_page(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """All of its code, in order, as two ranks would run it."""
    rows = torch.randint(4, 37, (64, 8), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": row, "labels": row} for row in rows]
    namespace: dict[str, Any] = dict(path=str(folder / "opt"), samples=samples[:32], held_out=samples[32:])
    os.chdir(folder)
    with patch.dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1"):
        for code in blocks(ROOT / "docs/library.md", "python"):
            exec(code, namespace)
    engine, result = namespace["engine"], namespace["result"]
    return dict(steps=engine.num_steps, loss=namespace["loss"], tokens=result.tokens, rows=rows[32:])


@pytest.mark.gpu
def test_the_code_of_the_library_page_runs(tmp_path: Path) -> None:
    shape: Any = dict(vocab_size=37, hidden_size=8, word_embed_proj_dim=8, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(ffn_dim=16, max_position_embeddings=8, dropout=0.0)
    OPTForCausalLM(OPTConfig(**shape)).save_pretrained(tmp_path / "opt")
    found, other = run(run_the_library_page, 2, tmp_path)
    assert found["steps"] == other["steps"] == 2 + 1 + 2
    assert found["tokens"] == 2 * 3  # of the criterion's step: of four labels one is not counted
    with torch.no_grad():
        exported = OPTForCausalLM.from_pretrained(tmp_path / "runs/mine/export")
        loss = exported(input_ids=found["rows"], labels=found["rows"]).loss.item()
    # Half of 32 samples at a time, in fp32 here and there: roundings of a mean of numbers near 3.6.
    assert found["loss"] == pytest.approx(loss, rel=1e-5)


def refusals(rank: int, world_size: int) -> list[str]:
    """What the library says to what it cannot bear."""
    model: Callable[[], nn.Module] = lambda: nn.Linear(3, 1)  # noqa: E731
    dataset: Any = [0] * 18
    said = []

    def expect(refused: Callable[[], Any], **config: Any) -> None:
        parallel.launch_from_torch(config)
        with pytest.raises(ColonnadeError) as caught:
            refused()
        said.append(str(caught.value))

    with patch.dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1"):
        expect(lambda: parallel.initialize(model()), parallel=dict(pipeline=2))
        kind = torch.optim.Adagrad
        expect(lambda: parallel.initialize(one := model(), kind(one.parameters())))
        expect(lambda: parallel.initialize(model(), torch.optim.SGD(model().parameters())))
        expect(lambda: parallel.initialize(model(), train_dataloader=DataLoader(dataset, batch_size=9)))
        expect(lambda: parallel.initialize(model())[0].backward(torch.ones(3, requires_grad=True)))
    return said


def test_the_refusals_of_the_library_page_are_word_for_word() -> None:
    text = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^```\n(.*?)^```$", text.partition("## What is refused")[2], re.MULTILINE | re.DOTALL)
    for said in run(refusals, 2):
        assert said == listed.splitlines()
