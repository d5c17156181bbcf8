"""Which jobs several GPUs get, in which order, what they do after an error, and what the table says of two rows."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_faults import FaultJob, without_launcher
from benchmarks.gpu_fit import fit, state_bytes
from benchmarks.gpu_jobs import Job, RankSetup, Row
from benchmarks.gpu_layouts import Layout, speed_layouts
from benchmarks.gpu_links import RingJob
from benchmarks.gpu_parity import EightBitJob, ParityJob
from benchmarks.gpu_peers import PEERS
from benchmarks.gpu_speed import CHANGES, Sizes, SpeedJob
from benchmarks.gpu_table import summary, with_ratios
from benchmarks.gpu_workers import ELSEWHERE, Outcome, agreed
from benchmarks.multi_gpu import jobs_of, read_arguments
from tests.harness import run

CPU = torch.device("cpu")


def jobs(*arguments: str, world: int = 2) -> list[Job]:
    return list(jobs_of(read_arguments([*arguments, "--tiny"]), RankSetup(0, world, CPU, Path(), tiny=True)))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_what_comes_first_is_measured_of_all_models_and_lengths_before_anything_else(world: int) -> None:
    chosen = ("--models", "opt-tiny", "llama-tiny", "--sequence", "2048", "8192", "--precision", "bf16", "fp8")
    found = [job for job in jobs("--only", "speed", "overlap", *chosen, world=world) if isinstance(job, SpeedJob)]
    order = [job.layout.comes_first for job in found]
    assert order == sorted(order, reverse=True)
    assert len({job.sizes for job in found if job.layout.comes_first}) == 8
    assert {job.peer for job in found} - {None} <= PEERS.keys()
    assert not any("overlap" in job.name for job in found if job.sizes.precision == "fp8")
    assert len({(job.name, job.sizes) for job in found}) == len(found)
    assert len({job.sizes for job in found if job.trace}) == 1


def test_every_peer_is_beside_a_layout() -> None:
    beside = {peer for layout in speed_layouts(2) for peer in (*layout.peers, *layout.peers_of_fp8)}
    assert beside == PEERS.keys()


def test_parts_layouts_and_families_can_be_chosen() -> None:
    assert [job.part for job in jobs("--only", "faults", "nccl")] == ["faults", "nccl"]
    chosen = jobs("--only", "parity", "fp8", "--layouts", "ZeRO 3", "--families", "gpt2", "llama")
    assert [(job.part, job.name, job.model) for job in chosen] == [
        ("parity", "ZeRO 3", "gpt2"),
        ("parity", "ZeRO 3", "llama"),
        ("fp8", "ZeRO 3", "opt"),
    ]
    assert [job.name for job in jobs("--only", "gather")] == ["ZeRO 3 on the host", "ZeRO 3 on the host, gathers wait"]


def test_workers_go_on_after_an_error_that_each_of_them_has_had() -> None:
    good, bad = Outcome([{"name": "row"}]), Outcome([], "ValueError: no")
    assert agreed([good, good]) == good
    assert agreed([bad, bad]) == bad
    assert not agreed([good, bad]).goes_on
    lost = agreed([Outcome([], ELSEWHERE, goes_on=False), bad])
    assert (lost.error, lost.goes_on) == (bad.error, False)
    assert not agreed([bad, Outcome([], "no end after 75 s", goes_on=False)]).goes_on


def test_a_pipeline_that_keeps_more_microbatches_needs_more_memory() -> None:
    def chosen(schedule: str) -> bool:
        pipe = Layout("pipe", dict(parallel=dict(pipeline=dict(size=2, schedule=schedule))))
        found = fit(pipe, 2, 8, lambda samples, recompute: 1.0 if recompute else 8.0, room=10.0)
        assert found is not None
        return found.recompute

    assert [chosen(name) for name in ("1f1b", "zero_bubble_v", "gpipe", "interleaved")] == [False, False, True, True]


def test_copies_in_8_bits_count_in_the_memory_of_states() -> None:
    for stage, more in ((2, 2.0), (3, 1 / 4)):
        zero = Layout("zero", dict(zero=dict(stage=stage)))
        assert state_bytes(zero, 4, 1e9, 0, "fp8") - state_bytes(zero, 4, 1e9, 0) == pytest.approx(more * 1e9)


def test_a_table_says_how_fast_ours_is_and_names_what_is_too_close() -> None:
    def row(name: str, beside: str, speed: float, part: str = "speed") -> Row:
        return dict(part=part, model="m", name=name, beside=beside, tokens_per_second=speed, per_gpu=speed / 2, note="")

    rows = [row("ZeRO 2", "ZeRO 2", 104.0), row("fsdp2_kept", "ZeRO 2", 100.0), row("dtensor", "1d", 50.0)]
    rows += [row("alone", "alone", 50.0, "weak") | dict(per_gpu=50.0), row("ZeRO 2", "ZeRO 2", 99.0, "weak")]
    found = with_ratios(rows)
    assert [x.get("ours_is") for x in found] == [None, 1.04, None, None, None]
    assert found[-1]["efficiency"] == 0.99
    assert any("ZeRO 2 / fsdp2_kept, m: 1.040" in text for text in summary(found))
    assert summary(found)[-1] == "0 of 5 rows failed or were left out."


def test_a_run_of_a_job_has_no_variables_of_the_launcher_of_the_job() -> None:
    variables = dict(RANK="1", WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none", GROUP_RANK="0", NCCL_NVLS_ENABLE="0")
    assert without_launcher(variables) == dict(NCCL_NVLS_ENABLE="0")


def rows_of_slow_jobs(rank: int, world_size: int, out: Path) -> list[Row]:
    setup = RankSetup(rank, world_size, CPU, out, tiny=True)
    one = Layout("1d, sequence", dict(parallel=dict(tensor=dict(mode="1d", size=world_size, sequence_parallel=True))))
    host = Layout("host", dict(zero=dict(stage=3, tensor_placement_policy="cpu")))
    found: list[Job] = [ParityJob(one, "qwen3"), EightBitJob(one), RingJob(4096)]
    found += [SpeedJob(host, Sizes("opt-tiny"), steps=1, part="gather", change=change) for change in CHANGES]
    found.append(SpeedJob(one, Sizes("opt-tiny", 8192, "fp8"), steps=1))
    return [row for job in found for row in job.run(setup)]


@pytest.mark.slow
def test_jobs_of_parity_in_8_bits_of_a_ring_and_of_gathers_run_on_a_cpu(tmp_path: Path) -> None:
    rows, _ = run(rows_of_slow_jobs, 2, tmp_path)
    assert not [row for row in rows if row.get("failed")]
    assert {row["part"] for row in rows} == {"parity", "fp8", "ring", "gather", "speed"}
    before, after = (row["losses"] for row in rows if row["part"] == "gather")
    assert before == after


@pytest.mark.slow
def test_a_killed_and_a_stopped_rank_are_named_and_runs_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "0")  # as under torchrun
    rows = FaultJob().run(RankSetup(0, 2, CPU, tmp_path, tiny=True))
    assert [row["name"].split()[0] for row in rows] == ["kill", "stop", "killed", "killed"]
    assert not [row for row in rows if row.get("failed")]
