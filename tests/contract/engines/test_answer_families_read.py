"""What each family writes is read by the parser that its chat template names: calls and thoughts, token by token.

The texts are what the templates in trl's package render for a call; the parsers are vLLM's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai_harmony import HarmonyEncodingName, load_harmony_encoding
from transformers import AutoTokenizer

from services.inference.engines.answer_form import AnswerForm
from services.inference.engines.answers.answer_program import AnswerReader
from services.inference.engines.answers.answer_questions import packed_form

TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    },
)
ARGUMENTS = '{"town": "Rome"}'
HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
XML = "<tool_call>\n<function=weather>\n<parameter=town>\nRome\n</parameter>\n</function>\n</tool_call>"
LLAMA = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    f"```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
DEEPSEEK_TOKENS = [
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
]  # fmt: skip
THINK = ["<think>", "</think>"]


def read(reader: AnswerReader, form: AnswerForm, parts: list[tuple[str, list[int]]]) -> tuple[str, str, Any]:
    """Thoughts, text and calls of an answer that comes in these parts."""
    thoughts = text = ""
    calls: dict[int, list[str]] = {}
    for at, (piece, ids) in enumerate(parts):
        found = reader.answer(
            {
                "do": "part", "answer": "a", "begins": at == 0, "form": packed_form(form), "prompt": [5],
                "parts": [{"text": piece, "ids": ids, "finished": at == len(parts) - 1}],
            }
        )  # fmt: skip
        thoughts += found["reasoning"]
        text += found["text"]
        for index, _, name, arguments in found["calls"]:
            told = calls.setdefault(index, ["", ""])
            told[0] += name
            told[1] += arguments
    return thoughts.strip(), text.strip(), [(name, json.loads(arguments)) for name, arguments in calls.values()]


@pytest.mark.parametrize(
    ("tool", "reasoning", "tokens", "written", "thought"),
    [
        ("hermes", "", [], HERMES, ""),
        ("hermes", "qwen3", THINK, f"<think>\nI look.\n</think>\n\n{HERMES}", "I look."),
        ("qwen3_coder", "qwen3", [*THINK, "<tool_call>", "</tool_call>"], f"I look.\n</think>\n\n{XML}", "I look."),
        ("llama3_json", "", ["<|python_tag|>"], LLAMA, ""),
        ("deepseek_v3", "deepseek_r1", [*THINK, *DEEPSEEK_TOKENS], f"I look.\n</think>{DEEPSEEK}", "I look."),
    ],
)
def test_a_family_is_read(
    base_model: Path, tool: str, reasoning: str, tokens: list[str], written: str, thought: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.add_tokens(tokens, special_tokens=False)
    ids = tokenizer.encode(written, add_special_tokens=False)
    reader = AnswerReader(tokenizer, tool, reasoning, 60.0)
    parts = [(tokenizer.decode([token_id]), [token_id]) for token_id in ids]
    assert read(reader, AnswerForm(tools=TOOLS), parts) == (thought, "", [("weather", json.loads(ARGUMENTS))])


@pytest.mark.parametrize(
    ("form", "written", "found"),
    [
        (
            AnswerForm(tools=TOOLS),
            "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
            f"<|constrain|>json<|message|>{ARGUMENTS}<|call|>",
            ("I look.", "", [("weather", json.loads(ARGUMENTS))]),
        ),
        (
            AnswerForm(),
            "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Sunny.<|return|>",
            ("Easy.", "Sunny.", []),
        ),
    ],
)
def test_harmony_is_read_by_its_tokens(base_model: Path, form: AnswerForm, written: str, found: object) -> None:
    encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    reader = AnswerReader(AutoTokenizer.from_pretrained(base_model), "openai", "openai_gptoss", 60.0)
    ids = encoding.encode(written, allowed_special="all")
    parts = [(encoding.decode([token_id]), [token_id]) for token_id in ids]
    assert read(reader, form, parts) == found
