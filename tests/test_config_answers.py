"""A config is answered within a second, whatever is in it: it is valid, or one ConfigError names the keys.

The rows of the table in docs/config.md are run one by one, and 2,000 configs are drawn at random.
"""

import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from models.opt.shape import OPTShape
from models.shapes import resolve, shape_of
from parallel.config import apply_overrides, load_raw, parse
from parallel.config.parsing import KEYS
from parallel.engine.context import Place
from parallel.engine.device import check_precision
from parallel.errors import SHOWN, ConfigError, divisors
from tests.patience import patient
from tests.tables import ROOT, Row, rows
from training.config import read_config
from training.loggers import callbacks_of
from training.streams import SafeOutput

ANSWER_SECONDS = 1.0


def refusal(raw: Any) -> str:
    """Return the message with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        parse(raw, resolve=resolve)
    return str(caught.value)


def refusal_of_pipeline(**keys: Any) -> str:
    """Return the message with which these keys of a pipeline of two ranks are refused."""
    return refusal({"parallel": {"pipeline": {"size": 2, **keys}}})


def refusal_of_callbacks(*callbacks: str) -> str:
    """Return the message with which these callbacks are refused before a run."""
    with pytest.raises(ConfigError) as caught:
        callbacks_of(parse({"output": {"callbacks": callbacks}}))
    return str(caught.value)


def refusal_of_overrides(*assignments: str) -> str:
    """Return the message with which these overrides of the built-in config are refused."""
    with pytest.raises(ConfigError) as caught:
        parse(apply_overrides({}, assignments), resolve=resolve)
    return str(caught.value)


def refusal_of_file(path: Path, content: str) -> str:
    """Return the message with which a config file of this content is refused."""
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_raw(path)
    return str(caught.value)


def refusal_over_a_run(file: Path, *assignments: str) -> str:
    """Return the message with which overrides of the config.json of a run of qwen3-tiny are refused."""
    write_config_of_a_run(file)
    with pytest.raises(ConfigError) as caught:
        read_config(str(file), assignments, 1)
    return str(caught.value)


def write_config_of_a_run(file: Path) -> None:
    config = parse({"model": {"name": "qwen3-tiny", "num_hidden_layers": 2}}, resolve=resolve)
    file.write_text(json.dumps(config.to_dict()))


def circle() -> dict[str, Any]:
    raw: dict[str, Any] = {"train": {}}
    raw["train"]["train"] = raw["train"]
    return raw


def refusal_of_launcher(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the message with which eight tasks of srun are refused; others are refused likewise."""
    monkeypatch.delenv("RANK", raising=False)
    for launcher, variable in (("mpirun", "OMPI_COMM_WORLD_SIZE"), ("srun", "SLURM_STEP_NUM_TASKS")):
        monkeypatch.setenv(variable, "1")
        assert Place.from_environment() == Place(), "one task is a world of one"
        monkeypatch.setenv(variable, "8")
        with pytest.raises(ConfigError, match=launcher) as caught:
            Place.from_environment()
        monkeypatch.delenv(variable)
    return str(caught.value)


def refusal_of_gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the message with which an A100 is refused for fp8."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError) as caught:
        check_precision("fp8", torch.device("cuda", 0))
    return str(caught.value)


