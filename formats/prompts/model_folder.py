"""Reads what rendering and tokenising need from a model's folder: its tokenizer, its chat template, its vocabulary.

It knows no rows and no masks, and needs neither torch nor transformers.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from formats.prompts.added_tokens import ADDED, CONFIG, MAP, named_tokens, with_map
from formats.prompts.chat_template import Bound, TemplateRenderer
from formats.prompts.faults import ModelFault
from formats.prompts.model_config import check_one_part, context_length, vocabulary_size
from formats.prompts.render_time import bounded_rendering
from formats.prompts.tokenizer_files import FILE, PLAIN_CLASSES, load_tokenizer, opening_ids
from formats.strict_json import loose_object


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """What rendering and tokenising need from a model."""

    tokenizer: Tokenizer
    template_source: str | None
    # For rows with tools, of a model that has a template of its own for them.
    tools_template_source: str | None
    special_tokens: dict[str, str]
    # What the tokenizer puts before a text that stands alone.
    opening_ids: tuple[int, ...]
    # None where no file names an end of a sequence.
    eos_id: int | None
    context_length: int
    vocabulary_size: int
    tokenizer_sha256: str
    template_sha256: str

    def renderer(self, today: date, *, bound: Bound = bounded_rendering) -> TemplateRenderer | None:
        """None of a model without a chat template. Raises ModelFault for one that does not compile. `bound` is as in
        chat_template.py."""
        if self.template_source is None:
            return None
        return TemplateRenderer(
            self.template_source, self.special_tokens, today, self.tools_template_source, bound=bound
        )


def read_model_folder(directory: Path) -> ModelFolder:
    """Raises ModelFault."""
    config = _json(directory / "config.json", required=True)
    check_one_part(config)
    written = _json(directory / CONFIG, required=False)
    about = with_map(written, _json(directory / MAP, required=False))
    added = _json(directory / ADDED, required=False)
    rows = vocabulary_size(config)
    tokenizer = load_tokenizer(directory / FILE, about, added, rows)
    special_tokens = _with_names_of_ids(named_tokens(about), tokenizer, about, config)
    template, tools_template = _templates(directory, written)
    return ModelFolder(
        tokenizer=tokenizer,
        template_source=template,
        tools_template_source=tools_template,
        special_tokens=special_tokens,
        opening_ids=opening_ids(tokenizer),
        eos_id=_eos_id(tokenizer, special_tokens, config),
        context_length=context_length(config),
        vocabulary_size=tokenizer.get_vocab_size() if rows is None else rows,
        tokenizer_sha256=hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
        template_sha256=hashlib.sha256("\0".join(filter(None, (template, tools_template))).encode()).hexdigest(),
    )


def _json(path: Path, *, required: bool) -> dict[str, Any]:
    if not path.is_file() and not required:
        return {}
    try:
        return loose_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelFault(path.name, f"cannot be read: {error}") from error


def _templates(directory: Path, tokenizer_config: dict[str, Any]) -> tuple[str | None, str | None]:
    """The one for every row and the one for rows with tools, named and chosen as by `get_chat_template` of
    transformers."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), None
        except UnicodeDecodeError as error:
            where = f"no UTF-8 at byte {error.start}"
            raise ModelFault(path.name, f"cannot be read: {where}") from error
        except OSError as error:
            raise ModelFault(path.name, f"cannot be read: {error}") from error
    template = tokenizer_config.get("chat_template")
    named = {"default": template}
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
    default, tools = (found if isinstance(found := named.get(name), str) else None for name in ("default", "tool_use"))
    return default, tools


def _eos_id(tokenizer: Tokenizer, special_tokens: Mapping[str, str], config: Mapping[str, Any]) -> int | None:
    from_name = tokenizer.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
    from_config = config.get("eos_token_id")
    if isinstance(from_config, list):
        from_config = from_config[0] if from_config else None
    eos_id = from_name if from_name is not None else from_config
    return eos_id if isinstance(eos_id, int) else None


def _with_names_of_ids(
    special_tokens: Mapping[str, str], tokenizer: Tokenizer, written: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, str]:
    """Classes with rules of their own have names that no file repeats; config.json then gives the ids."""
    named = dict(special_tokens)
    if written.get("tokenizer_class") in PLAIN_CLASSES:
        return named
    for name in ("bos_token", "eos_token"):
        number = config.get(f"{name}_id")
        if name not in written and isinstance(number, int) and (text := tokenizer.id_to_token(number)) is not None:
            named[name] = text
    return named
