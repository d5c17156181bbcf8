"""Generated texts equal Hugging Face's `generate` token for token, and are the same in every layout."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.generation.decoding import Decoder, TextLimits
from models.generation.job import Request, continued, generate, prepare
from models.generation.layout import config_for
from models.generation.prompts import read_prompts
from models.generation.sampling import Sampler, Sampling, filtered, index_of_largest
from models.generation.step import Prompt
from models.generation.text_generator import Continuation, Options, TextGenerator
from models.generation.trained_model import TrainedModel, find_trained_model
from models.shapes import from_hugging_face
from models.tokenizer import ByteTokenizer, load_tokenizer
from parallel.engine.context import Place, make_context
from parallel.errors import ConfigError, DataError
from tests.chat_templates import TEMPLATES, save_tokenizer, theirs
from tests.families import FAMILIES, SHAPES, VARIANTS, family_of
from tests.harness import run
from tests.parity import save_model
from tests.patience import LIMIT
from training.config import read_config
from training.preflight import check_compiler
from training.preflight import prepare as prepare_run
from training.run import run_job

PROMPTS = [[2, 5, 7], [9, 11, 13, 17, 4, 6, 8, 22], [3]]
NEW = 14  # longer than every window; 22 positions in all
SAMPLED = Sampling(temperature=1.5, top_k=30, top_p=0.95, seed=3)
PAD = 1


def model_in(folder: Path, name: str) -> Path:
    """Save a tiny model of `tests.families` that has positions for the texts of these tests."""
    fields = SHAPES[name]
    longer = {key: 32 for key in ("max_position_embeddings", "n_positions") if fields.get(key) == 16}
    return save_model(folder / name, family_of(name), **(fields | longer))


def trained_in(path: Path) -> TrainedModel:
    """Return the model of a folder for token ids: no text is needed here."""
    return TrainedModel(path, from_hugging_face(path), ByteTokenizer(), "bytes", frozenset(), "fp32")


def texts_of(
    rank: int, world_size: int, path: Path, sections: dict[str, Any], dtype: str, samplings: list[Sampling]
) -> list[list[list[int]]]:
    """Return the new tokens of PROMPTS on a rank, for each sampling: of the prompts that its replica is given."""
    trained = trained_in(path)
    settings = [f"{key}={value!r}" for key, value in sections.items()]
    config = config_for(trained, None, settings, dtype=dtype, world_size=world_size)
    context = make_context(config, Place(rank, world_size, rank, world_size))
    data = context.mesh.axis("data")
    prompts = [Prompt(number, ids) for number, ids in enumerate(PROMPTS)][data.rank :: data.size]
    model = trained.load(context)
    found = [Decoder(model, TextLimits(NEW, 32), sampling).continue_texts(prompts) for sampling in samplings]
    context.mesh.close()
    return found


def greedy(path: Path) -> list[list[int]]:
    """Return the most likely tokens after each of PROMPTS, in one process in fp32."""
    (found,) = texts_of(0, 1, path, {}, "fp32", [Sampling()])
    return found


def hugging_face(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def padded_on_the_left(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and mask, as Hugging Face's `generate` needs prompts of different lengths."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])


# -- against Hugging Face ----------------------------------------------------------------------------------------------


def assert_greedy_texts_are_equal(folder: Path, name: str) -> None:
    """Compare prompts of three lengths. The weights are drawn so wide that no two logits are nearly equal."""
    path = model_in(folder, name)
    ids, mask = padded_on_the_left(PROMPTS)
    with torch.no_grad():
        theirs = hugging_face(path).generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=PAD
        )
    assert greedy(path) == theirs[:, ids.shape[1] :].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_texts_of_prompts_of_different_lengths_equal_hugging_faces(tmp_path: Path, family: str) -> None:
    """The windows of Mistral and Qwen2, of 3 and 2 tokens, are shorter than every text."""
    assert_greedy_texts_are_equal(tmp_path, family)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*VARIANTS, "opt-projected"])
def test_greedy_texts_of_what_else_a_family_can_be_equal_hugging_faces(tmp_path: Path, name: str) -> None:
    assert_greedy_texts_are_equal(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["dynamic", "linear", "llama3"])
def test_a_greedy_text_with_scaled_rotary_positions_equals_hugging_faces(tmp_path: Path, scaling: str) -> None:
    """Dynamic scaling changes the angles with each token after the 16th; earlier keys keep theirs."""
    rope = dict(rope_type=scaling, rope_theta=100.0, factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope |= dict(original_max_position_embeddings=8) if scaling == "llama3" else {}
    used = rope if scaling == "llama3" else {key: rope[key] for key in ("rope_type", "rope_theta", "factor")}
    path = save_model(tmp_path / "model", "llama", **(SHAPES["llama"] | dict(rope_parameters=used)))
    ids = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        theirs = hugging_face(path).generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert greedy(path)[1] == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.gpu
def test_a_text_ends_where_hugging_face_ends_it(tmp_path: Path) -> None:
    """One of several end tokens, at another place in each text. Rows that have ended do not end the others."""
    path = model_in(tmp_path, "llama")
    free = greedy(path)
    ends = {free[0][3], free[1][9]}
    ids, mask = padded_on_the_left(PROMPTS)
    with torch.no_grad():
        theirs = hugging_face(path).generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=sorted(ends), pad_token_id=PAD
        )
    wanted = []
    for row in theirs[:, ids.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), None)
        wanted.append(row[:end])
    trained = trained_in(path)
    context = make_context(config_for(trained, None, [], dtype=None, world_size=1), Place())
    prompts = [Prompt(number, prompt) for number, prompt in enumerate(PROMPTS)]
    assert Decoder(trained.load(context), TextLimits(NEW, 32, ends), Sampling()).continue_texts(prompts) == wanted
    assert {len(text) for text in wanted} > {3}


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.7), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8), Sampling(1.3, top_k=9, top_p=0.6)],
    ids=["temperature", "top-k", "top-p", "both"],
)
def test_the_tokens_that_can_be_drawn_are_those_of_hugging_faces_processors(sampling: Sampling) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 3
    wanted: Any = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k is not None:
        wanted = TopKLogitsWarper(sampling.top_k)(None, wanted)
    if sampling.top_p < 1:
        wanted = TopPLogitsWarper(sampling.top_p)(None, wanted)
    torch.testing.assert_close(filtered(logits, sampling).softmax(-1), wanted.softmax(-1))


# -- draws -------------------------------------------------------------------------------------------------------------


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """A share of p in 40,000 draws has the deviation √(p (1 − p) / 40,000) < 0.0025; five of them are allowed."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    draws = 40_000
    found = Sampler(Sampling(1.0, seed=5), logits.device)(
        logits.expand(draws, -1), torch.arange(draws) // 200, torch.arange(draws) % 200
    )
    shares = torch.bincount(found, minlength=4) / draws
    assert (shares - logits.softmax(-1)).abs().max() < 0.0125


