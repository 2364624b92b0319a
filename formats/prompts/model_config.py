"""What a model's config.json says of its language part: context length and vocabulary.

A model of several parts, whose language part is described by a config within the config, is refused: neither training
nor serving would treat its other parts as they are meant.
"""

from collections.abc import Mapping
from typing import Any

from formats.prompts.faults import ModelFault

CONFIG = "config.json"
CONTEXT_LENGTH_DEFAULT = 2048
# What the description of a model within a config says of itself; that of a quantization does not.
_OF_A_MODEL = ("model_type", "hidden_size", "num_hidden_layers")


def check_one_part(config: Mapping[str, Any]) -> None:
    """Raises ModelFault for a model of several parts, such as one that sees, hears or speaks."""
    parts = sorted(name for name, value in config.items() if name.endswith("_config") and _is_model(value))
    if parts:
        raise ModelFault(
            CONFIG,
            f"describes a model of several parts ({', '.join(parts)}); only language models alone are "
            "trained and served here: take its language part as a model of its own, if its authors publish one",
        )


def context_length(config: Mapping[str, Any]) -> int:
    """Tokens; raises ModelFault."""
    length = _positive(config, "max_position_embeddings", CONTEXT_LENGTH_DEFAULT)
    return min(length, _short_context(config) or length)


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding, which may be more than the tokenizer has names for. None where the config does not say;
    raises ModelFault."""
    return _positive(config, "vocab_size", 1) if "vocab_size" in config else None


def _is_model(value: Any) -> bool:
    return isinstance(value, dict) and any(name in value for name in _OF_A_MODEL)


def _positive(config: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = config.get(name, otherwise)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelFault(CONFIG, f"has a {name} that is not a positive integer")
    return value


def _short_context(config: Mapping[str, Any]) -> int | None:
    """Of a model with longrope: transformers rotates all rows of a micro-batch by the factors of its longest one, so
    that rows on both sides of this length would not be computed as alone."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or "long_factor" not in rope:
        return None
    length = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else None
