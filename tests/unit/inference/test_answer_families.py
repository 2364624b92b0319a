"""Which parsers a model's own files name: the families as their authors ship them, and names that vLLM has."""

from __future__ import annotations

import importlib.util
import json
import re
from importlib import resources
from pathlib import Path

import pytest

from chassis.errors import InvalidArgument
from services.inference.engines.answer_form import AnswerParsers
from services.inference.models.answer_families import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    check_parser_names,
    parsers_of,
    parsers_of_folder,
)

# Tokens of the families' vocabularies that their parsers need.
TOKENS = frozenset(
    {"<think>", "</think>", "<|python_tag|>", "[TOOL_CALLS]", "<|channel|>", "<|call|>", "<｜tool▁calls▁begin｜>",
     "<｜tool▁calls▁end｜>"}
)  # fmt: skip


@pytest.mark.parametrize(
    ("template", "tool", "reasoning"),
    [
        ("qwen2_5", "hermes", ""),
        ("qwen3", "hermes", "qwen3"),
        ("qwen3_5_think", "qwen3_coder", "qwen3"),
        ("qwen3_instruct_2507", "hermes", ""),
        ("llama3_1", "llama3_json", ""),
        ("llama3_2", "llama3_json", ""),
        ("deepseek_r1_distill", "deepseek_v3", "deepseek_r1"),
        ("gptoss", "openai", "openai_gptoss"),
        ("glm4moe", "glm45", "glm45"),
        ("gemma4", "gemma4", "gemma4"),
        ("llama3", "", ""),
        ("gemma", "", ""),
        ("phi3", "", ""),
    ],
)
def test_a_template_says_what_reads_its_answers(template: str, tool: str, reasoning: str) -> None:
    file = resources.files("trl") / "chat_templates" / f"{template}.jinja"
    assert parsers_of(file.read_text(), TOKENS) == AnswerParsers(tool=tool, reasoning=reasoning)


def test_a_parser_whose_tokens_are_missing_is_not_named() -> None:
    assert parsers_of("[TOOL_CALLS]{{ enable_thinking }}<think>", frozenset()) == AnswerParsers()


def test_a_template_that_opens_the_thoughts_is_known_by_it() -> None:
    opening = "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
    closing = "{{ message.content.split('<think>') }}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
    assert parsers_of(opening, TOKENS).reasoning == "deepseek_r1"
    assert parsers_of(closing, TOKENS).reasoning == ""


def test_what_is_told_goes_before_what_is_found(tmp_path: Path) -> None:
    template = "<tool_call>{{ call.arguments }}</tool_call><think>{{ enable_thinking }}"
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"content": "<think>"}, {"content": "</think>"}]})
    )
    assert parsers_of_folder(tmp_path, "", "") == AnswerParsers(tool="hermes", reasoning="qwen3")
    assert parsers_of_folder(tmp_path, "none", "none") == AnswerParsers()
    assert parsers_of_folder(tmp_path, "qwen3_xml", "") == AnswerParsers(tool="qwen3_xml", reasoning="qwen3")


def test_names_that_nothing_has_are_refused() -> None:
    check_parser_names("none", "")
    with pytest.raises(InvalidArgument) as refused:
        check_parser_names("hermez", "qwen3")
    assert [violation.field for violation in refused.value.violations] == ["header.tool_parser"]


@pytest.mark.parametrize(("room", "known"), [("tool_parsers", TOOL_PARSERS), ("reasoning", REASONING_PARSERS)])
def test_the_names_are_vllms(room: str, known: frozenset[str]) -> None:
    """Read, not imported: vLLM takes a dozen seconds to import."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    table = (Path(spec.origin).parent / room / "__init__.py").read_text()
    # `hf` reads a description of the form that the tokenizer has to bring.
    assert set(re.findall(r'^    "([\w-]+)": \(', table, re.MULTILINE)) - {"hf"} == known