def test_a_draw_depends_on_seed_sample_and_position_and_on_nothing_beside_it() -> None:
    logits = torch.zeros(1, 1000).expand(3, -1)

    def draw(seed: int, samples: list[int], positions: list[int]) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed), logits.device)
        found: list[int] = sampler(logits[: len(samples)], torch.tensor(samples), torch.tensor(positions)).tolist()
        return found

    three = draw(0, [4, 5, 6], [7, 7, 8])
    assert draw(0, [6, 4], [8, 7]) == [three[2], three[0]]
    assert len({*three, *draw(1, [4], [7]), *draw(0, [4], [8]), *draw(0, [7], [4])}) == 6


@pytest.mark.parametrize("temperature", [1e-40, 0.0])
def test_a_temperature_near_zero_takes_the_most_likely_token(temperature: float) -> None:
    """Logits divided by 1e-40 are infinite, and their softmax is NaN."""
    logits = torch.tensor([[3.0, 5.0, 4.0]])
    sampler = Sampler(Sampling(temperature), logits.device)
    assert sampler(logits, torch.tensor([0]), torch.tensor([0])).tolist() == [1]


@pytest.mark.parametrize("count", [1, 5, 63, 64, 65, 1000])
def test_compiled_code_takes_the_first_of_the_largest_logits(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    generator = torch.Generator().manual_seed(count)
    scores = torch.randint(-9, 9, (50, count), generator=generator).float()
    scores[scores < -6] = -torch.inf
    assert index_of_largest(scores).tolist() == [row.index(max(row)) for row in scores.tolist()]


@pytest.mark.slow
@pytest.mark.timeout(2 * 1800)
@pytest.mark.parametrize("name", ["opt", "mistral"])
def test_compiled_texts_equal_eager_ones(tmp_path: Path, name: str) -> None:
    """Compiled are blocks, embedding, and the choice of a token. In fp64 no two sums are as close as rounding."""
    try:
        check_compiler(torch.device("cpu"))
    except ConfigError as error:
        pytest.skip(str(error))
    path, samplings = model_in(tmp_path, name), [Sampling(), SAMPLED]
    on_cpu = {"train.device": "cpu"}
    wanted = texts_of(0, 1, path, on_cpu, "fp64", samplings)
    compiled = on_cpu | {"train.compile": True}
    assert run(texts_of, 1, path, compiled, "fp64", samplings, timeout=3 * LIMIT) == [wanted]


# -- layouts -----------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1d2": (2, {"parallel.tensor": dict(mode="1d", size=2)}),
    "1d2-sp": (2, {"parallel.tensor": dict(mode="1d", size=2, sequence_parallel=True)}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "pp2-interleaved": (2, {"parallel.pipeline": dict(size=2, schedule="interleaved")}),
    "zero3": (2, {"zero.stage": 3}),
    "2d4": (4, {"parallel.tensor": dict(mode="2d", size=4)}),
    "dp2-pp2": (4, {"parallel.pipeline": 2}),
    "pp2-1d2": (4, {"parallel.pipeline": 2, "parallel.tensor": dict(mode="1d", size=2)}),
    "pp1-interleaved": (1, {"parallel.pipeline": dict(size=1, schedule="interleaved", chunks=3)}),
    "pp2-zbv": (2, {"parallel.pipeline": dict(size=2, schedule="zero_bubble_v")}),
    "pp2-zbv-zero3": (4, {"parallel.pipeline": dict(size=2, schedule="zero_bubble_v"), "zero.stage": 3}),
    "zero3-1d2": (4, {"zero.stage": 3, "parallel.tensor": dict(mode="1d", size=2)}),
    "2.5d8": (8, {"parallel.tensor": dict(mode="2.5d", size=8, depth=2)}),
    "3d8": (8, {"parallel.tensor": dict(mode="3d", size=8)}),
}
FEW = ("1d2-sp", "pp2", "pp2-zbv", "zero3", "2d4")


def assert_texts_are_those_of_one_process(folder: Path, name: str, layout: str) -> None:
    """Compare greedy and drawn texts, in fp64: then no two sums are as close as rounding."""
    path = model_in(folder, name)
    world_size, sections = LAYOUTS[layout]
    of_ranks = run(texts_of, world_size, path, sections, "fp64", [Sampling(), SAMPLED])
    for number, wanted in enumerate(texts_of(0, 1, path, {}, "fp64", [Sampling(), SAMPLED])):
        found = [texts[number] for texts in of_ranks]
        assert all(texts in (wanted, wanted[0::2], wanted[1::2]) for texts in found)  # of all prompts, or of a replica
        assert sum(map(len, found)) % len(wanted) == 0


@pytest.mark.parametrize("layout", FEW)
def test_texts_are_the_same_in_every_layout(tmp_path: Path, layout: str) -> None:
    assert_texts_are_those_of_one_process(tmp_path, "mistral", layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in FEW])
