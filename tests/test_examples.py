"""The example does what it says: it learns, equally on any number of ranks, and Hugging Face reads its export."""

import io
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, OPTForCausalLM

import parallel
from examples import finetune_llama, finetune_opt
from parallel.errors import ConfigError, DataError
from tests.harness import run

ROOT = Path(__file__).parent.parent
TEXT, SEQUENCE, BATCH, STEPS, SAVED = ROOT / "LICENSE", 32, 8, 12, 6
"""The text never changes: rounding grows over the steps, with an unlucky text beyond the bound below."""

OPTIONS = (
    f"--text {TEXT} --sequence {SEQUENCE} --batch {BATCH} --steps {STEPS} --log-every 1 --save-every {SAVED}".split()
)
LLAMA_OPTIONS = f"--text {TEXT} --sequence {SEQUENCE} --batch {BATCH} --steps {STEPS}".split()

# A loss is about 5 and is printed to 6 places. It may differ by 1e-5 of that, the bound of fp32 (tests/parity.py). So a
# perplexity, which is its exponential, may differ by 5e-5 of itself.
LOSS, PERPLEXITY = 5e-5, 1e-4


def example(rank: int, world_size: int, *options: str) -> str:
    """Run the example of OPT in a rank that is connected already, and return what it prints."""
    arguments = finetune_opt.read_arguments([*OPTIONS, *options])
    return printed_by(lambda: finetune_opt.main(arguments), rank, world_size)


def llama_example(rank: int, world_size: int, *options: str) -> str:
    """Do the same with the example of Llama."""
    arguments = finetune_llama.read_arguments([*LLAMA_OPTIONS, *options])
    return printed_by(lambda: finetune_llama.main(arguments), rank, world_size)


def printed_by(main: Callable[[], None], rank: int, world_size: int) -> str:
    place = dict(RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    printed = io.StringIO()
    with patch.dict(os.environ, place), patch.object(parallel, "leave"), redirect_stdout(printed):
        main()
    return printed.getvalue()


def numbers(printed: str, word: str) -> list[float]:
    return [float(x) for x in re.findall(rf"{word} ([\d.]+)", printed)]


@pytest.mark.gpu
def test_a_run_learns_equally_in_one_process_and_in_two_and_resumes(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    (alone,) = run(example, 1, "--output", one)
    first, second = run(example, 2, "--stage", "3", "--output", two)
    assert second == ""
    losses = numbers(alone, "loss")
    assert len(losses) == STEPS
    assert numbers(first, "loss") == pytest.approx(losses, abs=LOSS)
    before, after, exported = numbers(alone, "perplexity")
    assert after < before / 2
    assert exported == pytest.approx(after, rel=PERPLEXITY)
    assert numbers(first, "perplexity") == pytest.approx([before, after, exported], rel=PERPLEXITY)
    assert perplexity_of(tmp_path / "two" / "export") == pytest.approx(after, rel=PERPLEXITY)

    shutil.rmtree(tmp_path / "one" / "checkpoints" / f"step_{STEPS:06d}")  # as if the run had been killed before it
    resumed, _ = run(example, 2, "--stage", "2", "--resume", "--output", one)
    assert numbers(resumed, "loss") == pytest.approx(losses[SAVED:], abs=LOSS)
    assert numbers(resumed, "perplexity")[1] == pytest.approx(after, rel=PERPLEXITY)


def perplexity_of(export: Path) -> float:
    """Return the perplexity of an export, by torch alone, on the part of the text that the example holds out."""
    tokens = torch.tensor(list(TEXT.read_bytes())) + 4  # after OPT's four special tokens
    rows = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    rows = rows[-(len(rows) // BATCH // 20 * BATCH) :]
    with torch.no_grad():
        logits = OPTForCausalLM.from_pretrained(export)(rows).logits
    return math.exp(F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item())


LAYOUTS = {
    "1d": (2, ("--tensor", "2")),
    "1d, pipeline": (4, ("--tensor", "2", "--pipeline", "2")),
    "pipeline, replicas": (4, ("--pipeline", "2", "--micro-batch", "2")),
}


@pytest.mark.parametrize(
    "layout", ["1d", *(pytest.param(name, marks=pytest.mark.slow) for name in ("1d, pipeline", "pipeline, replicas"))]
)
def test_a_split_llama_is_fine_tuned_equally_in_one_process_and_in_several(tmp_path: Path, layout: str) -> None:
    """Its export has the same loss in transformers, which knows nothing of this library."""
    world_size, options = LAYOUTS[layout]
    finetune_llama.small_llama(tmp_path / "split" / "small")  # connected, only rank 0 would save it
    (alone,) = run(llama_example, 1, "--output", str(tmp_path / "one"))
    first, *others = run(llama_example, world_size, "--output", str(tmp_path / "split"), *options)
    assert others == [""] * (world_size - 1)
    before, _, last, after, exported = numbers(alone, "loss")
    assert max(last, after) < before - 1
    assert numbers(first, "loss") == pytest.approx(numbers(alone, "loss"), abs=LOSS)
    assert exported == pytest.approx(after, abs=LOSS)

    tokens = torch.tensor(list(TEXT.read_bytes())) + 4  # after the four special tokens
    rows = tokens[: len(tokens) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)[-2 * BATCH :]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "split" / "export")(rows).logits
    assert F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).item() == pytest.approx(after, abs=LOSS)


def test_a_layout_with_more_parts_than_key_value_heads_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    arguments = finetune_llama.read_arguments([*LLAMA_OPTIONS, "--tensor", "8", "--output", str(tmp_path)])
    place = dict(RANK="0", WORLD_SIZE="8", OMP_NUM_THREADS="1")
    with patch.dict(os.environ, place), pytest.raises(ConfigError, match=r"num_key_value_heads: 4 .* Try size 2 or 4"):
        finetune_llama.main(arguments)


@pytest.mark.parametrize(("text", "tokens"), [("", 0), ("x" * (2 * BATCH * SEQUENCE - 1), 2 * BATCH * SEQUENCE - 1)])
def test_a_text_too_short_to_train_on_and_to_evaluate_is_refused(tmp_path: Path, text: str, tokens: int) -> None:
    (tmp_path / "short.txt").write_text(text)
    arguments = finetune_opt.read_arguments([*OPTIONS, "--text", str(tmp_path / "short.txt")])
    with pytest.raises(DataError, match=f"--text: {tokens} tokens make {tokens // SEQUENCE} samples"):
        finetune_opt.read_samples(arguments, finetune_opt.read_tokenizer(None, 260))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "4"], "zero.stage: needs one of 0, 1, 2, 3, got 4"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--batch", "9"], "a batch of 9 does not divide over 2 replicas"),
    ],
)
def test_under_torchrun_a_refusal_is_printed_once_without_a_traceback_of_ours(
    tmp_path: Path, options: list[str], message: str
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "examples/finetune_opt.py"), *OPTIONS, "--output", str(tmp_path / "out"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 1  # the exit code of torchrun itself
    assert done.stderr.count(message) == 1
    assert "exitcode  : 2" in done.stderr
    assert 'finetune_opt.py", line' not in done.stderr