# By the first cell of a row: what returns the message that the second cell quotes.
REFUSALS: dict[str, Callable[[Path, pytest.MonkeyPatch], str]] = {
    "a tensor mode without its size": lambda path, _: refusal_of_overrides("parallel.tensor=1d"),
    "`gradient_accumulation_steps`": lambda path, _: refusal({"train": {"gradient_accumulation_steps": 4}}),
    "a key as another program calls it": lambda path, _: refusal({"train": {"learning_rate": 1.0}}),
    "a dtype as another library calls it": lambda path, _: refusal({"train": {"precision": "float8"}}),
    "a key in the wrong section": lambda path, _: refusal({"train": {"lr": 1.0}}),
    "`train.steps` beside `train.epochs`": lambda path, _: refusal({"train": {"steps": 20, "epochs": 1.5}}),
    "`keep_best` or `early_stopping` without evaluations": lambda path, _: refusal(
        {"output": {"keep_best": True}, "train": {"early_stopping": {}}}
    ),
    "a callback or a logger that is not there": lambda path, _: refusal_of_callbacks("mine:Steps"),
    "`overlap` without a tensor mode": lambda path, _: refusal({"parallel": {"tensor": {"overlap": True}}}),
    '`precision="fp8"` on a GPU without such products': lambda _, patch: refusal_of_gpu(patch),
    '`precision="fp8"` with `overlap`': lambda path, _: refusal(
        {"parallel": {"tensor": {"mode": "1d", "size": 2, "overlap": True}}, "train": {"precision": "fp8"}}
    ),
    '`precision="fp8"` for a model all of whose linears are small': lambda path, _: refusal(
        {"train": {"precision": "fp8"}}
    ),
    "a schedule as another program calls it": lambda path, _: refusal_of_pipeline(schedule="ZBVZeroBubble"),
    "`virtual_pipeline_model_parallel_size`, and other keys of pipelines elsewhere": lambda path, _: (
        refusal_of_pipeline(virtual_pipeline_model_parallel_size=2)
    ),
    "`chunks` that a schedule does not have": lambda path, _: refusal_of_pipeline(schedule="zero_bubble_v", chunks=3),
    "more stages than layers": lambda path, _: refusal_of_pipeline(schedule="interleaved", chunks=4),
    "`layers` of another number of stages": lambda path, _: refusal_of_pipeline(schedule="interleaved", layers=(2, 2)),
    "`layers` with another sum, or an empty stage in the middle": lambda path, _: refusal_of_pipeline(
        schedule="zero_bubble_v", layers=(1, 1, 1, 2)
    ),
    "the name of a model on the hub": lambda path, _: refusal({"model": {"path": "facebook/opt-125m"}}),
    "another `model.name` over a run's config.json, which has all fields of its model": lambda path, _: (
        refusal_over_a_run(path / "config.json", "model.name=llama-tiny")
    ),
    "a YAML or TOML file": lambda path, _: refusal_of_file(path / "config.yaml", "train:\n  steps: 1\n"),
    "a number that no model reaches": lambda path, _: refusal(
        {"parallel": {"tensor": {"mode": "2d", "size": 1000000000000000002}}}
    ),
    "a number of more digits than Python prints": lambda path, _: refusal({"train": {"steps": 10**5000}}),
    "dicts that are nested too deep, or in a circle": lambda path, _: refusal(circle()),
    "text with the character NUL, or half a surrogate pair": lambda path, _: refusal({"data": {"path": "a\0"}}),
    "a file name that no file system has": lambda path, _: refusal({"data": {"path": "x" * 300}}),
    "a config file that ends the process": lambda path, _: refusal_of_file(path / "c.py", "raise SystemExit(3)\n"),
    "several processes of `srun` or `mpirun` without torchrun": lambda _, patch: refusal_of_launcher(patch),
}


