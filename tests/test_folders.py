"""Folders that users bring as models are read as transformers reads them, or refused by the name of the file."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import models
import parallel
from models.generation.job import Request, continued
from models.generation.text_generator import Continuation, Options
from models.shapes import from_hugging_face, resolve
from models.tokenizer import ByteTokenizer
from models.weight_files import files_of
from parallel.config import parse
from parallel.engine.context import Place, make_context
from parallel.errors import CheckpointError, ColonnadeError, ConfigError, DataError, ModelError
from tests.harness import run
from tests.tables import Row, rows
from tests.test_loop import ALONE
from tests.test_texts import refusal
from training.config import read_config
from training.preflight import Job, prepare
from training.run import run_job

PAGE, HEADING = "docs/models.md", "Model folders"
SHAPE: dict[str, Any] = dict(vocab_size=260, hidden_size=8, word_embed_proj_dim=8, num_attention_heads=2, ffn_dim=8)
SHAPE |= dict(num_hidden_layers=1, max_position_embeddings=16, dropout=0.0, init_std=1.0)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.decoder.embed_tokens.weight"
IDS = torch.arange(8)[None] + 4
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def model_in(folder: Path, **shape: Any) -> Path:
    """Save a Hugging Face OPT with random weights."""
    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig(**SHAPE | shape)).save_pretrained(folder)
    return folder


def changed(folder: Path, **tensors: Tensor | None) -> Path:
    """Replace or, for None, take out tensors of the weight file; `__` in a name stands for a dot."""
    stored = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        stored |= {name.replace("__", "."): tensor} if tensor is not None else {}
        if tensor is None:
            del stored[name.replace("__", ".")]
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def job_of(folder: Path, path: Path | str, *assignments: str) -> Job:
    small = ("data.sequence_length=8", "train.steps=1", "train.global_batch_size=2", "lr_scheduler.warmup_steps=0")
    named = (f"model.path={path}", f"output.dir={folder}/run", "data.validation_fraction=0")
    return prepare(read_config(None, [*small, *named, *assignments], 1), ALONE)


def messages_of(folder: Path, path: Path, *assignments: str) -> str:
    return "\n".join(job_of(folder, path, *assignments).messages)


def loss_of(path: Path, **model: Any) -> float:
    """Return our loss of the model in a folder, as a user's own script computes it."""
    raw = dict(
        model=dict(path=str(path), **model),
        data=dict(sequence_length=8),
        train=dict(global_batch_size=1, micro_batch_size=1, device="cpu"),
    )
    context = parallel.launch_from_torch(raw)
    return parallel.Engine(models.build(context), context).evaluate([{"input_ids": IDS}])


def theirs(path: Path) -> float:
    """Return Hugging Face's loss."""
    with torch.no_grad():
        found: float = OPTForCausalLM.from_pretrained(path).eval()(input_ids=IDS, labels=IDS).loss.item()
    return found


def assert_right(path: Path, **model: Any) -> None:
    # fp32 on both sides: a mean of seven numbers near 10, each a sum of eight products.
    assert loss_of(path, **model) == pytest.approx(theirs(path), rel=1e-5)


def refused(folder: Path, path: Path | str, *, error: type[ColonnadeError] = DataError) -> str:
    """Return the message with which a run and a user's own script refuse a model folder."""
    said = refusal(lambda: job_of(folder, path), error)
    assert refusal(lambda: loss_of(Path(path)), error) == said
    return said


# -- a check for each row: it returns the messages in which the quoted words must stand --------------------------------


def no_weights(folder: Path) -> str:
    path = folder / "model"
    OPTConfig(**SHAPE).save_pretrained(path)
    for name in ("README.md", "merges.txt", "vocab.json", "training_args.bin", ".gitattributes", "LICENSE"):
        (path / name).write_text("{}")
    (path / "runs").mkdir()
    assert not files_of(path)
    assert loss_of(path) != loss_of(path, init_std=0.5)
    said = messages_of(folder, path)
    assert f"{path} has none" in said
    return said