def test_texts_are_the_same_in_every_larger_layout(tmp_path: Path, layout: str) -> None:
    assert_texts_are_those_of_one_process(tmp_path, "mistral", layout)


def texts_of_replicas(rank: int, world_size: int, path: Path, settings: list[str]) -> list[Continuation]:
    place = Place(rank, world_size, rank, world_size)
    options = Options(12, SAMPLED, batch_size=2)
    request = Request(path, ["The ", "A", "of text", "xy", "z"], options=options, assignments=settings)
    return generate(prepare(request, place, world_size), place)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["zero.stage=3"], ["parallel.pipeline=2"]], ids=["whole", "zero3", "pp2"])
def test_replicas_share_the_prompts_and_all_ranks_have_all_texts_in_order(export: Path, settings: list[str]) -> None:
    """Five prompts on four replicas, two at a time: some have one batch more than others, in which they repeat one."""
    (wanted,) = [texts_of_replicas(0, 1, export, [])]
    assert run(texts_of_replicas, 4, export, settings) == [wanted] * 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt-projected", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("layout", ["pp2", "2d4", "3d8"])
def test_texts_of_other_families_are_the_same_in_every_layout(tmp_path: Path, name: str, layout: str) -> None:
    assert_texts_are_those_of_one_process(tmp_path, name, layout)