class Broken(io.StringIO):
    """A stream whose reader has gone."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise BrokenPipeError


def goes_on_without_output() -> None:
    output = SafeOutput(Broken())
    print("lost", file=output)
    print("lost too", file=output, flush=True)
    assert not output.isatty()


def writes_ascii() -> None:
    buffer = io.BytesIO()
    output = SafeOutput(io.TextIOWrapper(buffer, encoding="ascii"))
    print("2 × 4 – 界", file=output, flush=True)
    assert buffer.getvalue() == b"2 x 4 - ?\n"


OUTPUTS: dict[str, Callable[[], None]] = {
    "a standard output that is closed, or a pipe whose reader has gone": goes_on_without_output,
    "a standard output that writes ASCII alone": writes_ascii,
}
TABLE = rows("docs/config.md", "What is answered")


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_what_the_table_says_is_answered(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if row.what in OUTPUTS:
        OUTPUTS[row.what]()
        return
    (quoted,) = re.findall(r"`([^`]+)`", row.answer)
    assert quoted in REFUSALS[row.what](tmp_path, monkeypatch)


def test_over_a_runs_config_a_model_of_the_same_sizes_and_a_whole_section_are_taken(tmp_path: Path) -> None:
    """A run's export has its sizes, written out. Another name once took the fields of the run's model, and no other."""
    write_config_of_a_run(file := tmp_path / "config.json")
    shape = shape_of(parse(load_raw(file), resolve=resolve))
    (tmp_path / "export").mkdir()
    exported = {"model_type": "qwen3", **shape.exported(), "eos_token_id": 7}
    (tmp_path / "export/config.json").write_text(json.dumps(exported))
    assert read_config(str(file), [f"model.path={tmp_path}/export"], 1).model.path == f"{tmp_path}/export"
    assert shape_of(read_config(str(file), ["model={'name': 'llama-tiny'}"], 1)).model_type == "llama"
    assert shape_of(read_config(str(file), ["model.num_hidden_layers=3"], 1)).num_hidden_layers == 3
    assert "rope_theta" not in refusal_over_a_run(file, "model.name=llama-x")  # the name alone is the problem

    (tmp_path / "export/config.json").write_text(json.dumps(exported | {"rope_theta": 5.0}))
    assert "would stay" in refusal_over_a_run(file, f"model.path={tmp_path}/export")


def test_every_row_has_a_check_and_every_check_a_row() -> None:
    assert {row.what for row in TABLE} == REFUSALS.keys() | OUTPUTS.keys()


def test_a_mode_without_a_size_is_refused_with_sizes_of_this_world_and_model() -> None:
    for mode, world, sizes in (
        ("1d", 4, "2 or 4"),
        ("1d", 3, "2, 4 or 8, with a multiple of that many processes"),
        ("2d", 8, "4"),
        ("3d", 8, "8"),
        ("2.5d", 4, "4"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse({"parallel": {"tensor": mode}}, world_size=world, resolve=resolve)
        assert f"Try size={sizes}." in str(caught.value)
    raw = apply_overrides({}, ["parallel.tensor=1d", "parallel.tensor.size=2"])
    assert parse(raw, resolve=resolve).parallel.tensor.size == 2


HOSTILE = [10**400, -(10**400), 10**18, "9" * 400, "9" * 400 + "GiB", "x" * 10**6, "\ud800", "a\0b", [[[]]] * 9, 1e308]


@pytest.mark.parametrize("section", KEYS)
def test_no_value_of_a_key_raises_anything_but_a_config_error_or_takes_a_second(section: str) -> None:
    for key in KEYS[section]:
        for value in HOSTILE:
            began, message = time.monotonic(), f"{section}."
            try:
                parse({section: {key: value}}, world_size=8, resolve=resolve)
            except ConfigError as error:
                message = str(error)
            assert time.monotonic() - began < patient(ANSWER_SECONDS), (key, value)
            assert re.match(rf"{section}\.|model\.|parallel", message), message
            assert max(map(len, message.split())) <= 2 * SHOWN, "a message repeats a value"


WORDS = [
    "1d",
    "2d",
    "2.5d",
    "3d",
    "sequence",
    "gpipe",
    "interleaved",
    "zero_bubble_v",
    "ring",
    "auto",
    "cpu",
    "opt-125m",
    "",
    "6GiB",
    "nan",
    "é",
    "none",
]
NUMBERS = [0, 1, 2, 3, 4, 6, 7, 8, 12, 16, 60, 97, 128, 1000, 4095, 2**20, 2**20 - 1, 2**40, 2**40 - 87, 2**63, 10**18]


SHAPE_FIELDS = tuple(key.name for key in fields(OPTShape))


def drawn_value(rng: random.Random, depth: int = 0) -> Any:
    """Return a value of any kind, dicts and lists of values among them."""
    kind = rng.randrange(10 if depth < 4 else 7)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(WORDS)
    if kind == 6:
        return rng.choice([None, True, False, -1, 0.5, 1e300, float("inf"), float("nan"), 1 + 2j, b"", ...])
    if kind == 7:
        return [drawn_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = ["size", "mode", "depth", "rows", "layers", "kind", "schedule", "chunks"]
    return {rng.choice(keys): drawn_value(rng, depth + 1) for _ in "123"}


def drawn_config(rng: random.Random) -> dict[str, Any]:
    """Return a config of a few keys, most of them known, with any values."""
    raw: dict[str, Any] = {}
    for _ in range(rng.randint(1, 6)):
        section = rng.choice([*KEYS, "parallel", "parallel", "model"])
        fields = SHAPE_FIELDS if section == "model" else ()
        key = rng.choice([*KEYS[section], *fields, "lr", "size", "learning_rate"])
        raw.setdefault(section, {})[key] = drawn_value(rng)
    if rng.random() < 0.1:
        raw[rng.choice(["modle", "train", "gradient_accumulation_steps"])] = drawn_value(rng)
    return raw


def test_two_thousand_drawn_configs_are_valid_or_refused_by_their_keys_each_within_a_second() -> None:
    rng = random.Random(0)
    num_valid, slowest = 0, 0.0
    for _ in range(2000):
        raw = drawn_config(rng)
        began = time.monotonic()
        try:
            parse(raw, world_size=rng.choice([None, 1, 8, 96, 2**20]), resolve=resolve)
            num_valid += 1
        except ConfigError as error:
            for problem in error.problems:
                assert re.match(r"[\w.-]+: ", problem), problem
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < patient(ANSWER_SECONDS)
    assert num_valid > 10, "nearly all drawn configs are refused: what is valid is not tried"


def test_json_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    words = refusal_of_file(tmp_path / "config.json", "[" * 100_000)
    assert "nested too deep" in words or "not JSON" in words
    deep = json.dumps({"model": {"name": "opt-tiny"}})[:-1] + ', "data": ' + '{"a":' * 50 + "1" + "}" * 51
    (tmp_path / "config.json").write_text(deep)
    assert "nested more than 20 deep" in refusal(load_raw(tmp_path / "config.json"))


@pytest.mark.parametrize("name", ["no\0file.py", "x" * 300 + ".py", "a/" * 3000 + "c.py", ".py.**"])
def test_a_name_that_no_config_file_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_raw(tmp_path / name)


def test_divisors_are_found_as_by_trying_every_number() -> None:
    for value in range(1, 500):
        assert divisors(value) == [n for n in range(1, value + 1) if value % n == 0]


SMALL = [
    "train.steps=2",
    "train.device=cpu",
    "data.sequence_length=32",
    "train.global_batch_size=2",
    "output.export=False",
]


@pytest.mark.parametrize("redirect", ["| head -n 1", ">&-"])
def test_a_run_whose_output_is_closed_ends_with_its_metrics_and_code_0(redirect: str, tmp_path: Path) -> None:
    command = f"'{sys.executable}' launch.py --set {' '.join(SMALL)} output.dir='{tmp_path}/run' {redirect}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=patient(120),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