def part_of_a_download(folder: Path) -> str:
    names = (f"{WEIGHTS}.incomplete", ".cache/huggingface/download/6xT.incomplete", f"{WEIGHTS}.part", "m.crdownload")
    for number, name in enumerate(names):
        path = model_in(folder / str(number))
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / WEIGHTS).rename(path / name)
        said = refused(folder, path)
        assert Path(name).name in said
    return said


def dangling_link(folder: Path) -> str:
    path = model_in(folder / "model")
    (path / WEIGHTS).rename(path / "blob")
    (path / WEIGHTS).symlink_to(path / "nowhere")
    assert "which does not exist" in refused(folder, path)
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).symlink_to("blob")
    assert_right(path)
    (path / "blob").rename(path / "moved.bin")
    return refused(folder, path)


def unusable(content: bytes) -> Callable[[Path], str]:
    def check(folder: Path) -> str:
        path = model_in(folder / "model")
        (path / WEIGHTS).write_bytes(content)
        said = refused(folder, path)
        assert f"{path / WEIGHTS} {said.split(f'{WEIGHTS} ')[1]}" in said
        return said

    return check


def other_formats(folder: Path) -> str:
    names = ["pytorch_model.bin", "model.pt", "flax_model.msgpack", "tf_model.h5", "model-Q4.GGUF", "weights/x.pth"]
    names += ["pytorch_model.bin.index.json", "consolidated.00.pth", "model.safetensors.gz", "model.ckpt", "model.zip"]
    for number, name in enumerate(names):
        path = model_in(folder / str(number))
        (path / name).parent.mkdir(exist_ok=True)
        (path / WEIGHTS).rename(path / name)
        said = refused(folder, path)
        assert str(path / name) in said
    beside = model_in(folder / "beside")
    (beside / "pytorch_model.bin").write_bytes(b"as on the hub")
    assert_right(beside)
    return said


def other_name(folder: Path) -> str:
    for name in ("model.fp16.safetensors", "Model.safetensors", "diffusion.safetensors"):
        path = model_in(folder / name)
        (path / WEIGHTS).rename(path / name)
        said = refused(folder, path)
    return said


def shards_in(folder: Path) -> Path:
    """Save a model in several shards."""
    torch.manual_seed(0)
    OPTForCausalLM(OPTConfig(**SHAPE)).save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def no_index(folder: Path) -> str:
    path = shards_in(folder / "model")
    assert_right(path)
    (path / INDEX).unlink()
    return refused(folder, path)


def missing_shard(folder: Path) -> str:
    path = shards_in(folder / "model")
    last = max(path.glob("*.safetensors"))
    last.unlink()
    said = refused(folder, path)
    assert last.name in said
    last.symlink_to(path / "nowhere")
    assert f"{last} is a link to" in refused(folder, path)
    for broken in ("", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}'):
        (path / INDEX).write_text(broken)
        assert INDEX in refused(folder, path)
    return said


def truncated(folder: Path) -> str:
    path = shards_in(folder / "model")
    last = max(path.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1])
    said = refused(folder, path)
    assert str(last) in said
    return said


def twice(folder: Path) -> str:
    path = shards_in(folder / "model")
    first, *_, last = sorted(path.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: tensor + 1}, last, metadata={"format": "pt"})
    bare = changed(model_in(folder / "bare"), decoder__final_layer_norm__bias=torch.ones(8))
    assert "model.decoder.final_layer_norm.bias twice" in refused(folder, bare)
    return refused(folder, path)


def missing_tensors(folder: Path) -> str:
    none = dict.fromkeys([f"model__decoder__layers__0__fc1__{part}" for part in ("weight", "bias")])
    return refused(folder, changed(model_in(folder / "model"), **none))


