"""The files, the data and the options of an engine of any module: results equal those of plain torch."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import LlamaForCausalLM, OPTForCausalLM

import parallel
from parallel.config import parse
from parallel.engine.context import Place, make_context, use
from parallel.engine.module_engine import ModuleEngine
from parallel.mesh.collectives import all_reduce
from tests.harness import run
from tests.parity import Raw
from tests.test_module_engine import MODELS, Plain, batches, config_of, engine_of, loss_of, plain


class Normed(Plain):
    """Plain with batch normalization, whose statistics training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(13)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, sometimes: bool = False) -> Any:
        x = self.embed(input_ids)
        x = self.batch_norm(x.flatten(0, 1)).view_as(x)
        for block in self.blocks:
            x, _ = block(hidden=x, scale=self.scale)
        return self.head(x * self.sometimes if sometimes else x)


def normed() -> nn.Module:
    torch.manual_seed(3)
    return Normed()


def train(engine: ModuleEngine, first: int, last: int) -> None:
    for step in range(first, last):
        ids = batches()[step % 3][0].tensor_split(engine.data.size)[engine.data.rank]
        engine.backward(loss_of(engine, ids, step=step % 2))
        engine.step()


def sums(engine: ModuleEngine) -> dict[str, float]:
    """Return the sum of the elements that this rank owns of each tensor, by its kind and name."""
    found: dict[str, float] = {}
    for piece in engine.state_pieces(owned=True):
        found[piece.name] = found.get(piece.name, 0.0) + piece.data.double().sum().item()
    return found


def normed_engine(rank: int, world_size: int, raw: Raw, module: nn.Module, uses_torch_optimizer: bool) -> ModuleEngine:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.3) if uses_torch_optimizer else None
    return engine_of(rank, world_size, raw, module, optimizer=optimizer)[0]


def save_in_the_middle(
    rank: int, world_size: int, raw: Raw, folder: Path, uses_torch_optimizer: bool
) -> dict[str, float]:
    engine = normed_engine(rank, world_size, raw, normed(), uses_torch_optimizer)
    train(engine, 0, 2)
    engine.save_checkpoint(folder, dict(note="half way"))
    train(engine, 2, 4)
    return sums(engine)


def go_on(rank: int, world_size: int, raw: Raw, folder: Path, uses_torch_optimizer: bool) -> dict[str, float]:
    engine = normed_engine(rank, world_size, raw, normed().apply(_set_to_zero), uses_torch_optimizer)
    assert engine.load_checkpoint(folder) == dict(note="half way")
    assert engine.num_steps == 2
    train(engine, 2, 4)
    return sums(engine)


def _set_to_zero(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.zero_()


def added(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(part.get(name, 0.0) for part in parts) for name in {n for part in parts for n in part}}


@pytest.mark.gpu
@pytest.mark.parametrize("uses_torch_optimizer", [False, True])
def test_a_checkpoint_of_one_stage_resumes_in_another_as_if_nothing_had_happened(
    uses_torch_optimizer: bool, tmp_path: Path
) -> None:
    """Two of the weights have no gradient before the checkpoint, and one of them has one after it.

    Adam has made another number of steps with that one than with the others.
    """
    want = added(run(save_in_the_middle, 2, config_of(3), tmp_path, uses_torch_optimizer))
    assert any(name.startswith("buffer/batch_norm.running_mean") for name in want)
    for stage in (1, 2, 3):
        got = added(run(go_on, 2, config_of(stage), tmp_path, uses_torch_optimizer))
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert math.isclose(got[name], value, rel_tol=1e-11, abs_tol=1e-11), name


def after_a_forward_alone(rank: int, world_size: int, raw: Raw, folder: Path) -> list[float]:
    """Return the losses of one batch at four times.

    The first is at a checkpoint. The second comes after more steps and a forward, with the checkpoint loaded again; the
    last two after one step more from the checkpoint, whose graph is freed or retained.
    """
    engine, _ = engine_of(rank, world_size, raw, plain())
    ids = batches()[0][0].tensor_split(world_size)[rank]

    def loss() -> float:
        with torch.no_grad():
            return loss_of(engine, ids, step=0).item()

    train(engine, 0, 2)
    engine.save_checkpoint(folder)
    found = [loss()]
    train(engine, 2, 4)
    loss_of(engine, ids, step=0)
    engine.load_checkpoint(folder)
    found.append(loss())
    for retains in (False, True):
        engine.load_checkpoint(folder)
        engine.backward(loss_of(engine, ids, step=0), retain_graph=retains)
        engine.step()
        found.append(loss())
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["cuda", "cpu"])
def test_a_forward_without_a_backward_keeps_no_old_weight(policy: str, tmp_path: Path) -> None:
    """Parameters of no layer stay gathered until the backward.

    In an earlier version they were not gathered again after the weights had changed.
    """
    raw = config_of(3)
    for first, second, third, fourth in run(
        after_a_forward_alone, 2, raw | dict(zero=raw["zero"] | dict(tensor_placement_policy=policy)), tmp_path
    ):
        assert first == second
        assert third == fourth != first


