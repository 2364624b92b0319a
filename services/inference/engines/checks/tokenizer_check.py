"""Whether a tokenizer gives a text back that it took apart. Not pure: disk.

It refuses to know torch, and what transformers makes of a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.inference.engines.checks.finding import Finding

FILE = "tokenizer.json"
# Letters, digits and marks that every tokenizer of a language model has; white space and capitals may be lost.
_PROBE = "The quick brown fox jumps over 13 lazy dogs."
_SHOWN_CHARS_MAX = 80


def check_tokenizer_file(folder: Path, vocabulary_size: int | None) -> None:
    """The file as it stands. Raises Finding."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / FILE))
        check_round_trip(
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode, vocabulary_size
        )
    except Finding:
        raise
    except BaseException as error:
        # The library raises bare exceptions for a broken file, and panics are none of Python's usual ones.
        raise Finding(FILE, f"is no tokenizer: {str(error)[:500]}") from None


def check_round_trip(
    encode: Callable[[str], Sequence[int]], decode: Callable[[Any], str], vocabulary_size: int | None
) -> None:
    """Raises Finding when the text does not come back, or a token has no row in the weights."""
    ids = list(encode(_PROBE))
    if vocabulary_size is not None and ids and max(ids) >= vocabulary_size:
        raise Finding(FILE, f"gives token {max(ids)}, and the model has {vocabulary_size} tokens (vocab_size)")
    told = decode(ids)
    if _plain(told) != _plain(_PROBE):
        raise Finding(FILE, f"does not give a text back: {_PROBE!r} becomes {told[:_SHOWN_CHARS_MAX]!r}")


def _plain(text: str) -> str:
    return "".join(text.split()).casefold()
