"""Tests of the documents: configs parse, links lead somewhere, code runs, and figures are those that commands print."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
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
from parallel.config import PipelineConfig, load_raw, parse
from parallel.errors import ColonnadeError
from parallel.layout.labels import shift
from parallel.mesh.conjugate import reduce
from parallel.mesh.mesh import Mesh
from parallel.mesh.topology import Topology
from parallel.pipeline.picture import draw
from parallel.pipeline.schedule import SCHEDULES, plan_of
from parallel.pipeline.transfers import with_transfers
from parallel.plan.plan import Action, group_transfers
from parallel.plan.timeline import Costs, simulate
from parallel.tensor.layers import Linear, Sharded
from parallel.tensor.mode import Mode
from tests.harness import run
from tests.layering import LAYERS, PACKAGES
from tests.mutant_table import MUTANTS
from tests.parity import owns
from tests.test_loop import ALONE
from training import metrics
from training.config import read_config
from training.preflight import prepare
from training.run import run_job

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MANUAL_OF_THE_README = "2a95af4ac93f5b719944030ce3769070ddf827d847cba42192afa8da989e5dc4"
"""The SHA-256 of the text that the demo in the README has learned: Python 3.11.7's manual."""

SECTIONS = {"model", "data", "parallel", "zero", "train", "optimizer", "lr_scheduler", "output"}
SPLIT_MODEL = "models.build(context)"  # only the block of docs/library.md for eight ranks has it


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(document: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language; those inside a list or another indent are left out."""
    text = document.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for name, code in found if name == language]


def is_config(code: str) -> bool:
    """Return whether nothing but config sections is assigned."""
    names = {
        target.id
        if isinstance(statement, ast.Assign) and isinstance(target := statement.targets[0], ast.Name)
        else None
        for statement in ast.parse(code).body
    }
    return names <= SECTIONS


def write_documented_config(folder: Path) -> tuple[str, Path]:
    """Return the config of docs/config.md, and a file with it."""
    (config,) = filter(is_config, blocks(ROOT / "docs/config.md", "python"))
    file = folder / "documented.py"
    file.write_text(config, encoding="utf-8")
    return config, file


def test_the_documented_config_says_which_of_its_values_are_not_defaults(tmp_path: Path) -> None:
    """A user who deletes a line gets the default: without `checkpoint_every`, say, no checkpoint is written."""
    config, file = write_documented_config(tmp_path)
    ours, defaults = (parse(raw, resolve=resolve).to_dict() for raw in (load_raw(file), {}))
    differing = {
        name for section, keys in ours.items() for name, value in keys.items() if value != defaults[section][name]
    }
    said = {found[1] for line in config.splitlines() if (found := re.match(r"    (\w+)=.*# .*\bdefault\b", line))}
    assert said == differing


def test_the_documented_config_parses_and_has_every_section(tmp_path: Path) -> None:
    _, file = write_documented_config(tmp_path)
    raw = load_raw(file)
    assert raw.keys() == SECTIONS
    assert parse(raw, world_size=8, resolve=resolve).num_microbatches(8) == 4


@pytest.mark.parametrize(
    ("raw", "world_size"),
    [
        (dict(parallel=dict(tensor=dict(mode="2d", size=6))), 6),
        (dict(parallel=dict(pipeline=2, tensor=dict(mode="2d", size=4))), 6),
        (dict(train=dict(stepz=3)), 1),
    ],
)
def test_the_documented_refusals_of_a_config_are_word_for_word(raw: dict[str, Any], world_size: int) -> None:
    listed = blocks(ROOT / "docs/config.md", "")[-1]
    with pytest.raises(ColonnadeError) as caught:
        parse(raw, world_size=world_size, resolve=resolve)
    assert str(caught.value) in listed.splitlines()


@pytest.mark.gpu
def test_the_readmes_numbers_are_what_its_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is the rounding of other machines: a sum of a million elements loses some 1e-13. One number once had a
    wrong digit.
    """
    monkeypatch.chdir(ROOT)
    (script,) = (block for block in blocks(ROOT / "README.md", "sh") if "output.dir=runs/one" in block)
    source, copy = re.findall(r"cp (\S+) (\S+)", script)[0]
    shutil.copy(ROOT / source, tmp_path / "text.txt")
    shared = " ".join(re.findall(r'S="(?:\$S )?(.*)"', script)).replace(copy, str(tmp_path / "text.txt"))
    command = re.search(r"--config (\S+) .*(parallel=\S+)", script)
    assert command is not None
    changes = [*shared.split(), command[2], f"output.dir={tmp_path / 'one'}"]
    run_job(prepare(read_config(command[1], changes, 1), ALONE))
    found = [(line["loss"], line["grad_norm"]) for line in metrics.read(tmp_path / "one" / "metrics.jsonl")]
    rows = re.findall(r"^\| \d \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    for (one, eight, norm_one, norm_eight), (loss, norm) in zip(rows, found, strict=True):
        assert [float(one), float(eight)] == pytest.approx([loss] * 2, rel=1e-12)
        assert [float(norm_one), float(norm_eight)] == pytest.approx([norm] * 2, rel=1e-12)


def test_the_demo_begins_as_the_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's first steps, in one process here, to the four digits that are printed."""
    manual = "\n".join(topics[name] for name in sorted(topics))
    if hashlib.sha256(manual.encode()).hexdigest() != MANUAL_OF_THE_README:
        pytest.skip("the demo learns the manual of its Python, and this is another Python than the README's")
    monkeypatch.chdir(ROOT)
    rows = re.findall(r"^step +(\d+)/250  lr (\S+)  loss (\S+)  [\d,]+ tokens/s", README, re.MULTILINE)
    changes = ["parallel={}", f"train.steps={len(rows)}", "output.export=False", f"output.dir={tmp_path / 'demo'}"]
    demo = "configs/opt_tiny_pp2_2p5d.py"
    assert demo in README
    run_job(prepare(read_config(demo, changes, 1), ALONE))
    found = list(metrics.read(tmp_path / "demo" / "metrics.jsonl"))
    assert [int(step) for step, _, _ in rows] == [line["step"] for line in found]
    assert [lr for _, lr, _ in rows] == [f"{line['lr']:.2e}" for line in found]
    losses = [line["loss"] for line in found]
    assert [float(loss) for *_, loss in rows] == pytest.approx(losses, abs=6e-5)  # roundings of printing and of fp32


def test_the_readmes_table_of_speed_repeats_the_benchmarks() -> None:
    """Each figure stands in docs/benchmarks.md, and each ratio is that of its row."""
    figures = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]+\| ([\d,]+) \|[^|]+\| ([\d,]+) \| ([\d.]+) \|", README, re.MULTILINE)
    assert len(rows) >= 9
    for ours, theirs, ratio in rows:
        assert f" {ours} |" in figures
        assert re.search(rf" {theirs}(?: \(batch \d+\))? \|", figures), theirs
        assert float(ratio) == pytest.approx(int(ours.replace(",", "")) / int(theirs.replace(",", "")), abs=0.005)


def run_on_ranks_of_the_document(rank: int, world_size: int, code: str) -> None:
    for key, value in dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size).items():
        os.environ[key] = str(value)
    os.chdir(ROOT)
    exec(code, {})


