"""Which of vLLM's parsers reads the answers of a model: what its chat template writes, a parser reads. Not pure: disk.

The names are vLLM's. `tests/unit/inference/test_answer_families.py` compares them with those that vLLM has.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chassis.errors import FieldViolation, refuse_invalid
from services.inference.engines.answer_form import AnswerParsers

NO_PARSER = "none"
TEMPLATE_BYTES_MAX = 1 << 20
# A name that is told rather than found need not stand in the tables below.
TOOL_PARSERS = frozenset(
    {
        "apertus", "cohere_command3", "cohere_command4", "deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4",
        "deepseek_v41", "dots", "ernie45", "functiongemma", "gemma4", "gigachat3", "glm45", "glm47", "granite",
        "granite-20b-fc", "granite4", "hermes", "hunyuan_a13b", "hy_v3", "hy_v4", "inkling", "internlm", "jamba",
        "k2_horizon", "kimi_k2", "kimi_k3", "lfm2", "ling3", "llama3_json", "llama4_json", "llama4_pythonic",
        "longcat", "mimo", "minicpm5", "minimax_m2", "minimax_m3", "mistral", "muse_glimmer", "olmo3", "openai",
        "phi4_mini_json", "plamo3", "poolside_v1", "pythonic", "qwen3_coder", "qwen3_json", "qwen3_xml", "seed_oss",
        "step3", "step3p5", "xlam",
    }
)  # fmt: skip
REASONING_PARSERS = frozenset(
    {
        "cohere_command3", "cohere_command4", "deepseek_r1", "deepseek_v3", "deepseek_v4", "deepseek_v41", "ernie45",
        "gemma4", "glm45", "glm47", "granite", "granite_thinking_parser", "holo2", "hunyuan_a13b", "hy_v3", "hy_v4",
        "inkling", "k2_horizon", "kimi_k2", "kimi_k3", "ling3", "mimo", "minicpmv", "minimax_m2",
        "minimax_m2_append_think", "minimax_m3", "mistral", "muse_glimmer", "nemotron_v3", "olmo3", "openai_gptoss",
        "plamo3", "poolside_v1", "qwen3", "seed_oss", "step3", "step3p5",
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Family:
    """A parser, the marks of which all stand in the templates that write its form, and the tokens that it needs."""

    parser: str
    marks: tuple[str, ...]
    tokens: tuple[str, ...] = ()


# The first that fits.
_TOOL_FAMILIES = (
    _Family(parser="openai", marks=("<|channel|>", "<|call|>"), tokens=("<|channel|>", "<|call|>")),
    _Family(parser="mistral", marks=("[TOOL_CALLS]",), tokens=("[TOOL_CALLS]",)),
    _Family(parser="deepseek_v3", marks=("<｜tool▁calls▁begin｜>", "```json"),
            tokens=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")),
    _Family(parser="deepseek_v31", marks=("<｜tool▁calls▁begin｜>",),
            tokens=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")),
    _Family(parser="kimi_k2", marks=("<|tool_calls_section_begin|>",), tokens=("<|tool_calls_section_begin|>",)),
    _Family(parser="minimax_m2", marks=("<minimax:tool_call>",)),
    _Family(parser="seed_oss", marks=("<seed:tool_call>",)),
    _Family(parser="glm45", marks=("<tool_call>", "<arg_key>")),
    _Family(parser="qwen3_coder", marks=("<tool_call>", "<function=", "<parameter=")),
    _Family(parser="hermes", marks=("<tool_call>", "</tool_call>", "arguments")),
    _Family(parser="functiongemma", marks=("<start_function_call>",)),
    _Family(parser="gemma4", marks=("<|tool_call>", "<tool_call|>")),
    _Family(parser="lfm2", marks=("<|tool_call_start|>",), tokens=("<|tool_call_start|>", "<|tool_call_end|>")),
    _Family(parser="llama3_json", marks=("<|python_tag|>",), tokens=("<|python_tag|>",)),
    # Llama 3.2 writes calls as 3.1 does, and its template for them names no token.
    _Family(parser="llama3_json", marks=("ipython", '"parameters"'), tokens=("<|python_tag|>",)),
)  # fmt: skip
_REASONING_FAMILIES = (
    _Family(parser="openai_gptoss", marks=("<|channel|>", "analysis"), tokens=("<|channel|>",)),
    _Family(parser="mistral", marks=("[THINK]",), tokens=("[THINK]", "[TOOL_CALLS]")),
    _Family(parser="seed_oss", marks=("<seed:think>",), tokens=("<seed:think>",)),
    _Family(parser="gemma4", marks=("<|channel>", "<channel|>")),
    _Family(parser="glm45", marks=("<think>", "<arg_key>"), tokens=("<think>", "</think>")),
    # Those that may think or not tell by `enable_thinking`, or by what the prompt says already.
    _Family(parser="qwen3", marks=("<think>", "enable_thinking"), tokens=("<think>", "</think>")),
)
# A template that opens the thoughts itself, behind everything that was said: its answers always begin with them.
_OPENS_THOUGHTS = re.compile(r"add_generation_prompt[^%]{0,200}%}(?:(?!{%-?\s*endif).){0,400}<think>", re.DOTALL)
_OPENED = _Family(parser="deepseek_r1", marks=("<think>",), tokens=("<think>", "</think>"))


def parsers_of(template: str, tokens: frozenset[str]) -> AnswerParsers:
    """What reads the answers of a model with this chat template, whose tokenizer has these added tokens."""
    tool = next((family.parser for family in _TOOL_FAMILIES if _fits(family, template, tokens)), "")
    reasoning = next((family.parser for family in _REASONING_FAMILIES if _fits(family, template, tokens)), "")
    if not reasoning and _OPENS_THOUGHTS.search(template) and _fits(_OPENED, template, tokens):
        reasoning = _OPENED.parser
    return AnswerParsers(tool=tool, reasoning=reasoning)


def parsers_of_folder(folder: Path, tool_parser: str, reasoning_parser: str) -> AnswerParsers:
    """What was told, else what the files tell; nothing for a model without a chat template."""
    found = parsers_of(_template(folder), _added_tokens(folder))
    return AnswerParsers(tool=_told(tool_parser, found.tool), reasoning=_told(reasoning_parser, found.reasoning))


def check_parser_names(tool_parser: str, reasoning_parser: str) -> None:
    """InvalidArgument for a name that vLLM does not have."""
    refuse_invalid(
        [
            FieldViolation(f"header.{name}", f"must be none or one of {', '.join(sorted(known))}")
            for name, told, known in (
                ("tool_parser", tool_parser, TOOL_PARSERS),
                ("reasoning_parser", reasoning_parser, REASONING_PARSERS),
            )
            if told not in ("", NO_PARSER) and told not in known
        ]
    )


def _fits(family: _Family, template: str, tokens: frozenset[str]) -> bool:
    return all(mark in template for mark in family.marks) and tokens.issuperset(family.tokens)


def _told(told: str, found: str) -> str:
    if told == NO_PARSER:
        return ""
    return told or found


def _template(folder: Path) -> str:
    """The text of all templates that the folder has: one for tools says most of calls."""
    texts = [_text(path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    texts.append(_text(folder / "chat_template.jinja"))
    for name in ("chat_template.json", "tokenizer_config.json"):
        declared = _json(folder / name).get("chat_template")
        if isinstance(declared, list):
            declared = "\n".join(str(entry.get("template", "")) for entry in declared if isinstance(entry, dict))
        texts.append(declared if isinstance(declared, str) else "")
    return "\n".join(texts)


def _added_tokens(folder: Path) -> frozenset[str]:
    added = _json(folder / "tokenizer.json").get("added_tokens")
    entries = added if isinstance(added, list) else []
    decoder = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    entries += list(decoder.values()) if isinstance(decoder, dict) else []
    return frozenset(str(entry.get("content")) for entry in entries if isinstance(entry, dict))


def _text(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > TEMPLATE_BYTES_MAX:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def _json(path: Path) -> dict[str, Any]:
    """Empty for what is none: whether the files are sound was looked at before."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