def left_over(folder: Path) -> str:
    version = changed(model_in(folder / "old"), model__decoder__version=torch.tensor([3.0]))
    assert_right(version)
    more = {f"model__decoder__layers__1__fc1__{part}": torch.ones(8) for part in ("weight", "bias")}
    return refused(folder, changed(model_in(folder / "model"), **more))


def quantized(folder: Path) -> str:
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.uint8):
        name = str(dtype).removeprefix("torch.")
        path = changed(model_in(folder / name), model__decoder__layers__0__fc1__bias=torch.zeros(8).to(dtype))
        said = refused(folder, path)
    return said


def with_config(folder: Path, **values: Any) -> Path:
    """Change values of config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def quantization(folder: Path) -> str:
    path = with_config(model_in(folder / "model"), quantization_config={"quant_method": "fp8"})
    return refused(folder, path, error=ConfigError)


def null_field(folder: Path) -> str:
    assert_right(with_config(model_in(folder / "width"), word_embed_proj_dim=None))
    assert_right(with_config(model_in(folder / "padding"), pad_token_id=None))
    return refused(folder, with_config(model_in(folder / "null"), hidden_size=None), error=ConfigError)


def several_ends(folder: Path) -> str:
    path = with_config(model_in(folder / "list"), eos_token_id=[2, 5])
    assert_right(path)
    assert from_hugging_face(path).end_tokens == (2, 5)
    return ""


def adapter(folder: Path) -> str:
    path = model_in(folder / "model")
    (path / "adapter_config.json").write_text("{}")
    return refused(folder, path)


def same_head(folder: Path) -> str:
    path = model_in(folder / "model")
    embedding = load_file(path / WEIGHTS)[EMBEDDING]
    assert_right(changed(path, lm_head__weight=embedding.clone()))
    return ""


def head_alone(folder: Path) -> str:
    path = model_in(folder / "model")
    loss = theirs(path)
    alone = {HEAD.replace(".", "__"): load_file(path / WEIGHTS)[EMBEDDING], EMBEDDING.replace(".", "__"): None}
    assert_right(changed(path, **alone))
    assert theirs(path) == loss
    with pytest.raises(DataError, match=rf"lacks 1 of 21 tensors: {EMBEDDING}"):
        loss_of(path, tie_word_embeddings=False)
    return ""


def own_head(folder: Path) -> str:
    path = model_in(folder / "model")
    embedding = load_file(path / WEIGHTS)[EMBEDDING]
    other = embedding.clone()
    other[257, 3] += 1e-3
    assert "row 257 differs" in refused(folder, changed(path, lm_head__weight=other))
    assert_right(path, tie_word_embeddings=False)  # Hugging Face's model does not tie them either
    assert "(200, 8)" in refused(folder, changed(path, lm_head__weight=embedding[:200]))
    return refused(folder, changed(path, lm_head__weight=torch.randn(260, 8)))


def untied_head(folder: Path) -> str:
    path = model_in(folder / "model", tie_word_embeddings=False)
    assert HEAD in load_file(path / WEIGHTS)
    assert_right(path)
    ByteTokenizer().save(path)
    model: Any = OPTForCausalLM.from_pretrained(path).eval()
    prompt = torch.from_numpy(ByteTokenizer().encode("ab")).long().unsqueeze(0)
    greedy = model.generate(prompt, max_new_tokens=9, do_sample=False)[0, 2:].tolist()
    assert greedy_text(path, "ab").tokens == [id for id in greedy if id != 2]
    assert "model.tie_word_embeddings=True" in refused(folder, changed(path, lm_head__weight=None))
    return ""


def greedy_text(path: Path, prompt: str) -> Continuation:
    """Return the nine most likely tokens after a prompt."""
    (found,) = continued(Request(path, [prompt], options=Options(9)))
    return found


def another_dtype(folder: Path) -> str:
    path = model_in(folder / "model")
    assert "this run computes" not in messages_of(folder, path)
    assert "are fp32: this run computes in bf16" in messages_of(folder, path, "train.precision=bf16")
    changed(path, **{k.replace(".", "__"): tensor.bfloat16() for k, tensor in load_file(path / WEIGHTS).items()})
    said = messages_of(folder, path)
    assert "are bf16: " in said
    assert "exports fp32" in said
    return said


def differing(rank: int, world_size: int, folder: Path) -> list[str]:
    """Return the refusals of folders that only one of the ranks cannot use, or that the ranks see differently."""
    said = []
    for name in DIFFERING:
        raw = dict(
            model=dict(path=str(folder / name / str(rank))), parallel=dict(pipeline=2), data=dict(sequence_length=8)
        )
        config = parse(raw, world_size=world_size, resolve=resolve)
        context = make_context(config, Place(rank, world_size, rank, world_size))
        said.append(refusal(partial(models.build, context)))
        context.mesh.close()
    return said


DIFFERING = ("weights", "none", "pointer")


def other_ranks(folder: Path) -> str:
    for name in DIFFERING:
        for rank in (0, 1):
            model_in(folder / name / str(rank))
    embedding = load_file(folder / "weights/1" / WEIGHTS)[EMBEDDING]
    changed(folder / "weights/1", lm_head__weight=embedding.clone())
    (folder / "none/1" / WEIGHTS).unlink()
    (folder / "pointer/1" / WEIGHTS).write_bytes(POINTER)
    first, second = run(differing, 2, folder)
    assert first[2] == second[2]
    assert "pointer of Git LFS" in first[2]
    assert "rank 1: no weights" in first[1]
    return first[0]


def hub_name(folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return refused(folder, "facebook/opt-125m", error=ConfigError)


def a_file(folder: Path) -> str:
    path = model_in(folder / "model")
    said = refused(folder, path / WEIGHTS, error=ConfigError)
    assert f"try its directory, '{path}'." in said
    return said


def outer_folder(folder: Path) -> str:
    run_folder, cache = folder / "other", folder / "models--facebook--opt-125m"
    model_in(run_folder / "export")
    model_in(cache / "snapshots" / "0a1b")
    assert f"Try {cache}/snapshots/0a1b." in refused(folder, cache, error=ConfigError)
    assert "The directory has none." in refused(folder, folder, error=ConfigError)
    said = refused(folder, run_folder, error=ConfigError)
    assert f"Try {run_folder}/export." in said
    return said


def generation(folder: Path) -> str:
    """Return nothing; the export's generation config and greedy texts are compared with Hugging Face's."""
    path = model_in(folder / "model")
    ByteTokenizer().save(path)
    model: Any = OPTForCausalLM.from_pretrained(path).eval()
    prompt = ByteTokenizer().encode("ab").tolist()
    free = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None)[0].tolist()
    stop = free[5]
    values = dict(eos_token_id=[3, stop], max_length=7, do_sample=True, temperature=0.5)
    GenerationConfig(**values).save_pretrained(path)
    model = OPTForCausalLM.from_pretrained(path).eval()
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)
    wanted = ByteTokenizer().decode([id for id in tokens[0].tolist() if id != stop])
    assert "ab" + greedy_text(path, "ab").text == wanted
    run_job(job_of(folder, path))
    exported = GenerationConfig.from_pretrained(folder / "run" / "export")
    # The tokenizer's end token is added, since the texts of the training end with it.
    assert {key: getattr(exported, key) for key in values} == values | dict(eos_token_id=[2, 3, stop])
    for broken in ("[]", "{", '{"eos_token_id": "</s>"}'):
        (path / "generation_config.json").write_text(broken)
        with pytest.raises(DataError, match=r"generation_config\.json"):
            job_of(folder, path)
    return ""


def not_saved(folder: Path) -> str:
    parallel.launch_from_torch({})
    model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=4, n_layer=1, n_head=1, n_positions=8))
    model.generation_config.temperature = 0.3  # without do_sample=True
    with pytest.raises(ModelError) as caught:
        parallel.initialize(model)
    model.generation_config.do_sample = True
    engine, *_ = parallel.initialize(model)
    engine.save_pretrained(folder / "export")
    assert GPT2LMHeadModel.from_pretrained(folder / "export").generation_config.temperature == 0.3
    model.generation_config.do_sample = False
    with pytest.raises(CheckpointError, match=r"model\.generation_config: Hugging Face refuses to save it"):
        engine.save_pretrained(folder / "export")
    return str(caught.value)


def too_large_for_fp16(folder: Path) -> str:
    path = changed(model_in(folder / "model"), model__decoder__layers__0__fc2__bias=torch.full((8,), -70000.0))
    assert_right(path)
    raw = dict(model=dict(path=str(path)), train=dict(precision="fp16"), data=dict(sequence_length=8))
    said = refusal(lambda: models.build(parallel.launch_from_torch(raw)))
    assert "model.decoder.layers.0.fc2.bias" in said
    models.build(parallel.launch_from_torch(raw | dict(train=dict(precision="bf16"))))
    changed(path, model__decoder__layers__0__fc2__bias=torch.full((8,), 65000.0))
    models.build(parallel.launch_from_torch(raw))
    return said


def too_large(folder: Path) -> str:
    path = changed(model_in(folder / "model"), model__decoder__layers__0__fc2__bias=torch.full((8,), 70000.0))
    job = job_of(folder, path, "output.export_dtype=fp16", "optimizer.lr=0")
    run_job(job)
    exported = load_file(job.folder.export / WEIGHTS)
    assert exported["model.decoder.layers.0.fc2.bias"].tolist() == [70000.0] * 8
    parallel.launch_from_torch({})
    engine, *_ = parallel.initialize(OPTForCausalLM.from_pretrained(path))
    engine.save_pretrained(folder / "bf16", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError) as caught:
        engine.save_pretrained(folder / "fp16", dtype=torch.float16)
    assert not (folder / "fp16").exists()
    return str(caught.value)


CHECKS: dict[str, Callable[[Path], str]] = {
    "a config.json and no weights": no_weights,
    "a part of a download": part_of_a_download,
    "a link to weights that do not exist": dangling_link,
    "an empty weight file": unusable(b""),
    "a pointer of Git LFS": unusable(POINTER),
    "weights in .bin, .pt, .msgpack, .h5 or .gguf alone": other_formats,
    "weights under another name": other_name,
    "a shard without an index": no_index,
    "an index that names missing shards": missing_shard,
    "a truncated file": truncated,
    "a tensor that is in two files": twice,
    "tensors that are missing": missing_tensors,
    "tensors that the model lacks": left_over,
    "quantized tensors": quantized,
    "a `quantization_config`": quantization,
    "a field of config.json that is null": null_field,
    "several tokens that end a text": several_ends,
    "an adapter": adapter,
    "a head that equals the embedding": same_head,
    "a head alone, whose embedding is not stored": head_alone,
    "a head of its own, in a folder that says that it is tied": own_head,
    "a head of its own, with `tie_word_embeddings=False`": untied_head,
    "weights in another dtype than `train.precision`": another_dtype,
    "files that are not the same on every rank": other_ranks,
    "a model of the hub that is not downloaded": hub_name,
    "a file in place of its folder": a_file,
    "the folder of a run, or of the hub's cache": outer_folder,
    "a generation_config.json": generation,
    "a model of your own whose configs Hugging Face refuses to save": not_saved,
    "weights that are too large for `train.precision`, fp16": too_large_for_fp16,
    "weights that are too large for the dtype of an export": too_large,
}
ROWS = rows(PAGE, HEADING)


def test_every_row_of_the_table_has_a_check() -> None:
    assert [row.what for row in ROWS] == list(CHECKS)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_users_bring_as_a_model_is_treated_as_the_table_says(row: Row, tmp_path: Path) -> None:
    said = CHECKS[row.what](tmp_path)
    quoted = re.findall(r"`([^`]*)`", row.answer)
    assert all(words in said for words in quoted if " " in words), (quoted, said)