@pytest.mark.gpu
def test_a_split_model_trains_in_the_loop_of_the_library_page(tmp_path: Path) -> None:
    """The code once printed an attribute that an engine does not have."""
    (code,) = (block for block in blocks(ROOT / "docs/library.md", "python") if SPLIT_MODEL in block)
    run(run_on_ranks_of_the_document, 8, code.replace("runs/mine", str(tmp_path / "mine")))
    assert OPTForCausalLM.from_pretrained(tmp_path / "mine").config.vocab_size == 4096


def test_every_mutant_finds_its_line_exactly_once() -> None:
    """Three mutants once did not, and were planted nowhere."""
    stale = [m.name for m in MUTANTS if (ROOT / m.file).read_text(encoding="utf-8").count(m.before) != 1]
    assert stale == []


def test_every_mutant_has_a_name_of_its_own_and_names_a_test_that_is_run(request: pytest.FixtureRequest) -> None:
    """Two named none, after their test had been given other parameters, and one a test that is marked slow, which the
    runner leaves out: then no mutant is planted.
    """
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    config, collected = request.config, [item.nodeid for item in request.session.items]
    if config.getoption("keyword") or config.getoption("lf", False) or any("::" in given for given in config.args):
        pytest.skip("only a part of the tests of a file is collected")
    files = {test.partition("::")[0] for test in collected}
    known = {*collected, *(test.partition("[")[0] for test in collected)}
    assert [m.name for m in MUTANTS if m.test.partition("::")[0] in files and m.test not in known] == []


