"""The benchmarks compare like with like: every contender computes the same."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cpu_peers, workload
from benchmarks.gpu_contenders import Result, Work, measure
from benchmarks.one_gpu import AGREEMENT, agree, save_start
from tests.harness import run


def losses(rank: int, world_size: int, folder: Path) -> dict[str, Result]:
    save_start("opt-tiny", folder)
    work = Work(folder, batch=2, sequence=16, steps=3)
    return {name: measure(name, work) for name in ("ours", "hf", "fsdp2")}


def test_the_contenders_of_one_gpu_train_the_same_model(tmp_path: Path) -> None:
    """Far enough for an update that one of them leaves out to show."""
    (results,) = run(losses, 1, tmp_path / "start")
    first, *_, last = results["ours"].losses
    assert last < first * (1 - 4 * AGREEMENT)
    for name, result in results.items():
        assert agree(results["ours"], result), (name, result.losses, results["ours"].losses)


@pytest.mark.slow
def test_the_contenders_of_zero_train_the_same_model(tmp_path: Path) -> None:
    """From weights so large that each update shows far above what losses may differ by."""
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