# -- from folder to text -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the export of a model of bytes with random weights."""
    fields = SHAPES["llama"] | dict(vocab_size=260, max_position_embeddings=32)
    path = save_model(tmp_path_factory.mktemp("models") / "export", "llama", **fields)
    ByteTokenizer().save(path)
    return path


def texts(folder: Path, prompts: list[str], **options: Any) -> list[Continuation]:
    return continued(Request(folder, prompts, options=Options(**({"num_tokens": 12} | options))))


def test_a_text_is_the_same_beside_others_and_in_smaller_batches(export: Path) -> None:
    prompts = ["The ", "A", "of text", "xy"]
    together = texts(export, prompts, sampling=SAMPLED)
    assert texts(export, prompts, sampling=SAMPLED, batch_size=3) == together
    assert texts(export, prompts[:1], sampling=SAMPLED) == together[:1]
    assert len({text.text for text in together}) == 4


@pytest.mark.gpu
def test_a_second_batch_in_the_memory_of_the_first_has_the_same_texts(export: Path) -> None:
    """The first one's longer texts have left keys and values behind those of the second."""
    long, short = ["a longer text", "xy", "A", "b"], ["z", "The "]
    apart = [texts(export, [prompt], sampling=Sampling()) for prompt in short]
    assert texts(export, long[:2] + short, batch_size=2)[2:] == [text for (text,) in apart]


def test_a_text_ends_before_a_stop_with_the_token_that_completed_it(export: Path) -> None:
    (free,) = texts(export, ["The "])
    characters = ByteTokenizer().decode(free.tokens[4:6])
    (found,) = texts(export, ["The "], stops=("nothing of it", characters))
    assert found == Continuation(free.text[: free.text.index(characters)], free.tokens[: len(found.tokens)], "stop")
    assert characters in ByteTokenizer().decode(found.tokens)
    assert characters not in ByteTokenizer().decode(found.tokens[:-1])


def test_a_text_ends_with_the_models_positions(export: Path) -> None:
    """A text of 32 tokens has no position left; the shorter prompt beside it goes on."""
    long, short = texts(export, ["x" * 30, "x" * 19])
    assert (len(long.tokens), long.ended) == (2, "positions")
    assert (len(short.tokens), short.ended) == (12, "tokens")
    with pytest.raises(DataError, match=r"prompt 2 has 32 tokens, and the model has 32 positions\. Shorten it to at"):
        texts(export, ["x", "x" * 32])