def export(rank: int, world_size: int, raw: Raw, model: str, folder: Path) -> None:
    engine, _ = engine_of(rank, world_size, raw, MODELS[model]())
    engine.save_pretrained(folder)


@pytest.mark.parametrize(("model", "kind"), [("opt", OPTForCausalLM), ("llama", LlamaForCausalLM)])
def test_from_pretrained_reads_what_an_engine_saves(model: str, kind: Any, tmp_path: Path) -> None:
    run(export, 3, config_of(3, precision="bf16"), model, tmp_path / "out")
    got, want = kind.from_pretrained(tmp_path / "out"), MODELS[model]()
    assert got.dtype == torch.float32
    theirs = dict(got.named_parameters())
    for name, parameter in want.named_parameters():
        assert torch.equal(theirs[name], parameter), name
    assert got.lm_head.weight is got.get_input_embeddings().weight or model == "llama"


def test_a_plain_modules_export_has_each_tensor_once_and_its_buffers(tmp_path: Path) -> None:
    run(export, 2, config_of(3, precision="fp32"), "plain", tmp_path / "out")
    found, want = load_file(tmp_path / "out" / "model.safetensors"), plain()
    assert found.keys() == {n for n, _ in want.named_parameters()} | {"shift"}
    for name, x in want.state_dict().items():
        if name in found:
            assert torch.equal(found[name], x), name


def losses_of(rank: int, world_size: int, raw: Raw, model: str) -> tuple[list[float], float]:
    """Return the results of some train_steps on padded samples, and the loss of an evaluation."""
    module = MODELS[model]()
    engine, _ = engine_of(rank, world_size, raw, module, criterion=criterion if model == "plain" else None)
    found = []
    for parts in batches():
        batch = dict(input_ids=parts[0], labels=padded(parts[0]))
        result = engine.train_step({name: x.tensor_split(world_size)[rank] for name, x in batch.items()})
        found += [result.loss, result.grad_norm or 0.0, result.lr, float(result.tokens)]
    batch = dict(input_ids=parts[1], labels=padded(parts[1]))
    return found, engine.evaluate([{n: x.tensor_split(world_size)[rank] for n, x in batch.items()}])


def training_flags(rank: int, world_size: int) -> tuple[list[bool], list[bool], list[bool]]:
    """Return which parts of a module are in training mode before an evaluation, during it and after it."""
    engine, _ = engine_of(rank, world_size, config_of(0), MODELS["opt"]())
    within: list[bool] = []

    def trains() -> list[bool]:
        return [part.training for part in engine.module.modules()]

    engine.train()
    next(engine.module.children()).eval()  # a user keeps this part in evaluation mode
    engine.module.register_forward_pre_hook(lambda *_: within.extend(trains()))
    before = trains()
    ids = batches()[0][0]
    engine.evaluate([dict(input_ids=ids)])
    return before, within, trains()


def test_an_evaluation_leaves_a_module_training_as_it_was() -> None:
    before, within, after = run(training_flags, 1)[0]
    assert not any(within)
    assert len(set(before)) == 2
    assert after == before


def criterion(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), labels.flatten())


