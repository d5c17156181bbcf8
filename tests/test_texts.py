"""Texts and tokenizers that users bring are read as Python and Hugging Face read them, refused, or named."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers import models as kinds
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, OPTConfig, OPTForCausalLM, Qwen2Tokenizer

from models.data import load_tokens
from models.data.sources import find_source
from models.data.texts import Texts
from models.tokenizer import ByteTokenizer, load_tokenizer
from models.tokenizer_files import END_OF_CLASS
from parallel.config import Config, DataConfig, apply_overrides, load_raw, parse
from parallel.engine.context import Place
from parallel.errors import ColonnadeError, ConfigError, DataError
from tests.harness import run
from tests.tables import Row, rows
from tests.test_loop import TINY, prepared
from training.run import run_job

PAGE, HEADING, LENGTHS = "docs/data.md", "Text and tokenizers", "Lengths that do not fit"
WORDS = {"a": 0, "b": 1, "c": 2, "<|end|>": 3, "d": 4}
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast"}


def tokenizer_in(folder: Path, config: Any = None, special: Any = None, words: dict[str, int] = WORDS) -> Path:
    """Save a tokenizer of a few words, whose end token is not id 2."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(PLAIN | {"eos_token": "<|end|>"} if config is None else config)
    )
    if special is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def texts_in(folder: Path, **texts: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def tokens_of(
    path: Path, tokenizer: Path | str = "bytes", vocab_size: int = 260, *, end: int | None = None
) -> list[int]:
    data = DataConfig(path=str(path), tokenizer=str(tokenizer), sequence_length=2, validation_fraction=0.0)
    return list(load_tokens(data, vocab_size, ends=() if end is None else (end,)).tokens.tolist())


def byte_ids(text: str) -> list[int]:
    return list(ByteTokenizer().encode(text).tolist())


def of_folder(path: Path) -> str:
    """Return the assignment of a section `model` in which nothing but the folder is set."""
    return f"model=dict(path={str(path)!r})"


def messages_of(folder: Path, *assignments: str) -> str:
    return "\n".join(prepared(folder / "run", *assignments).messages)


def refusal(function: Callable[[], object], error: type[ColonnadeError] = DataError) -> str:
    """Return the message with which the function refuses what it was given."""
    try:
        found = function()
    except error as caught:
        return str(caught)
    raise AssertionError(f"it was not refused: {found}")


# -- a check for each row: it returns the messages in which the quoted words must stand --------------------------------


def byte_order_mark(folder: Path) -> str:
    text = "é is\n one"
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        file = texts_in(folder, **{encoding: text.encode(encoding)}) / f"{encoding}.txt"
        assert tokens_of(file) == byte_ids(text), encoding
    big = texts_in(folder, big=b"\xfe\xff" + text.encode("utf-16-be")) / "big.txt"
    assert tokens_of(big) == byte_ids(text)
    marked = texts_in(folder / "a", a=b"\xef\xbb\xbf" + b"x" * 99)
    assert "read as" not in messages_of(folder, f"data.path={marked}")
    wide = texts_in(folder / "b", a=("x" * 99).encode("utf-16"))
    return messages_of(folder, f"data.path={wide}")


def other_encoding(folder: Path) -> str:
    odd = texts_in(folder, odd=b"\xff\xfea\x00b") / "odd.txt"
    assert "is not UTF-16-LE: byte 0x62 at position 4" in refusal(lambda: tokens_of(odd))
    return refusal(lambda: tokens_of(texts_in(folder, a=b"caf\xe9 au lait") / "a.txt"))


def zero_bytes(folder: Path) -> str:
    return refusal(lambda: tokens_of(texts_in(folder, a="plain".encode("utf-16-le")) / "a.txt"))


def packed(folder: Path) -> str:
    pointer = texts_in(folder, b=b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n") / "b.txt"
    assert "it begins as a pointer of Git LFS does" in refusal(lambda: tokens_of(pointer))
    return refusal(lambda: tokens_of(texts_in(folder, a=gzip.compress(b"text")) / "a.txt"))


def line_ends(folder: Path) -> str:
    file = texts_in(folder, a=b"one\r\ntwo\rthree\n\r\n" * 9) / "a.txt"
    assert tokens_of(file) == byte_ids(file.read_text(encoding="utf-8"))
    return messages_of(folder, f"data.path={file}")


def empty_among(folder: Path) -> str:
    path = texts_in(folder / "texts", a="x" * 60, b="", c=b"\xef\xbb\xbf", d="y" * 60)
    assert tokens_of(path) == [*byte_ids("x" * 60), 2, *byte_ids("y" * 60)]
    return messages_of(folder, f"data.path={path}")


def nothing_but_empty(folder: Path) -> str:
    assert "is empty" in refusal(lambda: tokens_of(texts_in(folder / "one", a="") / "a.txt"))
    return refusal(lambda: tokens_of(texts_in(folder / "two", a="", b="")))


def other_files(folder: Path) -> str:
    path = texts_in(folder / "texts", a="x" * 99)
    for name in ("b.md", "C.TXT", ".hidden"):
        (path / name).write_text("not read")
    (path / "inner").mkdir()
    said = messages_of(folder, f"data.path={path}")
    assert "C.TXT, b.md, inner" in said
    return said


def dangling(folder: Path) -> str:
    path = texts_in(folder / "texts", a="x")
    (path / "b.txt").symlink_to(path / "nowhere")
    assert "which does not exist" in refusal(lambda: tokens_of(path / "b.txt"))
    return refusal(lambda: tokens_of(path))


def misspelled(folder: Path) -> str:
    path = texts_in(folder, corpus="x") / "corpus.txt"
    for wrong in (f"{path} ", str(path).replace("corpus.txt", "corpis.txt")):
        assert f"Did you mean {str(path)!r}?" in refusal(lambda wrong=wrong: tokens_of(Path(wrong)))  # type: ignore[misc]
    return refusal(lambda: tokens_of(Path(f"{path} ")))


def several(folder: Path) -> str:
    """Return nothing; every way in which Hugging Face's files name the end token is compared with AutoTokenizer."""
    path = texts_in(folder / "texts", a="a b", b="b a", c="c")
    end = {"eos_token": "<|end|>"}
    token = {"eos_token": {"content": "<|end|>", "__type": "AddedToken", "lstrip": False}}
    added = {"3": {"content": "<|end|>", "special": True}}
    ways: list[tuple[Any, Any]] = [
        (PLAIN | end, None),
        (PLAIN | token, None),
        (PLAIN, end),
        (PLAIN | {"eos_token": "d"}, end),
        (PLAIN | {"eos_token": None}, end),
        (PLAIN | end | {"added_tokens_decoder": added}, {"eos_token": "d"}),
    ]
    for number, (config, special) in enumerate(ways):
        tokenizer = tokenizer_in(folder / str(number), config, special)
        wanted = AutoTokenizer.from_pretrained(tokenizer).eos_token_id
        assert wanted == 3
        assert tokens_of(path, tokenizer, 5) == [0, 1, wanted, 1, 0, wanted, 2], (config, special)
    assert tokens_of(path / "a.txt", tokenizer, 5) == [0, 1]
    return ""


def without_end(folder: Path) -> str:
    path, tokenizer = texts_in(folder / "texts", a="a " * 40, b="b " * 40), tokenizer_in(folder / "words", PLAIN)
    assert tokens_of(path, tokenizer, 5, end=4)[40] == 4
    assert "it names no token that ends a text" in refusal(lambda: tokens_of(path, tokenizer, 5))
    assert "it names no token that ends a text" in refusal(lambda: tokens_of(path, tokenizer, 5, end=5))
    said = messages_of(folder, f"data.path={path}", f"data.tokenizer={tokenizer}", "model.eos_token_id=4")
    assert "token 4, 'd'" in said
    return said


def another_end(folder: Path) -> str:
    path, tokenizer = texts_in(folder / "texts", a="a " * 999), tokenizer_in(folder / "words")
    job = prepared(folder / "trained", f"data.path={path}", f"data.tokenizer={tokenizer}", "train.steps=1")
    run_job(job)
    config = OPTConfig.from_pretrained(job.folder.export)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (3, 3, 1)
    assert AutoTokenizer.from_pretrained(job.folder.export).eos_token_id == 3
    return messages_of(folder, f"data.path={path}", f"data.tokenizer={tokenizer}")


def end_not_there(folder: Path) -> str:
    return refusal(lambda: load_tokenizer(str(tokenizer_in(folder / "words", PLAIN | {"eos_token": "</s>"}))))


def added_not_there(folder: Path) -> str:
    config = PLAIN | {"added_tokens_decoder": {"5": {"content": "<new>", "special": True}}}
    assert len(AutoTokenizer.from_pretrained(tokenizer_in(folder / "words", config))) == 6  # it adds the token
    return refusal(lambda: load_tokenizer(str(folder / "words")))


def chat_template(folder: Path) -> str:
    """Return nothing; the tokenizer that AutoTokenizer reads from an export is compared with the original."""
    source, template = folder / "source", "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    original = AutoTokenizer.from_pretrained(tokenizer_in(source))
    original.add_special_tokens({"additional_special_tokens": [AddedToken("<|user|>", lstrip=True)], "pad_token": "d"})
    original.chat_template = {"default": template, "tool_use": "{{ messages[0]['content'] }}"}
    original.save_pretrained(source)
    (source / "special_tokens_map.json").write_text(json.dumps({"bos_token": "c"}))
    original = AutoTokenizer.from_pretrained(source)
    tokenizer, export = load_tokenizer(str(source)), folder / "export"
    for file in sorted(source.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()  # an earlier run is renamed, with what was exported there
    export.mkdir()
    tokenizer.save(export)
    OPTConfig().save_pretrained(export)
    again = AutoTokenizer.from_pretrained(export)
    talk = [{"role": "user", "content": "a <|user|> c"}]
    assert again.chat_template == original.chat_template
    assert again.apply_chat_template(talk) == original.apply_chat_template(talk)
    assert again.special_tokens_map == original.special_tokens_map
    assert again.all_special_ids == original.all_special_ids
    assert again.get_vocab() == original.get_vocab()
    assert type(again) is type(original)
    assert tokenizer.end == original.eos_token_id == 3
    return ""


def special_in_text(folder: Path) -> str:
    """Return nothing; the ids of a text with special tokens are compared with AutoTokenizer's."""
    text, export = "a <|end|> b </s>", folder / "bytes"
    original = AutoTokenizer.from_pretrained(tokenizer_in(folder / "words"))
    original.save_pretrained(folder / "words")  # it marks the end token as special
    export.mkdir()
    ByteTokenizer().save(export)
    for source in (folder / "words", export):
        for splits in (True, False):
            config = json.loads((source / "tokenizer_config.json").read_text()) | {"split_special_tokens": splits}
            (source / "tokenizer_config.json").write_text(json.dumps(config))
            wanted = AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False)["input_ids"]
            assert load_tokenizer(str(source)).encode(text).tolist() == wanted, (source, splits)
            if splits and source == export:
                assert wanted == byte_ids(text)
    return ""


def too_many_ids(folder: Path) -> str:
    return refusal(lambda: tokens_of(texts_in(folder, a="x") / "a.txt", vocab_size=259))


def few_ids(folder: Path) -> str:
    assert "never looked up" not in messages_of(folder, "model.vocab_size=300")
    return messages_of(folder, "model.vocab_size=2000")


def padding(folder: Path) -> str:
    path, tokenizer = texts_in(folder / "texts", a="a b " * 40), tokenizer_in(folder / "words")
    named = (f"data.path={path}", f"data.tokenizer={tokenizer}")
    assert "does not learn" not in messages_of(folder, *named, "model.pad_token_id=4")
    said = messages_of(folder, *named)
    assert "40 of its tokens are 1, model.pad_token_id" in said
    return said


def model_in(folder: Path, **shape: Any) -> Path:
    sizes = dict(vocab_size=260, hidden_size=32, word_embed_proj_dim=32, num_attention_heads=4, ffn_dim=8)
    config = OPTConfig(**sizes | dict(num_hidden_layers=2, max_position_embeddings=32) | shape)
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


def wrong_tokenizer(folder: Path) -> str:
    path, model = texts_in(folder / "texts", a="a b " * 40), tokenizer_in(model_in(folder / "model"))
    same, other = tokenizer_in(folder / "same"), tokenizer_in(folder / "other", words=WORDS | {"b": 4, "d": 1})
    same.joinpath("tokenizer.json").write_bytes(model.joinpath("tokenizer.json").read_bytes() + b"\n")
    named = (f"data.path={path}", of_folder(model))
    for right in (model, same):
        assert "have another id" not in messages_of(folder, *named, f"data.tokenizer={right}")
    said = messages_of(folder, *named, f"data.tokenizer={other}")
    assert "2 of the 5 tokens" in said
    assert "('d' is 1, there 4)" in said
    return said


def bytes_and_weights(folder: Path) -> str:
    model = model_in(folder / "model")
    said = messages_of(folder, of_folder(model))
    assert "does not say with which tokenizer" in said
    tokenizer_in(model)
    return messages_of(folder, of_folder(model))


def ids_alone(folder: Path) -> str:
    np.save(folder / "ids.npy", np.arange(4, 200, dtype=np.uint8))
    export = folder / "bytes"
    export.mkdir()
    ByteTokenizer().save(export)
    named = (f"data.path={folder}/ids.npy", f"data.tokenizer={export}")
    assert "which is exported" not in messages_of(folder, *named)
    return messages_of(folder, *named, "model.vocab_size=200")


def built_in_name(folder: Path) -> str:
    texts_in(folder / "python-docs", a="x" * 99)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert tokens_of(Path("./python-docs").absolute()) == byte_ids("x" * 99)
        return messages_of(folder)


def other_texts(folder: Path) -> str:
    for rank, letter in enumerate("xy"):
        texts_in(folder / str(rank), a=letter * 99)
    first, second = run(texts_of_ranks, 2, folder)
    assert first.replace("/0 is not", "/1 is not") == second
    assert not (folder / "run").exists()
    return first


def texts_of_ranks(rank: int, world_size: int, folder: Path) -> str:
    place = Place(rank, world_size, rank, world_size)
    job = prepared(folder / "run", f"data.path={folder}/{rank}", "parallel.pipeline=2", place=place)
    return refusal(lambda: run_job(job))


def home_and_variables(folder: Path) -> str:
    path = texts_in(folder / "in home", a="x" * 99)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("DATA", str(path))
        patch.delenv("NOWHERE", raising=False)
        config = config_of("data.path=$DATA/a.txt", "output.dir=~/runs", "model.path=None", "data.tokenizer=${DATA}/t")
        assert (config.data.path, config.output.dir) == (f"{path}/a.txt", f"{folder}/runs")
        assert config.data.tokenizer == f"{path}/t"
        disk = config_of("zero.nvme_dir=~", "zero.tensor_placement_policy=cpu", "model.path=~/model")
        assert (disk.zero.nvme_dir, disk.model.path) == (str(folder), f"{folder}/model")
        (path / "$NOWHERE").touch()
        assert config_of(f"data.path={path}/$NOWHERE").data.path == f"{path}/$NOWHERE"
        unknown = refusal(lambda: config_of("output.dir=~nobody-of-this-name/runs"), ConfigError)
        assert "begins with the home of a user who does not exist" in unknown
        return refusal(lambda: config_of("output.dir=$NOWHERE/runs"), ConfigError)


def config_of(*assignments: str) -> Config:
    return parse(apply_overrides({}, assignments))


CHECKS: dict[str, Callable[[Path], str]] = {
    "a byte-order mark": byte_order_mark,
    "an encoding without a byte-order mark that is not UTF-8": other_encoding,
    "zero bytes, as in UTF-16 without a byte-order mark": zero_bytes,
    "a packed file that is named FILE.txt": packed,
    "line ends of other systems": line_ends,
    "an empty file among texts": empty_among,
    "nothing but empty files": nothing_but_empty,
    "other files, and folders, in a folder of texts": other_files,
    "a link to a text that does not exist": dangling,
    "a path that does not exist": misspelled,
    "several texts": several,
    "several texts and a tokenizer without an end token": without_end,
    "an end token that is not the model's": another_end,
    "an end token that tokenizer.json lacks": end_not_there,
    "added tokens that tokenizer.json lacks": added_not_there,
    "a chat template, a map of special tokens, added tokens": chat_template,
    "texts that contain `</s>` or another special token": special_in_text,
    "a tokenizer with more ids than the model": too_many_ids,
    "a tokenizer with far fewer ids than the model": few_ids,
    "texts in which the padding token occurs": padding,
    "pretrained weights and another tokenizer than theirs": wrong_tokenizer,
    "pretrained weights and bytes": bytes_and_weights,
    "token ids, and a tokenizer with more ids than the model": ids_alone,
    "a folder that is named `python-docs`": built_in_name,
    "texts that are not the same on every rank": other_texts,
    "`~` or `$NAME` in a path of the config": home_and_variables,
    "a warm-up that is longer than the run": lambda folder: messages_of(
        folder, "train.steps=4", "lr_scheduler.warmup_steps=10", "optimizer.lr=3e-3"
    ),
    "`train.epochs`": lambda folder: messages_of(folder, "train.steps=None", "train.epochs=2"),
    "early stopping with more patience than the run has evaluations": lambda folder: messages_of(
        folder, "train.steps=4", "output.eval_every=2", "train.early_stopping=dict(patience=3)"
    ),
    "a learning rate of zero": lambda folder: messages_of(folder, "optimizer.lr=0"),
    "a share for validation that is less than a sample": lambda folder: messages_of(
        folder, "data.validation_fraction=0.00001"
    ),
    "a step with more samples than the corpus": lambda folder: messages_of(
        folder, f"data.path={texts_in(folder / 'texts', a='x' * 99)}"
    ),
    "checkpoints that are further apart than the run is long": lambda folder: messages_of(
        folder, "train.steps=4", "output.checkpoint_every=5"
    ),
    "a run that keeps nothing": lambda folder: messages_of(folder, "output.export=False"),
}
ROWS = [*rows(PAGE, HEADING), *rows(PAGE, LENGTHS)]


def test_every_row_of_the_tables_has_a_check() -> None:
    assert [row.what for row in ROWS] == list(CHECKS)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_what_users_bring_as_text_is_treated_as_the_table_says(row: Row, tmp_path: Path) -> None:
    said = CHECKS[row.what](tmp_path)
    quoted = re.findall(r"`([^`]*)`", row.answer)
    assert all(words in said for words in quoted if " " in words), (quoted, said)


def test_a_run_that_fits_has_no_message_but_where_its_weights_come_from(tmp_path: Path) -> None:
    weights, *lengths = prepared(tmp_path / "run").messages
    assert weights == "weights drawn from train.seed 0"
    assert [text.partition(":")[0] for text in lengths] == ["data", "training", "validation"]
    assert "lr_scheduler.warmup_steps=2" in TINY
    assert "warmup" not in messages_of(tmp_path, "train.steps=2")


def test_the_end_tokens_of_classes_are_those_of_transformers(tmp_path: Path) -> None:
    """An old tokenizer_config.json names nothing but the class, and the token is the class's default."""
    for kind in (GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer):
        token = END_OF_CLASS[kind.__name__]
        for name in (kind.__name__, f"{kind.__name__}Fast"):
            config = {"tokenizer_class": name}
            folder = tokenizer_in(tmp_path / name, config, words=WORDS | {token: 5, "<unk>": 6, "<s>": 7})
            assert kind().eos_token == token
            assert load_tokenizer(str(folder)).end == 5


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast"])
def test_a_space_before_a_text_is_added_where_auto_tokenizer_adds_one(tmp_path: Path, kind: str) -> None:
    """GPT-2's class takes it from the config, whatever tokenizer.json says."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: id for id, letter in enumerate([*letters, "ab", "Ġa", "<|endoftext|>"])}
    for stored in (True, False):
        for said in ({}, {"add_prefix_space": True}, {"add_prefix_space": False}):
            tokenizer = Tokenizer(kinds.BPE(ids, [("a", "b"), ("Ġ", "a")]))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=stored)
            tokenizer.save(str(tmp_path / "tokenizer.json"))
            config = {"tokenizer_class": kind, "eos_token": "<|endoftext|>"} | said
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
            wanted = AutoTokenizer.from_pretrained(tmp_path)("ab a", add_special_tokens=False)["input_ids"]
            assert load_tokenizer(str(tmp_path)).encode("ab a").tolist() == wanted, (stored, said)


def test_files_beside_a_tokenizer_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    tokenizer_in(tmp_path).joinpath("chat_template.jinja").symlink_to(tmp_path / "nowhere")
    assert "nowhere, which does not exist" in refusal(lambda: load_tokenizer(str(tmp_path)))


@pytest.mark.parametrize("option", ["config", "resume"])
def test_the_home_folder_may_be_named_in_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if option == "config":
        (tmp_path / "mine.py").write_text("train = dict(steps=3)\n")
        assert load_raw("~/mine.py") == {"train": {"steps": 3}}
    else:
        run_job(prepared(tmp_path / "run", "train.steps=1", "output.checkpoint_every=1", "output.export=False"))
        assert prepared(tmp_path / "other", resume="~/run").resume_from == tmp_path / "run/checkpoints/step_000001"


def test_a_tokenizer_that_is_a_pointer_of_git_lfs_is_refusal(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "tokenizer.json is a pointer of Git LFS" in refusal(lambda: load_tokenizer(str(tmp_path)))


@pytest.mark.parametrize("content", ["[]", "{", "3"])
def test_a_broken_tokenizer_config_is_named(tmp_path: Path, content: str) -> None:
    tokenizer_in(tmp_path).joinpath("tokenizer_config.json").write_text(content)
    words = "is damaged, or it is not JSON" if content == "{" else "is not a JSON object"
    assert f"tokenizer_config.json {words}" in refusal(lambda: load_tokenizer(str(tmp_path)))


def test_an_export_replaces_the_files_of_the_tokenizer_that_was_there_before(tmp_path: Path) -> None:
    """A chat template of the earlier one would be taken for the new one's."""
    source = tokenizer_in(tmp_path / "words")
    original = AutoTokenizer.from_pretrained(source)
    original.chat_template = {"default": "one", "tool_use": "two"}
    original.save_pretrained(source)
    path = texts_in(tmp_path / "texts", a="a c " * 999)
    saves = "output.checkpoint_every=1"
    for _ in range(2):  # the second time there is a folder of templates already
        named = (f"data.path={path}", f"data.tokenizer={source}", "train.steps=1", saves)
        run_job(prepared(tmp_path / "run", *named, resume="auto"))
        exported = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
        assert exported.chat_template == original.chat_template
    (tmp_path / "run" / "export" / "notes.txt").write_text("a user's")
    plain = tokenizer_in(tmp_path / "plain")  # the same tokens, without a template
    other = (f"data.path={path}", f"data.tokenizer={plain}", "train.steps=1")
    run_job(prepared(tmp_path / "run", *other, resume="auto"))
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "export").chat_template is None
    assert (tmp_path / "run" / "export" / "notes.txt").exists()


def test_texts_are_read_one_at_a_time(tmp_path: Path) -> None:
    texts = iter(Texts(find_source(str(texts_in(tmp_path, a="first", b=b"\xff")))))
    name, chunks = next(texts)
    assert (name, list(chunks)) == ("a.txt", ["first"])
    assert "b.txt is not UTF-8" in refusal(lambda: list(next(texts)[1]))
