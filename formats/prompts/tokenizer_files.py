"""Loads the tokenizer that a model's own files mean, and writes it in the form that every library takes as it is.

tokenizer.json is the tokenizer, whatever class tokenizer_config.json names: transformers 5 rebuilds some classes from
the vocabulary alone (LlamaTokenizer, Qwen2Tokenizer, ...), by rules of its own that may not be those of the file. What
the other files declare is added to it (added_tokens.py). Needs no transformers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from formats.prompts.added_tokens import add_declared_tokens
from formats.prompts.faults import ModelFault

FILE = "tokenizer.json"
# Classes that take tokenizer.json as it is: the first one in transformers 4 and 5.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_PROBE = "a"
# What transformers puts in the place of the first step of a tekken tokenizer whose config asks for it.
_MENDED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(
    path: Path, config: Mapping[str, Any], added_tokens: Mapping[str, Any], rows: int | None
) -> Tokenizer:
    """`config` as `with_map` of added_tokens.py gives it. Raises ModelFault."""
    if not path.is_file():
        raise ModelFault(FILE, "is missing; save the tokenizer with transformers, which writes it")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a broken file
        raise ModelFault(FILE, f"is no tokenizer: {error}") from error
    if config.get("fix_mistral_regex"):
        _check_mended(tokenizer)
    # Texts are cut and batched elsewhere.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    add_declared_tokens(tokenizer, config, added_tokens, rows)
    return tokenizer


def _check_mended(tokenizer: Tokenizer) -> None:
    """A wish to read the file otherwise than it is written, which older libraries do not know."""
    if json.dumps(_MENDED, ensure_ascii=False) not in tokenizer.to_str():
        raise ModelFault(
            "tokenizer_config.json",
            f"sets fix_mistral_regex, and the pattern in {FILE} is not the mended one; save the tokenizer with "
            "transformers, which writes it",
        )


def opening_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before a text, such as a begin token. What it puts behind one, an end token as a rule,
    has no place in a prompt: an answer goes on there."""
    encoding = tokenizer.encode(_PROBE, add_special_tokens=True)
    ids, added = encoding.ids, encoding.special_tokens_mask
    return tuple(ids[: added.index(0)]) if 0 in added else ()


def write_tokenizer_files(
    tokenizer: Tokenizer, special_tokens: Mapping[str, str], folder: Path, more: Mapping[str, Any] | None = None
) -> None:
    """Writes tokenizer.json and tokenizer_config.json, from which transformers' AutoTokenizer makes this tokenizer
    again. `more` are further values of the config."""
    tokenizer.save(str(folder / FILE))
    declared = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    config = {
        **(more or {}),
        **special_tokens,
        "added_tokens_decoder": declared,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": PLAIN_CLASSES[0],
    }
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