def padded(ids: Tensor) -> Tensor:
    """Return labels of which the samples count different numbers, and the last sample none."""
    rows, columns = torch.meshgrid(torch.arange(len(ids)), torch.arange(ids.shape[1]), indexing="ij")
    return torch.where((columns <= rows % ids.shape[1]) & (rows < len(ids) - 1), ids, -100)


@pytest.mark.parametrize("model", ["plain", "opt", "gpt2"])
def test_train_step_takes_the_mean_over_all_labels_however_replicas_share_them(model: str) -> None:
    """Hugging Face's own loss is rounded to fp32."""
    bound = 1e-12 if model == "plain" else 1e-6
    want, whole = run(losses_of, 1, config_of(0, micro_batch_size=12), model)[0]
    for ranks, stage in ((1, 0), (3, 2), (2, 3)):
        for got, mean in run(losses_of, ranks, config_of(stage), model):
            assert got == pytest.approx(want, rel=bound)
            assert mean == pytest.approx(whole, rel=bound)


def weights_after(rank: int, world_size: int, raw: Raw, model: str) -> dict[str, Tensor]:
    engine, _ = engine_of(rank, world_size, raw, MODELS[model]())
    train(engine, 0, 3)
    return {piece.name + str(piece.box): piece.data.clone() for piece in engine.weights()}


