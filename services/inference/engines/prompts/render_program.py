"""The processes that render a model's prompts. Not pure: disk.

`python -m services.inference.engines.prompts.render_program DESCRIPTOR MODEL BYTES`, led as `forking.py` says. The
first process loads the tokenizer and renders nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from formats.prompts.faults import ModelFault, RenderingRefused
from services.inference.engines.prompts.forking import lead
from services.inference.engines.prompts.frames import (
    Kind,
    pack_answer,
    pack_ids,
    pack_words,
    unpack_question,
)
from services.inference.engines.prompts.prompt_tokenizer import PromptTokenizer

_WORDS_CHARS_MAX = 500


def main() -> int:
    return lead(sys.argv[1:], _load, answered)


def _load(model_path: str) -> PromptTokenizer:
    return PromptTokenizer.read(Path(model_path))


def answered(body: bytes, tokenizer: PromptTokenizer) -> bytes:
    """As `answer`, whatever goes wrong."""
    try:
        return answer(unpack_question(body), tokenizer)
    except MemoryError:
        return pack_answer(Kind.MEMORY)
    except BaseException as error:
        # A panic of the tokenizer is none of Python's usual exceptions.
        return pack_words(Kind.BROKEN, f"{type(error).__name__}: {str(error)[:_WORDS_CHARS_MAX]}")


def answer(question: dict[str, Any], tokenizer: PromptTokenizer) -> bytes:
    """The packed answer. `ids` are asked for their texts; `text` for tokens, as `messages` are by the chat template."""
    if "ids" in question:
        texts = json.dumps([tokenizer.text_of(token_id) for token_id in question["ids"]])
        return pack_words(Kind.TEXTS, texts)
    try:
        if "messages" in question:
            ids = tokenizer.chat_ids(question["messages"], question["tools"], question["switches"])
        else:
            ids = tokenizer.text_ids(question["text"], opening=question["opening"])
    except RenderingRefused as refusal:
        # The template's own words (a role it does not take, turns that must alternate) help the caller.
        return pack_words(Kind.REFUSED, refusal.words[:_WORDS_CHARS_MAX])
    except ModelFault as fault:
        return pack_words(Kind.REFUSED, str(fault)[:_WORDS_CHARS_MAX])
    except (TypeError, ValueError) as error:
        # Text that is none, such as half of a surrogate pair.
        return pack_words(Kind.REFUSED, str(error)[:_WORDS_CHARS_MAX])
    if len(ids) > question["tokens_max"]:
        return pack_words(Kind.TOO_MANY, str(len(ids)))
    return pack_ids(ids)


if __name__ == "__main__":
    sys.exit(main())
