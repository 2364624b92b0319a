"""Loads the tokenizer and chat template of a model folder as the `tokenizers` library sees them, without torch.

It knows no rows and no masks. A tokenizer.json whose class transformers rebuilds by rules of its own is loaded by
transformers, so that training and serving always see the same ids.
"""

import hashlib
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from formats.prompts.chat_template import TemplateRenderer
from formats.prompts.faults import ModelFault
from formats.strict_json import loose_object

# Classes that take tokenizer.json as it is.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
CONTEXT_LENGTH_DEFAULT = 2048


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """What rendering and tokenising need from a model."""

    tokenizer: Tokenizer
    template_source: str | None
    # For rows with tools, of a model that has a template of its own for them.
    tools_template_source: str | None
    special_tokens: dict[str, str]
    eos_id: int
    context_length: int
    vocabulary_size: int
    tokenizer_sha256: str
    template_sha256: str

    def renderer(self, today: date) -> TemplateRenderer | None:
        """None of a model without a chat template."""
        if self.template_source is None:
            return None
        return TemplateRenderer(self.template_source, self.special_tokens, today, self.tools_template_source)


def read_model_folder(directory: Path) -> ModelFolder:
    """Raises ModelFault."""
    config = _json(directory / "config.json", required=True)
    tokenizer_config = _json(directory / "tokenizer_config.json", required=False)
    tokenizer = _tokenizer(directory, str(tokenizer_config.get("tokenizer_class", "")))
    special_tokens = _special_tokens(_with_map(directory, tokenizer_config))
    template, tools_template = _templates(directory, tokenizer_config)
    return ModelFolder(
        tokenizer=tokenizer,
        template_source=template,
        tools_template_source=tools_template,
        special_tokens=special_tokens,
        eos_id=_eos_id(tokenizer, special_tokens, config),
        context_length=_context_length(config),
        vocabulary_size=_vocabulary_size(config, tokenizer),
        tokenizer_sha256=hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        template_sha256=hashlib.sha256("\0".join(filter(None, (template, tools_template))).encode()).hexdigest(),
    )


def _tokenizer(directory: Path, class_name: str) -> Tokenizer:
    path = directory / "tokenizer.json"
    if class_name in _PLAIN_CLASSES and path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a broken file
            raise ModelFault(f"tokenizer.json is broken: {error}") from error
    else:
        # Brings transformers and torch along, seconds that most analyses must not pay.
        from transformers import AutoTokenizer  # noqa: PLC0415

        try:
            loaded = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
            tokenizer = loaded.backend_tokenizer
        except (OSError, ValueError, ImportError) as error:
            raise ModelFault(f"tokenizer cannot be loaded: {error}") from error
        except Exception as error:  # the library stumbles over a wrong value in any way
            message = "tokenizer cannot be loaded: its files hold values of a wrong kind"
            raise ModelFault(message) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _json(path: Path, *, required: bool) -> dict[str, Any]:
    if not path.is_file() and not required:
        return {}
    try:
        return loose_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFault(f"{path.name} cannot be read: {error}") from error


def _with_map(directory: Path, tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """As transformers has it: names in a file of their own win, unless the config is of the kind that lists added
    tokens itself."""
    if "added_tokens_decoder" in tokenizer_config:
        return tokenizer_config
    return tokenizer_config | _json(directory / "special_tokens_map.json", required=False)


def _special_tokens(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_TOKENS:
        value = tokenizer_config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _templates(directory: Path, tokenizer_config: dict[str, Any]) -> tuple[str | None, str | None]:
    """The one for every row and the one for rows with tools, named and chosen as by `get_chat_template` of
    transformers."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), None
        except UnicodeDecodeError as error:
            where = f"no UTF-8 at byte {error.start}"
            raise ModelFault(f"{path.name} cannot be read: {where}") from error
        except OSError as error:
            raise ModelFault(f"{path.name} cannot be read: {error}") from error
    template = tokenizer_config.get("chat_template")
    named = {"default": template}
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
    default, tools = (found if isinstance(found := named.get(name), str) else None for name in ("default", "tool_use"))
    return default, tools


def _eos_id(tokenizer: Tokenizer, special_tokens: dict[str, str], config: dict[str, Any]) -> int:
    from_name = tokenizer.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
    from_config = config.get("eos_token_id")
    if isinstance(from_config, list):
        from_config = from_config[0] if from_config else None
    eos_id = from_name if from_name is not None else from_config
    if not isinstance(eos_id, int):
        raise ModelFault("tokenizer names no end-of-sequence token")
    return eos_id


def _context_length(config: dict[str, Any]) -> int:
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, dict) else config
    length = inner.get("max_position_embeddings", CONTEXT_LENGTH_DEFAULT)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ModelFault("config.json: max_position_embeddings is not a positive integer")
    return min(length, _short_context(inner) or length)


def _short_context(config: dict[str, Any]) -> int | None:
    """Of a model with longrope: transformers rotates all rows of a micro-batch by the factors of its longest one, so
    that rows on both sides of this length would not be computed as alone."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, dict) or "long_factor" not in rope:
        return None
    length = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return length if isinstance(length, int) and length > 0 else None


def _vocabulary_size(config: dict[str, Any], tokenizer: Tokenizer) -> int:
    """Rows of the embedding, which may be more than the tokenizer has names for."""
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, dict) else config
    size = inner.get("vocab_size", tokenizer.get_vocab_size())
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ModelFault("config.json: vocab_size is not a positive integer")
    return size
