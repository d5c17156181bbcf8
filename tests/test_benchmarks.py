"""All contenders of a benchmark compute the same, and its tables hold what they say."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    attention,
    cpu_peers,
    generate,
    one_gpu,
    overlap,
    ring,
    schedules,
    workload,
)
from benchmarks.gpu_contenders import Result, Work, measure
from benchmarks.gpu_fit import fit, state_bytes
from benchmarks.gpu_jobs import Job, RankSetup, Row
from benchmarks.gpu_layouts import Layout, parity_layouts, speed_layouts
from benchmarks.gpu_links import BandwidthJob, MemoryJob
from benchmarks.gpu_parity import ParityJob
from benchmarks.gpu_peers import ON_GPUS_ALONE, PACKAGES, PEERS
from benchmarks.gpu_speed import Sizes, SpeedJob
from benchmarks.one_gpu import AGREEMENT, agree, disagreeing, save_start
from benchmarks.sleeping import Work as Sleep
from models.shapes import from_hugging_face, resolve
from parallel.config import parse
from parallel.engine.context import Place, make_context
from tests.harness import run
from tests.patience import patient


def losses(rank: int, world_size: int, model: str, folder: Path) -> dict[str, Result]:
    """Train each contender for a few steps from the same weights."""
    save_start(model, folder)
    work = Work(folder, batch=2, sequence=16, steps=3)
    return {name: measure(name, work) for name in ("ours", "hf", "fsdp2")}


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["opt-tiny", "llama-tiny"])
def test_the_contenders_of_one_gpu_train_the_same_model(model: str, tmp_path: Path) -> None:
    """Losses fall so far that an update which one of them leaves out would show."""
    (results,) = run(losses, 1, model, tmp_path / "start")
    first, *_, last = results["ours"].losses
    assert last < first * (1 - 4 * AGREEMENT)
    for name, result in results.items():
        assert agree(results["ours"], result), (name, result.losses, results["ours"].losses)


def test_a_table_needs_both_of_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert one_gpu.arguments_of(["--batch", "8", "4", "--sequence", "16", "32"], on_gpu=True).steps == 10
    assert one_gpu.arguments_of(["--tiny"], on_gpu=True).steps == one_gpu.arguments_of([], on_gpu=False).steps == 2
    with pytest.raises(SystemExit):
        one_gpu.arguments_of(["--batch", "8", "4", "--sequence", "16"], on_gpu=True)
    assert "equally many numbers" in capsys.readouterr().err


@pytest.mark.slow
def test_generation_is_measured_for_each_batch_beside_hugging_faces(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        generate.main(["--tiny", "--only", "ours", "hf", "--new", "4"])
    assert end.value.code == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines if line[0] in ("ours", "hf")] == [[n, b] for n in ("ours", "hf") for b in "13"]


@pytest.mark.slow
def test_one_gpu_prints_a_table_for_each_batch_and_names_who_is_not_available(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model is OPT, for which liger-kernel has nothing even where it is installed."""
    sizes = ["--batch", "2", "1", "--sequence", "16", "32", "--steps", "1"]
    with pytest.raises(SystemExit) as end:
        one_gpu.main(["--tiny", "--model", "opt-tiny", *sizes, "--only", "ours", "hf", "liger"])
    assert end.value.code == 0
    first, second = capsys.readouterr().out.split("s since the start")[:2]
    for table, size in ((first, "2 × 16"), (second, "1 × 32")):
        assert f"{size} tokens" in table
        assert re.search(r"^ours +\d+ ", table, re.MULTILINE)
        assert re.search("^liger +not available", table, re.MULTILINE)


