"""The files of a tokenizer in Hugging Face's format: which token ends a text, and all that an export must carry."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.weight_files import LFS_POINTER
from parallel.errors import DataError
from parallel.regular_file import parse_json, read_bytes, with_key

TOKENIZER, CONFIG, SPECIALS_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
OTHERS = (
    *(CONFIG, SPECIALS_MAP, "added_tokens.json", CHAT_TEMPLATE, "chat_template.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)
TEMPLATES = "additional_chat_templates/*.jinja"
TOKENIZER_FILES = re.compile("|".join([*map(re.escape, (TOKENIZER, *OTHERS)), TEMPLATES.replace("*", "[^/]*")]))
END_OF_CLASS = {  # the token that ends a text where the config names only the class
    "GPT2Tokenizer": "<|endoftext|>",
    "GPTNeoXTokenizer": "<|endoftext|>",
    "CodeGenTokenizer": "<|endoftext|>",
    "Qwen2Tokenizer": "<|endoftext|>",
    "LlamaTokenizer": "</s>",
    "T5Tokenizer": "</s>",
    "GemmaTokenizer": "<eos>",
}
BEGIN_OF_CLASS = {  # likewise the token that begins one
    "GPT2Tokenizer": "<|endoftext|>",
    "GPTNeoXTokenizer": "<|endoftext|>",
    "CodeGenTokenizer": "<|endoftext|>",
    "LlamaTokenizer": "<s>",
    "GemmaTokenizer": "<bos>",
}
MOST_BYTES = 1 << 28  # the largest published tokenizer.json has 33 MiB
BUILT_IN_BPE = Path(__file__).parent / "bpe"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_file(spec: str) -> Path:
    """Return the tokenizer.json that `data.tokenizer` names: that of "bpe", the file itself, or the one in a folder."""
    path = BUILT_IN_BPE if spec == "bpe" else Path(spec)
    return path / TOKENIZER if os.path.isdir(path) else path


class TokenizerFiles:
    """The contents of a tokenizer.json and of the files beside it that `AutoTokenizer` reads.

    They are kept in memory for the export, because the files may have been moved by then: a tokenizer in the folder of
    an earlier run is renamed together with that run. Raises DataError where a file cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        try:
            beside = (self.folder / name for name in OTHERS)
            found = [*(other for other in beside if os.path.lexists(other)), *sorted(self.folder.glob(TEMPLATES))]
        except OSError as error:
            raise DataError(f"data.tokenizer: cannot read {error.filename}: {error.strerror}.") from error
        self.tokenizer = _bytes_of(file)
        self.others = {str(other.relative_to(self.folder)): _bytes_of(other) for other in found}
        for name, content in {file.name: self.tokenizer, **self.others}.items():
            if content.startswith(LFS_POINTER):
                raise DataError(
                    f"data.tokenizer: {self.folder / name} is a pointer of Git LFS and not the file itself. Fetch it:"
                    " git lfs pull."
                )
        self.config = self._read(CONFIG)

    @property
    def adds_prefix_space(self) -> bool | None:
        """True if a text begins with a space; None where tokenizer.json decides it.

        `AutoTokenizer` takes it from the config alone for the class of GPT-2, which OPT's tokenizer has.
        """
        is_gpt2 = self._class == "GPT2Tokenizer"
        return bool(self.config.get("add_prefix_space")) if is_gpt2 else None

    @property
    def _class(self) -> str:
        return str(self.config.get("tokenizer_class")).removesuffix("Fast")

    @property
    def _named(self) -> dict[str, Any]:
        """The config with the special tokens of the older file, which transformers reads unless the config has more."""
        return self.config if "added_tokens_decoder" in self.config else self.config | self._read(SPECIALS_MAP)

    def special_tokens(self) -> dict[str, str]:
        """Return the special tokens that have a name, such as bos_token, as `AutoTokenizer` has them."""
        of_class = {"bos_token": BEGIN_OF_CLASS.get(self._class), "eos_token": END_OF_CLASS.get(self._class)}
        named = {name: _content(self._named.get(name, of_class.get(name))) for name in NAMED_TOKENS}
        return {name: token for name, token in named.items() if token is not None}

    def chat_templates(self) -> dict[str, str]:
        """Return the chat templates by their names: files replace what the config has, and "default" is the main one.

        Raises DataError where a template is not text.
        """
        names = {name: "default" for name in self.others if name == CHAT_TEMPLATE}
        names |= {name: Path(name).stem for name in self.others if Path(name).match(TEMPLATES)}
        if not names:
            return self._templates_of_config()
        try:
            return {name: self.others[file].decode() for file, name in names.items()}
        except UnicodeDecodeError as error:
            raise DataError(f"data.tokenizer: a chat template in {self.folder} is not UTF-8: {error}.") from error

    def _templates_of_config(self) -> dict[str, str]:
        given = self.config.get("chat_template")
        if isinstance(given, str):
            return {"default": given}
        entries = [] if given is None else given
        if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
            found = {entry.get("name"): entry.get("template") for entry in entries}
            if all(isinstance(text, str) for text in (*found, *found.values())):
                return found
        raise DataError(
            f"data.tokenizer: the chat_template of {self.folder / CONFIG} is neither text nor a list of objects with"
            " `name` and `template`. Save it as chat_template.jinja beside the tokenizer."
        )

    def save(self, folder: Path) -> None:
        """Write the files into another folder, a lone tokenizer.json with a config that `AutoTokenizer` needs."""
        lone = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2).encode() + b"\n"
        for name, content in {TOKENIZER: self.tokenizer, CONFIG: lone, **self.others}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def end(self, ids: Mapping[str, int]) -> int | None:
        """Return the id of the token that ends a text, None where the files name none, as `AutoTokenizer` finds it.

        `ids` is the vocabulary of tokenizer.json. Raises DataError where a named token is not in it, since
        `AutoTokenizer` would give it a new id, which no text of the training has.
        """
        self._check_added(ids)
        token = _content(self._named.get("eos_token"))
        if token is None:
            return ids.get(END_OF_CLASS.get(self._class, ""))
        if token not in ids:
            raise DataError(
                f"data.tokenizer: the eos_token {token!r} of {self.folder} is not in its {TOKENIZER}. Save the"
                " tokenizer again: AutoTokenizer.from_pretrained(...).save_pretrained(NEW_DIRECTORY)."
            )
        return ids[token]

    def _check_added(self, ids: Mapping[str, int]) -> None:
        added = self.config.get("added_tokens_decoder") or {}
        for id, entry in added.items() if isinstance(added, dict) else ():
            token = _content(entry)
            if token is not None and str(ids.get(token)) != str(id):
                raise DataError(
                    f"data.tokenizer: {self.folder / CONFIG} gives {token!r} the id {id}, but {TOKENIZER} gives it"
                    f" {ids.get(token)}. Save the tokenizer again:"
                    " AutoTokenizer.from_pretrained(...).save_pretrained(NEW_DIRECTORY)."
                )

    def _read(self, name: str) -> dict[str, Any]:
        """Return the content of one of the other files, empty where there is none."""
        content = parse_json(
            self.others.get(name, b"{}"), str(self.folder / name), with_key(DataError, "data.tokenizer")
        )
        if not isinstance(content, dict):
            raise DataError(f"data.tokenizer: {self.folder / name} is not a JSON object.")
        return content


def _bytes_of(file: Path) -> bytes:
    return read_bytes(file, with_key(DataError, "data.tokenizer"), at_most=MOST_BYTES, links=True)


def _content(token: object) -> str | None:
    """Return the text of a token, which is written as text or as an object with its `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