@pytest.mark.parametrize("model", ["plain", "opt", "llama"])
def test_recomputing_activations_changes_nothing(model: str) -> None:
    want = run(weights_after, 2, config_of(3), model)
    got = run(weights_after, 2, config_of(3, activation_checkpointing="full"), model)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_stage_gives_the_same_weights_in_every_precision(precision: str) -> None:
    """They are equal bit for bit: there is one microbatch, so the order of sums is the same."""
    want = collected(run(weights_after, 2, config_of(0, precision=precision), "opt"))
    for stage in (1, 2, 3):
        got = collected(run(weights_after, 2, config_of(stage, precision=precision), "opt"))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def collected(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the elements of every tensor, sorted."""
    rows: dict[str, list[tuple[str, Tensor]]] = {}
    for part in parts:
        for key, data in part.items():
            name, box = key.split("((") if "((" in key else (key, "")
            rows.setdefault(name, []).append((box, data.flatten()))
    return {name: torch.cat([x for _, x in found]).sort().values for name, found in rows.items()}


def from_a_folder(rank: int, world_size: int, raw: Raw, folder: Path) -> float:
    use(make_context(parse(raw, world_size=world_size), Place(rank, world_size, rank, world_size)))
    with parallel.sharded_init():
        model = OPTForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    engine, *_ = parallel.initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3))
    train(engine, 0, 3)
    with torch.no_grad():
        loss = loss_of(engine, batches()[2][1].tensor_split(world_size)[rank], step=0)
    return all_reduce(loss, engine.data).item() / world_size


def test_a_model_loaded_in_shards_trains_like_one_loaded_whole(tmp_path: Path) -> None:
    MODELS["opt"]().save_pretrained(tmp_path)  # type: ignore[operator]
    want = run(from_a_folder, 1, config_of(0, micro_batch_size=12), tmp_path)[0]
    for ranks, stage in ((2, 3), (3, 3), (2, 1)):
        assert run(from_a_folder, ranks, config_of(stage), tmp_path) == pytest.approx([want] * ranks, rel=1e-9)


def loaded(rank: int, world_size: int, batch_size: int) -> list[list[int]]:
    """Return every batch that this replica is given in two epochs."""
    use(make_context(parse({}, world_size=world_size), Place(rank, world_size, rank, world_size)))
    torch.manual_seed(rank)
    data = TensorDataset(torch.arange(22))
    loader = DataLoader(data, batch_size=batch_size, shuffle=True)
    divided = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, world_size, rank))
    _, train_loader, eval_loader, scheduler = parallel.initialize(
        nn.Linear(2, 2), train_dataloader=loader, eval_dataloader=divided
    )
    assert eval_loader is divided
    scheduler.step()
    return [batch.tolist() for _ in range(2) for (batch,) in train_loader]


def test_a_dataloader_gives_every_replica_its_part_of_the_same_batches() -> None:
    alone = run(loaded, 1, 8)[0]
    assert [len(batch) for batch in alone] == [8, 8, 6] * 2
    assert sorted(itertools.chain(*alone[:3])) == list(range(22))
    assert alone[:3] != alone[3:]
    parts = run(loaded, 4, 8)
    for i, batch in enumerate(alone):
        together = [index for part in parts for index in part[i]]
        assert together == batch


def test_a_batch_that_does_not_divide_is_shared_as_evenly_as_it_can_be() -> None:
    alone, (first, second) = run(loaded, 1, 5)[0], run(loaded, 2, 5)
    assert [(len(a), len(b)) for a, b in zip(first, second, strict=True)] == [*[(3, 2)] * 4, (1, 1)] * 2
    assert [a + b for a, b in zip(first, second, strict=True)] == alone


def export_into(rank: int, world_size: int, folder: Path) -> None:
    engine, _ = engine_of(rank, world_size, config_of(3), MODELS["opt"]())
    for _ in range(2):
        engine.save_checkpoint(folder)
        engine.save_pretrained(folder)
    engine.load_checkpoint(folder)


def read_back(rank: int, world_size: int, folder: Path) -> str:
    engine, _ = engine_of(rank, world_size, config_of(3), MODELS["opt"]())
    try:
        engine.load_checkpoint(folder)
    except parallel.CheckpointError as error:
        return str(error)
    return "nothing"


def test_a_shard_that_one_rank_cannot_read_is_an_error_on_every_rank(tmp_path: Path) -> None:
    run(export_into, 2, tmp_path)
    assert run(read_back, 2, tmp_path) == ["nothing"] * 2
    (file,) = tmp_path.glob("checkpoints/*/rank_00001.safetensors")
    file.write_bytes(b"\xff" * file.stat().st_size)
    for message in run(read_back, 2, tmp_path):
        assert "rank_00001.safetensors is damaged" in message


def test_an_export_keeps_other_files_of_its_folder(tmp_path: Path) -> None:
    """It once replaced the folder, with all other files that a user had there."""
    (tmp_path / "thesis.txt").write_text("years")
    (tmp_path / "model_ema.safetensors").write_text("a user's own")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("of an earlier export in two shards")
    run(export_into, 2, tmp_path)
    found = {file.name for file in tmp_path.iterdir()}
    assert found >= {"thesis.txt", "model_ema.safetensors", "checkpoints", "model.safetensors", "config.json"}
    assert not any(name.startswith(("model-", ".")) for name in found)


def overflowed(rank: int, world_size: int, raw: Raw) -> tuple[list[bool], float]:
    """Return whether each of four steps was skipped, and the loss scale after them.

    A gradient of rank 1 is infinite in the second step.
    """
    engine, _ = engine_of(rank, world_size, raw, MODELS["opt"]())
    skipped: list[bool] = []
    infected = next(x for name, x in engine.module.named_parameters() if name.endswith("final_layer_norm.bias"))
    infected.register_hook(lambda x: x * torch.inf if len(skipped) == 1 and rank == 1 else x)
    for step in range(4):
        before = [chunk.master.clone() for chunk in engine.chunks]
        loss = loss_of(engine, batches()[0][0].tensor_split(world_size)[rank], step=step)
        engine.backward(loss)
        result = engine.step()
        skipped.append(result.skipped)
        same = all(torch.equal(a, chunk.master) for a, chunk in zip(before, engine.chunks, strict=True))
        assert same == result.skipped == (result.grad_norm is None)
    return skipped, engine.loss_scale.scale


@pytest.mark.parametrize("stage", [0, 3])
def test_an_overflow_on_one_rank_makes_every_rank_skip_and_halve(stage: int) -> None:
    """The first step may be skipped too, since the first scale may overflow by itself."""
    (skipped, scale), other = run(overflowed, 2, config_of(stage, precision="fp16"))
    assert (skipped, scale) == other
    assert skipped[1:] == [True, False, False]
    assert scale == 2.0 ** (16 - sum(skipped))