@pytest.mark.slow
def test_the_contenders_of_zero_train_the_same_model(tmp_path: Path) -> None:
    """Weights start so large that each update changes losses by much more than they may differ."""
    small = dict(hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64)
    workload.save_model(tmp_path, **small, init_std=0.3)
    contests = cpu_peers.zero_contests(2)
    layouts = {name: layout for contest in contests for name, layout in contest.layouts.items()}
    peers = tuple(dict.fromkeys(peer for contest in contests for peer in contest.peers))
    contest = replace(contests[0], layouts=layouts, peers=peers)
    results, _ = run(cpu_peers.measure, 2, contest, tmp_path, 3)
    assert len(results) == len(layouts) + len(peers)
    for result in results:
        assert result.losses == pytest.approx(results[0].losses, rel=cpu_peers.AGREEMENT), result.name


@pytest.mark.parametrize("losses", [[5.0, 4.0], [5.0, float("nan")], [4.0, 3.0]])
def test_losses_that_differ_at_either_end_disagree(losses: list[float]) -> None:
    result = Result([], [5.0, 3.0], 0, None)
    assert agree(result, result)
    assert not agree(result, replace(result, losses=losses))
    assert not agree(replace(result, losses=losses), result)


def test_losses_of_8_bits_may_differ_by_more_than_those_of_bf16() -> None:
    base, near, far = (Result([], [10.0, last], 0, None) for last in (5.0, 5.25, 5.4))
    assert disagreeing({"ours": base, "hf": near}) == ["hf"]
    assert disagreeing({"ours": base, "ours_fp8": near}) == disagreeing({"ours_fp8": near, "ours": base}) == []
    assert disagreeing({"ours": base, "hf": base, "torchao_fp8": far}) == ["torchao_fp8"]


@pytest.mark.parametrize("model", ["opt-tiny", "gpt2-tiny"])
def test_a_start_has_as_many_layers_as_asked_for(model: str, tmp_path: Path) -> None:
    save_start(model, tmp_path / "start", layers=1)
    assert from_hugging_face(tmp_path / "start").num_hidden_layers == 1


QUICK = ("fsdp2_kept", "dtensor_sequence", "pipelining", "pipelining_v")
ALL = tuple(PEERS.keys() - ON_GPUS_ALONE - PACKAGES.keys())


def rows_of_all_jobs(rank: int, world_size: int, out: Path, model: str, peers: tuple[str, ...]) -> list[Row]:
    setup = RankSetup(rank, world_size, torch.device("cpu"), out, tiny=True)
    pipe = Layout("pipeline", dict(parallel=dict(pipeline=dict(size=2))), ("pipelining",))
    zero = Layout("ZeRO 2", dict(zero=dict(stage=2)), ("fsdp2_kept",))
    sizes = Sizes(model)
    jobs: list[Job] = [
        ParityJob(pipe),
        BandwidthJob([zero, pipe]),
        MemoryJob([pipe]),
        SpeedJob(zero, sizes, steps=1, trace=True),
        *(SpeedJob(pipe, sizes, peer=peer, steps=1) for peer in peers),
        SpeedJob(zero, sizes, alone=True, steps=1),
    ]
    return [row for job in jobs for row in job.run(setup)]


@pytest.mark.parametrize(
    ("model", "peers"),
    [("opt-tiny", QUICK), *(pytest.param(model, ALL, marks=pytest.mark.slow) for model in ("opt-tiny", "llama-tiny"))],
)
def test_the_jobs_of_several_gpus_run_on_a_cpu(model: str, peers: tuple[str, ...], tmp_path: Path) -> None:
    """Peers start from the same weights, so that each has the first loss of the others."""
    rows, _ = run(rows_of_all_jobs, 2, tmp_path, model, peers)
    assert not [row for row in rows if row.get("failed")]
    assert {row["part"] for row in rows} == {"parity", "bandwidth", "nccl", "speed", "overlap"}
    assert {row["name"] for row in rows} >= {*peers, "ZeRO 2", "world"}
    assert all(row["losses"][-1] < row["losses"][0] for row in rows if "losses" in row)
    for step in (0, 1):
        losses = [row["losses"][step] for row in rows if row["name"] in peers]
        assert losses == pytest.approx([losses[0]] * len(peers), rel=1e-3)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_layout_of_several_gpus_is_a_valid_config(world: int) -> None:
    for layout in (*parity_layouts(world), *speed_layouts(world)):
        train = dict(train=dict(global_batch_size=8 * world, micro_batch_size=8))
        parse(dict(model=dict(name="opt-6.7b")) | train | layout.sections, world_size=world, resolve=resolve)
    modes = " ".join(layout.name for layout in speed_layouts(world))
    assert all(mode in modes for mode in ("ZeRO 3", "1d", "2d", "2.5d", "1f1b", *(["3d"] if world == 8 else [])))


