"""Reads what an engine has to know of a model before it loads weights. Not pure: disk.

That is the config, the context length and what a token takes in the cache. It refuses to know tokenizers and weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formats.prompts.faults import ModelFault
from formats.prompts.model_config import check_one_part
from formats.strict_json import loose_object
from services.inference.engines.base import EngineFailed, EngineSettings

_CONFIG_BYTES_MAX = 4 << 20


def read_config(model_path: Path) -> dict[str, Any]:
    """The model's config.json; EngineFailed when the folder holds no usable one."""
    path = model_path / "config.json"
    try:
        if path.stat().st_size > _CONFIG_BYTES_MAX:
            raise EngineFailed(f"the model's {path.name} has more than {_CONFIG_BYTES_MAX} bytes")
        config = loose_object(path.read_bytes())
        check_one_part(config)
    except ModelFault as fault:
        raise EngineFailed(f"the model's {fault}") from fault
    except OSError as error:
        raise EngineFailed(f"the model's {path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise EngineFailed(f"the model's {path.name} cannot be read: {error}") from error
    return config


def context_tokens(config: dict[str, Any], settings: EngineSettings) -> int:
    """What the model declares, or less when the operator says so: longer than declared would give nonsense."""
    declared = config.get("max_position_embeddings")
    if not isinstance(declared, int) or declared < 2:
        raise EngineFailed("the model's config declares no max_position_embeddings")
    return min(declared, settings.context_tokens_max or declared)


def cache_bytes_per_token(config: dict[str, Any]) -> int:
    """At most what keys and values of one token take, in float32; a cache in less precision takes less."""
    try:
        layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
        key_heads = int(config.get("num_key_value_heads") or heads)
        width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise EngineFailed("the model's config does not tell the shape of its attention") from error
    return 2 * layers * key_heads * width * 4
