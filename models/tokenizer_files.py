"""The files of a tokenizer in Hugging Face's format: which token ends a text, and all that an export must carry."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.weight_files import LFS_POINTER
from parallel.errors import DataError

TOKENIZER, CONFIG, SPECIALS_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
OTHERS = (
    *(CONFIG, SPECIALS_MAP, "added_tokens.json", "chat_template.jinja", "chat_template.json"),
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


class TokenizerFiles:
    """The contents of a tokenizer.json and of the files beside it that `AutoTokenizer` reads.

    They are kept in memory for the export, because the files may have been moved by then: a tokenizer in the folder of
    an earlier run is renamed together with that run. Raises DataError where a file cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        try:
            self.tokenizer = file.read_bytes()
            beside = (self.folder / name for name in OTHERS)
            found = [*(other for other in beside if os.path.lexists(other)), *sorted(self.folder.glob(TEMPLATES))]
            self.others = {str(other.relative_to(self.folder)): other.read_bytes() for other in found}
        except OSError as error:
            raise DataError(f"data.tokenizer: cannot read {error.filename}: {error.strerror}.") from error
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

    def save(self, folder: Path) -> None:
        """Write the files into another folder, a lone tokenizer.json with a config that `AutoTokenizer` needs."""
        lone = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2).encode() + b"\n"
        for name, content in {TOKENIZER: self.tokenizer, CONFIG: lone, **self.others}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)

    def end(self, ids: Mapping[str, int]) -> int | None:
        """Return the id of the token that ends a text, None where the files name none, as `AutoTokenizer` finds it.

        `ids` is the vocabulary of tokenizer.json. Raises DataError where a named token is not in it, since
        `AutoTokenizer` would give it a new id, which no text of the training has.
        """
        self._check_added(ids)
        named = dict(self.config)
        if "added_tokens_decoder" not in named:  # else transformers does not read the older file
            named |= self._read(SPECIALS_MAP)
        token = _content(named.get("eos_token"))
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
        try:
            content = json.loads(self.others.get(name, b"{}"))
        except ValueError as error:
            raise DataError(f"data.tokenizer: {self.folder / name} is not JSON: {error}.") from error
        if not isinstance(content, dict):
            raise DataError(f"data.tokenizer: {self.folder / name} is not a JSON object.")
        return content


def _content(token: object) -> str | None:
    """Return the text of a token, which is written as text or as an object with its `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