def test_prompts_of_a_file_are_answered_in_order(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from colonnade.cli import main

    given, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    given.write_text('{"prompt": "The "}\n\n{"prompt": "A"}\n')
    wanted = texts(export, ["The ", "A"])
    options = ["--prompts", str(given), "--tokens", "12", "--temperature", "0"]
    assert main(["generate", str(export), *options, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["The ", "A"]
    assert [Continuation(line["text"], line["tokens"], line["ended"]) for line in lines] == wanted
    assert main(["generate", str(export), "--prompt", "The ", *options[2:]]) == 0
    assert capsys.readouterr() == (f"The {wanted[0].text}\n", "")
    assert main(["generate", str(export), "--prompt", "x" * 30, *options[2:]]) == 0
    assert capsys.readouterr().err == "cut at the model's 32 positions: text 1\n"


def test_a_line_of_a_file_of_prompts_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    """Python's `splitlines` also ends one at U+2028 and U+0085, which JSON leaves as they are within a text."""
    records, lines = tmp_path / "prompts.jsonl", tmp_path / "prompts.txt"
    records.write_bytes('\ufeff{"prompt": "one\u2028line\x85"}\r\n\r\n{"prompt": "two"}'.encode())
    lines.write_bytes("\ufeffone\u2028line\x85\r\n\r\ntwo\n".encode())
    assert read_prompts(lines) == ["one\u2028line\x85", "two"]
    assert read_prompts(records) == read_prompts(lines)


def test_a_prompt_that_has_no_tokens_is_refused_with_its_number(export: Path) -> None:
    """JSON can write half of a surrogate pair, and Python makes halves of the bytes of an argument that are no text."""
    with pytest.raises(
        DataError, match=r"prompt 2: it has the character '\\udcff', which is half of a surrogate pair, or"
    ):
        prepare(Request(export, ["a", b"b\xff".decode(errors="surrogateescape")]), Place(), 1)


@pytest.mark.parametrize("name", ["missing/texts.jsonl", ""])
def test_an_output_that_cannot_be_written_is_refused_before_texts_are_made_for_it(
    export: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from colonnade.cli import main

    monkeypatch.setattr("models.generation.job.generate", lambda *_, **__: pytest.fail("texts are made"))
    assert main(["generate", str(export), "--prompt", "a", "--out", str(tmp_path / name)]) == 2
    assert f"--out: cannot write {tmp_path / name}: " in capsys.readouterr().err


def test_a_stop_of_no_text_which_every_text_contains_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from colonnade.cli import main

    with pytest.raises(SystemExit):
        main(["generate", "a_folder", "--prompt", "a", "--stop", ""])
    assert "argument --stop: an empty text is in every text" in capsys.readouterr().err


def test_what_is_told_of_a_growing_text_stays(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither half a character is told, nor the beginning of a stop, which is no part of the text once it is whole."""
    ids, told = ByteTokenizer().encode("an END of é, END.").tolist(), list[str]()

    def scripted(decoder: Decoder, prompts: list[Prompt], *, listener: Callable[[list[list[int]]], None]) -> Any:
        for count in range(len(ids) + 1):
            listener([ids[:count]])
        return [ids]

    monkeypatch.setattr(Decoder, "continue_texts", scripted)
    job = prepare(Request(export, ["a"], options=Options(30, stops=("END.",))), Place(), 1)
    (found,) = generate(job, Place(), listener=told.append)
    assert found.text == told[-1] == "an END of é, "
    assert [found.text.startswith(text) for text in told] == [True] * len(told)
    assert "an END of " in told


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 1 is not JSON.*Write one record on each line"),
        ("[]", "line 1 is a list.*Write one record on each line"),
        ('{"text": "a"}', "line 1 has the keys 'text'.*Write one object a line"),
    ],
)
def test_a_file_of_other_records_is_refused_with_the_recipe(
    export: Path, tmp_path: Path, line: str, words: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=f"^--prompts: .*{words}"):
        prepare(Request(export, [], file=file), Place(), 1)


@pytest.mark.parametrize(
    ("settings", "world_size", "words"),
    [
        (["parallel.context=2"], 2, "parallel.context.size: 2 splits a sequence"),
        (["zero.tensor_placement_policy=auto"], 1, "zero.tensor_placement_policy: 'auto' is for training"),
        (["train.seed=1"], 1, "--set train.seed: generation does not read it"),
        (
            ["parallel.tensor=1d", "parallel.tensor.size=5"],
            5,
            "6 is not divisible by tensor.size 5. Try size 2, 3 or 6",
        ),
    ],
)
def test_a_layout_that_cannot_generate_is_refused_by_name(
    export: Path, settings: list[str], world_size: int, words: str
) -> None:
    request = Request(export, ["a"], assignments=settings)
    with pytest.raises(ConfigError, match=words):
        prepare(request, Place(), world_size)


def test_a_run_and_its_checkpoint_generate_what_its_export_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from colonnade.cli import main

    text = tmp_path / "text.txt"
    text.write_text("a text of a few words. " * 20)
    settings = (
        *(f"data.path={text}", "data.validation_fraction=0"),
        *("model.hidden_size=32", "model.ffn_dim=64", "model.num_hidden_layers=2", "data.sequence_length=16"),
        *("train.steps=2", "train.global_batch_size=2", "output.checkpoint_every=2", f"output.dir={tmp_path}/run"),
    )
    run_job(prepare_run(read_config(None, settings, 1), Place()))
    of_export = texts(tmp_path / "run" / "export", ["The ", "A"], sampling=SAMPLED)
    assert texts(tmp_path / "run", ["The ", "A"], sampling=SAMPLED) == of_export
    assert texts(tmp_path / "run" / "checkpoints" / "step_000002", ["The ", "A"], sampling=SAMPLED) == of_export
    assert find_trained_model(tmp_path / "run").is_checkpoint
    assert (
        find_trained_model(tmp_path / "run" / "checkpoints" / "latest").folder
        == find_trained_model(tmp_path / "run").folder
    )
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "--prompt", "The ", "--tokens", "2"]) == 0
    assert capsys.readouterr().err == f"reading {tmp_path / 'run' / 'checkpoints' / 'step_000002'}\n"
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        find_trained_model(tmp_path / "nowhere")


@pytest.mark.parametrize("chat", [True, False])
def test_the_model_is_given_the_tokens_that_transformers_makes_of_a_prompt(tmp_path: Path, chat: bool) -> None:
    """The chat template writes messages; plain text has before it what the tokenizer puts there."""
    folder = save_tokenizer(tmp_path / "model", TEMPLATES["qwen2"])
    save_model(folder, "llama", **(SHAPES["llama"] | dict(vocab_size=1024, max_position_embeddings=128)))
    request = Request(folder, ["Who is there?"], chat=chat)
    reference = theirs(folder)
    messages = [{"role": "user", "content": "Who is there?"}]
    wanted = reference("Who is there?").input_ids
    if chat:
        wanted = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert [list(ids) for ids in prepare(request, Place(), 1).tokens] == [wanted]


def test_messages_of_a_file_are_read_as_in_training(tmp_path: Path) -> None:
    """Tools were once left out, and a content in parts was written as Python shows a list."""
    folder = save_tokenizer(tmp_path / "model", TEMPLATES["qwen2"])
    save_model(folder, "llama", **(SHAPES["llama"] | dict(vocab_size=1024, max_position_embeddings=1024)))
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    parts = [{"type": "text", "text": "Who is "}, {"type": "text", "text": "there?"}]
    file = tmp_path / "prompts.jsonl.gz"
    record = {"messages": [{"role": "user", "content": parts}], "tools": tools}
    file.write_bytes(gzip.compress(json.dumps(record).encode()))
    messages = [{"role": "user", "content": "Who is there?"}]
    wanted = theirs(folder).apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    assert [list(ids) for ids in prepare(Request(folder, [], file=file), Place(), 1).tokens] == [wanted]

    file.write_bytes(gzip.compress(json.dumps({"messages": [{"role": "gpt", "content": "a"}]}).encode()))
    with pytest.raises(DataError, match="prompt 1: message 1 of `messages` has the role 'gpt'"):
        prepare(Request(folder, [], file=file), Place(), 1)


def test_a_stop_that_names_a_special_token_ends_a_text_with_it(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "model", TEMPLATES["qwen2"])
    texts = TextGenerator(
        replace(trained_in(model_in(tmp_path, "llama")), tokenizer=load_tokenizer(str(folder))), Options()
    )
    assert not texts.ends
    end = texts.tokenizer.vocabulary()["<|im_end|>"]
    stopping = Options(stops=("<|im_end|>", "b"))
    named = TextGenerator(replace(trained_in(tmp_path / "llama"), tokenizer=load_tokenizer(str(folder))), stopping)
    assert (set(named.ends), named.stops) == ({end}, ["b"])


def test_chat_without_a_template_is_refused(export: Path) -> None:
    with pytest.raises(DataError, match="has no chat template, which --chat and prompts of messages need"):
        prepare(Request(export, ["a"], chat=True), Place(), 1)
