"""Whether tokenizer and chat template of a model can be used as they are used here. Not pure: disk.

It refuses to know torch, and what transformers makes of a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TypeVar

from formats.prompts.faults import TEMPLATE, ModelFault, RenderingRefused
from formats.prompts.model_folder import ModelFolder, read_model_folder
from formats.prompts.round_trip import Loss, check_round_trip
from services.inference.engines.checks.finding import Finding

T = TypeVar("T")

FILE = "tokenizer.json"
_TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
# Any day will do.
_DAY = date(2024, 7, 26)
_SHOWN_CHARS_MAX = 500


def check_prompts(folder: Path) -> tuple[ModelFolder, tuple[Loss, ...], str | None]:
    """The folder as training and serving read it, what its tokenizer loses by its own rules, and a question rendered by
    its chat template, if it has one. Raises Finding."""
    read = tried(FILE, lambda: read_model_folder(folder))
    losses = tried(FILE, lambda: check_round_trip(read.tokenizer, read.vocabulary_size))
    return read, losses, tried(FILE, lambda: _question(read, folder))


def tried(file: str, look: Callable[[], T]) -> T:
    """Raises Finding for whatever a library raises, panics of the tokenizer among it."""
    try:
        return look()
    except (Finding, MemoryError):
        raise
    except ModelFault as fault:
        raise Finding(fault.part, fault.problem[:_SHOWN_CHARS_MAX]) from None
    except BaseException as error:
        raise Finding(file, f"cannot be used: {type(error).__name__}: {str(error)[:_SHOWN_CHARS_MAX]}") from None


def _question(read: ModelFolder, folder: Path) -> str | None:
    file = next((name for name in _TEMPLATE_FILES if (folder / name).is_file()), FILE)
    template = f"the {TEMPLATE} in {file}"
    try:
        renderer = read.renderer(_DAY)
        text = None if renderer is None else renderer.render(_QUESTION, add_generation_prompt=True)
    except RenderingRefused as refusal:
        raise Finding(template, f"does not take a question by a user: {refusal.words}") from None
    except ModelFault as fault:
        raise Finding(template, fault.problem[:_SHOWN_CHARS_MAX]) from None
    highest = max(read.tokenizer.encode(text or "", add_special_tokens=False).ids, default=0)
    if highest >= read.vocabulary_size:
        raise Finding(template, f"writes token {highest}, and the model has {read.vocabulary_size} tokens (vocab_size)")
    return text
