"""Sees to it that a stranger's transformers reads an exported model in the tokens that it was trained with.

Transformers rebuilds some classes of tokenizers by rules of its own (docs/imported-models.md). An export whose files it
reads otherwise, or whose base model's files, gets tokenizer.json as training had it, with a config of the class that
takes it as it is.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer

from formats.prompts.model_folder import ModelFolder, read_model_folder
from formats.prompts.round_trip import PAGE
from formats.prompts.tokenizer_files import write_tokenizer_files

# Files of older kinds, which would say otherwise than the new ones.
_OLDER = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")
_TEMPLATE = "chat_template.jinja"
# What a config says beside its tokens.
_KEPT = ("model_max_length", "padding_side", "chat_template")


def keep_tokens(folder: Path) -> bool:
    """Whether the files of an export had to be rewritten. `folder` has config and tokenizer of the base model."""
    trained = read_model_folder(folder)
    if _reads_alike(folder, trained):
        return False
    _rewrite(trained, folder, folder)
    for name in _OLDER:
        (folder / name).unlink(missing_ok=True)
    return True


def keep_tokens_of_base(base: Path, folder: Path) -> bool:
    """Whether an adapter in `folder` had to be given a tokenizer, with the chat template, because the one of its base
    model is read otherwise."""
    trained = read_model_folder(base)
    if _reads_alike(base, trained):
        return False
    _rewrite(trained, base, folder)
    if (base / _TEMPLATE).is_file():
        shutil.copyfile(base / _TEMPLATE, folder / _TEMPLATE)
    return True


def _rewrite(trained: ModelFolder, source: Path, folder: Path) -> None:
    path = source / "tokenizer_config.json"
    written = json.loads(path.read_bytes()) if path.is_file() else {}
    more = {name: written[name] for name in _KEPT if name in written}
    write_tokenizer_files(trained.tokenizer, trained.special_tokens, folder, more)


def _reads_alike(folder: Path, trained: ModelFolder) -> bool:
    try:
        theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception:  # whatever it stumbles over, it does not read them
        return False
    return all(
        theirs.encode(text, add_special_tokens=False) == trained.tokenizer.encode(text, add_special_tokens=False).ids
        for text in _texts(trained)
    )


def _texts(trained: ModelFolder) -> Iterator[str]:
    """The page alone, and as turns of a conversation: what is rebuilt wrongly shows behind a marker first."""
    first, last = (trained.special_tokens.get(name, "") for name in ("bos_token", "eos_token"))
    for text in PAGE.values():
        yield text
        yield f"{first}{text}{last}{first} {text}{last}\n{text}"
