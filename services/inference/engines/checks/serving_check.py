"""Whether a model can be loaded and run: tokenizer, chat template, config and weights together. Not pure: disk.

It uses transformers as the engines do, and runs no code of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from services.inference.engines.checks.finding import Finding, listed
from services.inference.engines.checks.tokenizer_check import FILE, check_round_trip

T = TypeVar("T")

_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_PROBE_TOKENS = 8
_SHOWN_CHARS_MAX = 500


# Tables and bars for people; what is wrong is said once, by a finding.
logging.set_verbosity_error()
logging.disable_progress_bar()


def check_prompts(folder: Path, vocabulary_size: int | None) -> None:
    """Tokenizer and chat template as the engine has them. Raises Finding."""
    tokenizer: Any = _tried(
        FILE, lambda: AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    )
    _tried(
        FILE,
        lambda: check_round_trip(
            lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.decode, vocabulary_size
        ),
    )
    if tokenizer.chat_template is not None:
        file = next((name for name in _TEMPLATE_FILES if (folder / name).is_file()), FILE)
        _tried(
            f"the chat template in {file}",
            lambda: tokenizer.apply_chat_template(_QUESTION, add_generation_prompt=True, tokenize=True),
        )


def check_model(folder: Path, *, run: bool) -> None:
    """Config and weights fit, and with `run` some tokens give numbers. Without, no weight is read. Raises Finding."""
    model, found = _tried(
        "config.json",
        lambda: AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            # Then they are listed, and refused below with their names.
            ignore_mismatched_sizes=True,
            **({} if run else {"device_map": "meta"}),
        ),
    )
    _check_fit(model.config.get_text_config(), found)
    if run:
        _tried("the model", lambda: _check_logits(model))


def _check_fit(config: Any, found: dict[str, Any]) -> None:
    others = {
        f"{name} ({list(stored)} in the weights, {list(wanted)} by the config)"
        for name, stored, wanted in found["mismatched_keys"]
    }
    if others:
        raise Finding("config.json", f"does not fit the weights in {listed(others)}")
    if found["missing_keys"]:
        raise Finding("config.json", f"does not fit the weights, which lack {listed(found['missing_keys'])}")
    layers = getattr(config, "num_hidden_layers", None)
    beyond = {
        name
        for name in found["unexpected_keys"]
        if isinstance(layers, int) and (at := _LAYER.search(name)) and int(at[1]) >= layers
    }
    if beyond:
        raise Finding("config.json", f"has {layers} layers, and the weights hold {listed(beyond)}")


def _check_logits(model: Any) -> None:
    ids = torch.arange(_PROBE_TOKENS)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise Finding("the model", "computes values that are infinite or not numbers for its first tokens")


def _tried(file: str, look: Callable[[], T]) -> T:
    try:
        return look()
    except (Finding, MemoryError):
        raise
    except BaseException as error:
        # Whatever a library raises for a broken file, panics of the tokenizer among it.
        raise Finding(file, f"cannot be used: {type(error).__name__}: {str(error)[:_SHOWN_CHARS_MAX]}") from None
