"""Whether a model can be served and run: its tokenizer by the engine, config and weights together. Not pure: disk.

It uses transformers as the engines do, and runs no code of the model.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from formats.prompts.model_folder import ModelFolder
from formats.prompts.round_trip import PAGE
from formats.prompts.tokenizer_files import write_tokenizer_files
from services.inference.engines.checks.finding import Finding, listed
from services.inference.engines.checks.tokenizer_check import FILE, tried

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_PROBE_TOKENS = 8
_TEXT_CHARS_MAX = 60


# Tables and bars for people; what is wrong is said once, by a finding.
logging.set_verbosity_error()
logging.disable_progress_bar()


def check_as_served(read: ModelFolder, question: str | None) -> None:
    """The serving engine gets the tokenizer in a folder of its own (`tokenizer_files.py`), which transformers opens: it
    gives the same ids and texts there. Raises Finding with the first token that differs."""
    with tempfile.TemporaryDirectory(prefix="finemesh-tokenizer-") as folder:
        write_tokenizer_files(read.tokenizer, read.special_tokens, Path(folder))
        served: Any = tried(
            FILE, lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        )
    for text in (*PAGE.values(), *([question] if question is not None else [])):
        tried(FILE, partial(compare, read.tokenizer, served, text))


def compare(trained: Tokenizer, served: Any, text: str) -> None:
    """Raises Finding with the first token that differs, and both readings."""
    ids = list(trained.encode(text, add_special_tokens=False).ids)
    others = list(served.encode(text, add_special_tokens=False))
    if ids != others:
        at = next(
            (at for at, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other),
            min(len(ids), len(others)),
        )
        readings = (
            f"{_shown(ids[at:], trained.id_to_token)} by training",
            f"{_shown(others[at:], served.convert_ids_to_tokens)} by serving",
        )
        raise Finding(
            FILE, f"is read in two ways: token {at} of {text[:_TEXT_CHARS_MAX]!r} is {' and '.join(readings)}"
        )
    told, served_text = trained.decode(ids, skip_special_tokens=False), served.decode(ids, skip_special_tokens=False)
    if told != served_text:
        raise Finding(
            FILE,
            f"is read in two ways: {told[:_TEXT_CHARS_MAX]!r} would be served as {served_text[:_TEXT_CHARS_MAX]!r}",
        )


def _shown(ids: list[int], token: Callable[[int], str | None]) -> str:
    return f"{ids[0]} ({token(ids[0])!r})" if ids else "none"


def check_model(folder: Path, *, run: bool) -> None:
    """Config and weights fit, and with `run` some tokens give numbers. Without, no weight is read. Raises Finding."""
    model, found = tried(
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
        tried("the model", lambda: _check_logits(model))


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
