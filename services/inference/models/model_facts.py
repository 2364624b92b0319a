"""Reads what the files of a base model say of it: architecture, weights, context length. Not pure: disk.

It refuses to know where the files come from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from formats.manifests import FileDigest
from formats.prompts.answer_ends import ends_of_model
from formats.prompts.faults import ModelFault
from formats.prompts.model_config import check_one_part
from services.inference.models.domain import model_invalid

NEEDED_FILES = ("config.json", "tokenizer.json")
CONFIG_BYTES_MAX = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the files say of the model."""

    architecture: str
    parameter_count: int
    context_tokens_max: int


def read_facts(folder: Path, files: list[FileDigest]) -> ModelFacts:
    """What the files say of the model; InvalidArgument MODEL_INVALID names the file that is missing or wrong."""
    names = {file.path for file in files}
    for needed in NEEDED_FILES:
        if needed not in names:
            raise model_invalid(needed, "is missing")
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if not weights:
        raise model_invalid("*.safetensors", "is missing; other weight formats can carry code and are not taken")
    config = _config(folder / "config.json")
    try:
        check_one_part(config)
        ends_of_model(folder)
    except ModelFault as fault:
        raise model_invalid(fault.part, fault.problem) from None
    return ModelFacts(
        architecture=_architecture(config),
        parameter_count=sum(_parameters(folder / name) for name in weights),
        context_tokens_max=_context(config),
    )


def _config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > CONFIG_BYTES_MAX:
        raise model_invalid(path.name, f"has more than {CONFIG_BYTES_MAX} bytes")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise model_invalid(path.name, "is not JSON") from None
    if not isinstance(config, dict):
        raise model_invalid(path.name, "is not a JSON object")
    if "auto_map" in config:
        raise model_invalid("config.json", "names code of its own (auto_map), which is never run")
    return config


def _architecture(config: dict[str, Any]) -> str:
    found = config.get("architectures")
    if not isinstance(found, list) or not found or not isinstance(found[0], str):
        raise model_invalid("config.json", "names no architecture")
    return found[0][:128]


def _context(config: dict[str, Any]) -> int:
    declared = config.get("max_position_embeddings")
    if not isinstance(declared, int) or isinstance(declared, bool) or not 2 <= declared < 1 << 31:
        raise model_invalid("config.json", "declares no max_position_embeddings")
    return declared


def _parameters(path: Path) -> int:
    """Number of weights in a file, from its header alone."""
    count = 0
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                count += size
    except (SafetensorError, OSError) as error:
        raise model_invalid(path.name, f"is no safetensors file: {error}") from None
    if count == 0:
        raise model_invalid(path.name, "holds no weights")
    return count