def test_the_readme_counts_the_mutants() -> None:
    assert f" {len(MUTANTS)} bugs" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_python_in_the_documents_compiles(document: Path) -> None:
    for code in blocks(document, "python"):
        compile(code, document.name, "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
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
    """Return GitHub's anchors for the headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_the_files_and_folders_that_the_documents_name_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    tops = "parallel|models|training|tests|configs|examples|benchmarks|docs"
    for name in re.findall(rf"`((?:{tops})/(?:[\w/]+\.\w+|[\w/]+/)?)`", text):
        path = ROOT / name
        exists = path.is_dir() if name.endswith("/") else path.is_file()
        assert exists or name == "parallel/tensor/sliced.py", name


def test_what_the_documents_name_beside_a_file_is_in_it() -> None:
    """Two checks had moved to another file, where the page on new modes did not send its reader."""
    text = " ".join(" ".join(document.read_text(encoding="utf-8") for document in DOCUMENTS).split())
    of_files = re.findall(r"`([\w/]+\.py)`, `(\w+)`", text)
    of_files += [(file, name) for name, file in re.findall(r"`(\w+)(?:\([^`]*\))?` (?:in|of) `([\w/]+\.py)`", text)]
    assert len(of_files) > 10
    assert [f"{name} in {file}" for file, name in of_files if name not in (ROOT / file).read_text()] == []


# -- the folders -------------------------------------------------------------------------------------------------------


def tracked_folders() -> tuple[set[str], set[str]]:
    """Return the folders of the repository's top level and those of parallel/, as git lists them."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]
    parents = [Path(name).parent.parts for name in names]
    top = {parts[0] for parts in parents if parts and not parts[0].startswith(".")}
    return top, {parts[1] for parts in parents if len(parts) > 1 and parts[0] == "parallel"}


def folders_of_parallel() -> list[str]:
    """Return the folders of parallel/ from the bottom to the top."""
    return [found[1] for layer in LAYERS if (found := re.fullmatch(r"parallel\.(\w+)\.\*", layer))]


def test_the_readmes_tree_has_every_folder_and_no_other() -> None:
    """The folders of parallel/ stand in the order of their imports, from the top to the bottom."""
    (tree,) = (block for block in blocks(ROOT / "README.md", "") if block.startswith("parallel/"))
    top = re.findall(r"^(\w+)/ {2,}\S", tree, re.MULTILINE)
    inner = re.findall(r"^  (\w+)/ {2,}\S", tree, re.MULTILINE)
    assert (set(top), set(inner)) == tracked_folders()
    assert (len(top), len(inner)) == (len(set(top)), len(set(inner)))
    assert inner == folders_of_parallel()[::-1]


def test_the_architecture_and_its_picture_have_every_folder_of_parallel_in_order() -> None:
    table = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    picture = (ROOT / "docs/architecture.svg").read_text(encoding="utf-8")
    assert re.findall(r"^\| `parallel/(\w+)/` \|", table, re.MULTILINE) == folders_of_parallel()
    drawn = re.findall(r'<text class="name" x="76"[^>]*>(\w+)/</text>', picture)
    assert drawn == folders_of_parallel()[::-1]


def test_users_get_the_annotations_of_every_package() -> None:
    """The test of the wheel shows that these files are installed."""
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file(), package


# -- decisions ---------------------------------------------------------------------------------------------------------

DECISIONS = sorted((ROOT / "docs/decisions").glob("2*.md"))


def test_the_index_of_decisions_has_each_page_once_in_order() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| \[(.+)\]\((\S+)\) \|$", index, re.MULTILINE)
    pages = [(page.name[:10], page.read_text(encoding="utf-8").splitlines()[0], page.name) for page in DECISIONS]
    assert [(date, f"# {title}", name) for date, title, name in rows] == pages


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_has_its_date_its_parts_and_no_more_than_a_page(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[2].startswith(page.name[:10])
    parts = [found[1] for line in lines if (found := re.match(r"\*\*(\w+)\.\*\*", line))]
    assert [part for part in parts if part != "Tried"] == ["Context", "Decision", "Costs", "Code"]
    assert len(lines) <= 25


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_the_timeline_in_the_architecture_is_what_draw_draws() -> None:
    picture = draw(simulate(with_transfers(SCHEDULES["1f1b"](4, 8, 1)), Costs(1, 1, 1)))
    rows = with_transfers(SCHEDULES["1f1b"](2, 2, 1)).ranks
    actions = "\n".join(f"rank {rank}  {'  '.join(map(posted, group_transfers(row)))}" for rank, row in enumerate(rows))
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert picture in text
    assert actions in text


SCHEDULES_IN_THE_TABLE = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1, "zero_bubble_v": 2}


def test_the_schedules_in_the_architecture_have_the_shapes_and_numbers_of_the_simulation() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    shapes = []
    for name, chunks in SCHEDULES_IN_THE_TABLE.items():
        costs, pipeline = (
            Costs(1 / chunks, 1 / chunks, 1 / chunks),
            PipelineConfig(size=4, schedule=name, chunks=chunks),
        )
        generated = simulate(SCHEDULES[name](4, 8, chunks), costs)
        executed = simulate(plan_of(pipeline, 8, recomputes=False), costs)
        rows = [line for line in draw(generated, 80).splitlines() if line.startswith("rank")]
        shapes += [f"{name}", *rows]
        most = ", ".join(f"{peak:g}" for peak in executed.peak_microbatches)
        numbers = f"{generated.bubble_of_ranks:.1%} | {executed.bubble_of_ranks:.1%} | {most} |"
        assert len(re.findall(rf"^\| `{name}` .* \| {re.escape(numbers)}$", text, re.MULTILINE)) == 1, numbers
        if name == "zero_bubble_v":
            assert f"step ZB-V's bubble is {executed.bubble_fraction:.1%}" in text
    assert "```\n" + "\n".join(shapes) + "\n```" in text


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
    """Return the loss and each whole gradient, summed over its layout's axes and gathered, as one process has them."""
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
    """Run the code of the page in order, as each of two ranks does; the last block is for eight ranks."""
    rows = torch.randint(4, 37, (64, 8), generator=torch.Generator().manual_seed(0))
    samples = [{"input_ids": row, "labels": row} for row in rows]
    namespace: dict[str, Any] = dict(path=str(folder / "opt"), samples=samples[:32], held_out=samples[32:])
    os.chdir(folder)
    with patch.dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1"):
        for code in blocks(ROOT / "docs/library.md", "python"):
            if SPLIT_MODEL not in code:
                exec(code, namespace)
    engine, result = namespace["engine"], namespace["result"]
    return dict(steps=engine.num_steps, loss=namespace["loss"], tokens=result.tokens, rows=rows[32:])


@pytest.mark.gpu
def test_the_code_of_the_library_page_runs(tmp_path: Path) -> None:
    shape: Any = dict(vocab_size=37, hidden_size=8, word_embed_proj_dim=8, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(ffn_dim=16, max_position_embeddings=8, dropout=0.0)
    OPTForCausalLM(OPTConfig(**shape)).save_pretrained(tmp_path / "opt")
    found, other = run(run_the_library_page, 2, tmp_path)
    assert found["steps"] == other["steps"] == 2 + 1 + 1 + 2 + 2
    assert found["tokens"] == 2 * 3  # in the criterion's step one of four labels is not counted
    with torch.no_grad():
        exported = OPTForCausalLM.from_pretrained(tmp_path / "runs/mine/export")
        loss = exported(input_ids=found["rows"], labels=found["rows"]).loss.item()
    # Both take half of 32 samples at a time, in fp32: roundings of a mean of numbers near 3.6.
    assert found["loss"] == pytest.approx(loss, rel=1e-5)


def refusals(rank: int, world_size: int) -> list[str]:
    """Return the messages of the errors that the library page lists."""
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
        kind = torch.optim.Adafactor
        expect(lambda: parallel.initialize(one := model(), kind(one.parameters())))
        expect(lambda: parallel.initialize(model(), torch.optim.SGD(model().parameters())))
        expect(
            lambda: parallel.initialize(model(), train_dataloader=DataLoader(dataset, num_workers=1, in_order=False))
        )
        expect(lambda: parallel.initialize(model())[0].backward(torch.ones(3, requires_grad=True)))
    return said


def test_the_refusals_of_the_library_page_are_word_for_word() -> None:
    text = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^```\n(.*?)^```$", text.partition("## What is refused")[2], re.MULTILINE | re.DOTALL)
    for said in run(refusals, 2):
        assert said == listed.splitlines()


# -- debugging ---------------------------------------------------------------------------------------------------------


def debugging_script(text: str) -> str:
    (code,) = (block for block in blocks(ROOT / "docs/debugging.md", "python") if text in block)
    return code


def test_the_debugging_page_compares_gradients_by_name_and_reads_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs of one process, with one microbatch and with two, have the same gradients to fp64's rounding."""
    monkeypatch.chdir(tmp_path)
    same = ["train.precision=fp64", "train.steps=1", "data.sequence_length=64", "data.validation_fraction=0"]
    same += ["output.export=False", "output.checkpoint_every=1", "train.global_batch_size=4"]
    for name, size in (("one", 4), ("pipeline", 2)):
        changes = [*same, f"train.micro_batch_size={size}", f"output.dir=runs/{name}"]
        run_job(prepare(read_config(None, changes, 1), ALONE, profile=range(1, 2)))
    capsys.readouterr()

    exec(debugging_script("exp_avg"), {})
    rows = re.findall(r"^(\S+)  exp_avg/(\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 5
    assert 0 < float(rows[0][0]) < 1e-14  # they are rounded differently, and by no more

    exec(debugging_script("traceEvents").replace("runs/NAME", "runs/pipeline"), {})
    ranges = re.findall(r"^[\d.]+ s  (.+)$", capsys.readouterr().out, re.MULTILINE)
    assert {"step 1", "data", "forward F0.0", "forward F0.1", "backward B0.1", "reduce", "update"} <= set(ranges)


def test_the_debugging_page_shows_the_bytes_on_each_tier(capsys: pytest.CaptureFixture[str]) -> None:
    exec(debugging_script("engine.held()"), {})
    held = ast.literal_eval(capsys.readouterr().out)
    assert held.keys() == {"DEVICE", "HOST", "DISK"}
    assert held["HOST"] > 3 * held["DEVICE"]
