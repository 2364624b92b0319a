"""The process that reads answers with vLLM's own parsers of the model's family. Not pure: os, sockets, vllm.

`python -m services.inference.engines.answers.answer_program DESCRIPTOR MODEL BYTES TOOL REASONING SECONDS`. It is led
as the processes that render prompts are (`prompts/forking.py`), so that one that was killed has a successor in
milliseconds. TOOL and REASONING name parsers, empty for none. An answer may take SECONDS of it altogether.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import xgrammar
from pydantic import ValidationError
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.parser.abstract_parser import structured_outputs_to_format
from vllm.parser.parser_manager import ParserManager
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

from services.inference.engines.answers.answer_questions import HARMONY, Refused, form_fields, keeps_thoughts
from services.inference.engines.prompts.forking import lead
from services.inference.engines.prompts.frames import Kind, pack_answer, pack_words, unpack_question

_WORDS_CHARS_MAX = 500
_WHITESPACE_MAX = 32
_GRAMMAR_CACHE_BYTES = 64 << 20


class AnswerReader:
    """Answers questions about one model's answers. Keeps a parser for each answer that is being made."""

    def __init__(self, tokenizer: Any, tool: str, reasoning: str, seconds_max: float) -> None:
        self._tokenizer = tokenizer
        self._seconds_max = seconds_max
        # Made once, and shared with every successor.
        self._tokens = xgrammar.TokenizerInfo.from_huggingface(tokenizer)
        self._answers: dict[str, _Answer] = {}
        self._tool = tool
        self._reasoning = reasoning

    def answered(self, body: bytes) -> bytes:
        """As `answer`. What goes wrong is told, and the process goes on: it holds no state but parsers."""
        try:
            return _packed(self.answer(unpack_question(body)))
        except MemoryError:
            raise
        except Refused as refused:
            return pack_words(Kind.REFUSED, json.dumps([refused.field, refused.problem]))
        except Exception as error:
            # Whatever a parser raises for what a model wrote.
            return _packed({"failed": f"{type(error).__name__}: {error}"[:_WORDS_CHARS_MAX]})

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        match question["do"]:
            case "form":
                return self._form(question["form"])
            case "part":
                return self._part(question)
            case _:
                self._answers.pop(question["answer"], None)
                return {}

    def _form(self, form: Mapping[str, Any]) -> dict[str, Any]:
        """How the tokens of such an answer are chosen. Compiles its grammar, so that the engine only does what took no
        longer than it may."""
        try:
            request = self._request(form)
            if (parser := self._parser(form, request)) is not None:
                request = parser.adjust_request(request)
            wanted = request.extract_structured_outputs()
            guide = None if wanted is None else self._guide(wanted)
        except (ValidationError, VLLMValidationError, ValueError, RuntimeError, RecursionError) as error:
            field = "tools" if form["tools"] and form["response"] == "text" else "response_format"
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Refused(field, f"cannot be kept: {problem[:_WORDS_CHARS_MAX]}") from error
        return {"guide": guide, "special_tokens": not request.skip_special_tokens}

    def _part(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What is new in an answer with these tokens. `parts` has more than one for a reader that is new to it."""
        name = question["answer"]
        if question["begins"]:
            request = self._request(question["form"])
            self._answers[name] = _Answer(self._parser(question["form"], request), request, question["prompt"])
        answer = self._answers.get(name)
        if answer is None:
            return {"unknown": True}
        began_s = time.process_time()
        for part in question["parts"]:
            found = answer.read(part["text"], part["ids"], finished=part["finished"])
        answer.seconds += time.process_time() - began_s
        if question["parts"][-1]["finished"]:
            del self._answers[name]
        if answer.seconds > self._seconds_max:
            self._answers.pop(name, None)
            return {"failed": f"it took more than {self._seconds_max:g} s altogether"}
        return found

    def _request(self, form: Mapping[str, Any]) -> ChatCompletionRequest:
        return ChatCompletionRequest(messages=[], **form_fields(form))

    def _parser(self, form: Mapping[str, Any], request: ChatCompletionRequest) -> Any:
        thinks = keeps_thoughts(self._reasoning, guided=form["guided"])
        parser = _parser_class(
            self._tool if request.tools else "", self._reasoning if thinks else "", must_call=form["must_call"]
        )
        if parser is None:
            return None
        thinks = form["enable_thinking"]
        told = {} if thinks is None else {"enable_thinking": thinks}
        return parser(self._tokenizer, request.tools, chat_template_kwargs=told)

    def _guide(self, wanted: StructuredOutputsParams) -> dict[str, Any]:
        validate_xgrammar_grammar(SamplingParams(structured_outputs=wanted))
        form = structured_outputs_to_format(wanted)
        if form is None:
            raise ValueError("the parser of this model guides by a form that is not known here")
        tag = xgrammar.StructuralTag(format=form).model_dump()
        _bound_whitespace(tag)
        told = json.dumps(tag)
        self._compiler.compile_structural_tag(told)
        return {"structural_tag": told}

    @functools.cached_property
    def _compiler(self) -> Any:
        return xgrammar.GrammarCompiler(self._tokens, max_threads=1, cache_limit_bytes=_GRAMMAR_CACHE_BYTES)


class _Answer:
    """One answer on its way, with the parser that reads it."""

    def __init__(self, parser: Any, request: ChatCompletionRequest, prompt: list[int]) -> None:
        self._parser = parser
        self._request = request
        self._prompt = prompt
        self.seconds = 0.0

    def read(self, text: str, token_ids: list[int], *, finished: bool) -> dict[str, Any]:
        if self._parser is None:
            return {"text": text, "reasoning": "", "calls": []}
        found = self._parser.parse_delta(text, token_ids, self._request, self._prompt, finished=finished)
        if found is None:
            return {"text": "", "reasoning": "", "calls": []}
        return {
            "text": found.content or "",
            "reasoning": found.reasoning or "",
            "calls": [[call.index, call.id or "", *_function(call.function)] for call in found.tool_calls],
        }


def _packed(answer: Mapping[str, Any]) -> bytes:
    return pack_answer(Kind.TEXTS, json.dumps(answer).encode())


def _bound_whitespace(form: Any) -> None:
    """JSON may stand in any number of lines; a model that goes on writing blanks would use up its answer with them."""
    if isinstance(form, dict):
        if form.get("type") == "json_schema" and "max_whitespace_cnt" in form:
            form["max_whitespace_cnt"] = _WHITESPACE_MAX
            return
        form = list(form.values())
    if isinstance(form, list):
        for part in form:
            _bound_whitespace(part)


def _function(function: Any) -> tuple[str, str]:
    return ("", "") if function is None else (function.name or "", function.arguments or "")


@functools.cache
def _parser_class(tool: str, reasoning: str, *, must_call: bool = False) -> Any:
    return ParserManager.get_parser(
        tool_parser_name=tool or None,
        reasoning_parser_name=reasoning or None,
        enable_auto_tools=bool(tool),
        is_harmony=not HARMONY.isdisjoint((tool, reasoning)),
        # Arguments of a call that must be made keep the schema that was declared.
        tool_strict_level="parameter" if must_call else "auto",
    )


def main() -> int:
    tool, reasoning, seconds_max = sys.argv[4:]

    def load(model_path: str) -> AnswerReader:
        tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True, trust_remote_code=False)
        reader = AnswerReader(tokenizer, tool, reasoning, float(seconds_max))
        # A parser that lacks its tokens says so at the start.
        for parser in {_parser_class(tool, reasoning), _parser_class("", reasoning)} - {None}:
            parser(tokenizer)
        return reader

    return lead(sys.argv[1:4], load, lambda body, reader: reader.answered(body))


if __name__ == "__main__":
    sys.exit(main())