def test_what_does_not_fit_is_made_smaller_then_recomputed() -> None:
    zero = Layout("ZeRO 2", dict(zero=dict(stage=2)))
    assert state_bytes(zero, 4, 1e9, 0) == pytest.approx(1e9 * (2 + 4 / 4 + 12 / 4))

    def bytes_of(samples: int, recompute: bool) -> float:
        return samples * (1.0 if recompute else 8.0)

    chosen = [fit(zero, 4, 16, bytes_of, room) for room in (40.0, 30.0, 3.0, 1.0)]
    assert [c and (c.micro, c.recompute) for c in chosen] == [(4, False), (4, True), (2, True), None]


def test_communication_under_other_kernels_is_hidden() -> None:
    def kernel(name: str, start: float, stop: float) -> dict[str, object]:
        return dict(cat="kernel", name=name, ts=start, dur=stop - start)

    events = [
        kernel("ncclDevKernel_AllGather", 0, 10),
        kernel("ncclDevKernel_ReduceScatter", 5, 20),
        kernel("gemm", 2, 6),
        kernel("gemm", 4, 8),
        kernel("gemm", 18, 30),
        dict(cat="cpu_op", name="aten::mm", ts=0, dur=30),
    ]
    assert overlap.shares(events) == pytest.approx((20e-6, 8 / 20))
    assert overlap.shares(events[2:]) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", attention.TINY)
def test_every_contender_computes_the_same_attention(name: str) -> None:
    """The error is, without the window or with heads in another order, as large as the numbers themselves."""
    case, device = attention.TINY[name], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = attention.compare(case, device, times=1)
    assert found.keys() >= {"ours", "repeated", "grouped"}
    assert not any(figures.is_wrong for figures in found.values())
    inputs, wrong = attention.Inputs.draw(case, device), attention.ours(replace(case, window=3), device)
    expected = inputs.of_sample(0, torch.float32).both(attention.repeated(case, device))
    assert attention.measure(wrong, inputs, expected, times=1).error > 0.1


def parts_of_a_ring(rank: int, world_size: int) -> dict[str, str]:
    config = parse(dict(parallel=dict(context=world_size)), world_size=world_size)
    return ring.measure(make_context(config, Place(rank, world_size)), tokens=8, heads=2, head=4)


def test_the_parts_of_a_ring_are_timed_on_a_cpu() -> None:
    for found in run(parts_of_a_ring, 2):
        assert list(found) == [
            *("FLASH_ON_CPU", "ring", "nothing sent", "all_to_all"),
            *("a hop", "a group a link", "one batch", "one rank sends"),
        ]
        assert all(re.match(r"\d+\.\d+ ms", text) for text in found.values())


@pytest.mark.slow
def test_schedules_take_the_simulated_time_and_have_its_order() -> None:
    """Layers sleep, so no number of cores decides. On a busy machine they sleep longer, until its delays are small."""
    deadline, seconds = time.monotonic() + patient(120.0), 0.012
    while problems := schedules.problems(schedules.sleep(4, Sleep(8, seconds), rounds=3)):
        assert time.monotonic() < deadline, problems
        seconds *= 1.5


@pytest.mark.slow
def test_every_schedule_is_measured_beside_torchs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        schedules.main(["--blocks", "--tiny"])
    assert end.value.code is None
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert all(re.search(r" \d+ +\d+ +\d\.\d\dx ", lines[name]) for name in schedules.PEERS)
