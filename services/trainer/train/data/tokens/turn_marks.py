"""What a chat template writes around turns: the header that asks for an answer, and what ends a turn. Told from short
conversations that are rendered once for each template.

It knows no rows.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from os.path import commonprefix
from typing import Any

from formats.prompts.plain_messages import REASONING_NAMES
from services.trainer.train.data.tokens.template_refusals import TemplateRefusal

# Renders messages with or without the generation prompt, tools, and other values of special tokens.
RenderPlain = Callable[[Sequence[Mapping[str, Any]], bool, Sequence[Mapping[str, Any]], Mapping[str, str]], str]

# A tool, and an id of a call of it that strict templates take.
TOOL = {"type": "function", "function": {"name": "lookup", "description": "", "parameters": {"type": "object"}}}
CALL_ID = "call00001"
_QUESTION = "Qfmx the question"
_ANSWER = "Qfmx the answer"
_THOUGHT = "Qfmx the thought"
_NUMBER = 86420975
_ENDED = "Qfmx the end token"


class TurnMarks:
    """Of one template. Texts of turns that it refuses are unknown: empty, or none of them."""

    def __init__(self, render: RenderPlain, special_tokens: Mapping[str, str]) -> None:
        self._render = render
        self._eos = special_tokens.get("eos_token")
        self.answer_ends = cache(self._answer_ends)
        self.question_ends = cache(self._question_ends)
        self.header = cache(self._header)

    def _header(self, with_tools: bool) -> str:
        """What a generation prompt adds behind the end of a question, or the end of that: a beginning that it shares
        with what else may follow there is left out."""
        asked, ended = (self._behind(_QUESTION, [_question()], with_tools, asking=asking) for asking in (True, False))
        return asked[len(commonprefix([asked, ended])) :]  # noqa: RUF071 - of characters

    def _question_ends(self, with_tools: bool) -> tuple[str, ...]:
        """What may follow the words of a user that ends a conversation, longest first."""
        return self._ends(self._behind(_QUESTION, [_question()], with_tools, asking=False))

    def _answer_ends(self, *, words: bool, thought: bool, calls: int, with_tools: bool) -> tuple[str, ...]:
        """What may follow the words of an answer, or the arguments of its last call, longest first. An end token that
        stands behind the last turn alone is left out of the second."""
        answer: dict[str, Any] = {"role": "assistant", "content": _ANSWER if words else ""}
        if thought:
            answer |= dict.fromkeys(REASONING_NAMES, _THOUGHT)
        if calls:
            answer["tool_calls"] = [_call(number) for number in range(calls)]
        last = str(_NUMBER) if calls else _ANSWER if words else _THOUGHT
        return self._ends(self._behind(last, [_question(), answer], with_tools, asking=False))

    def _ends(self, behind: str) -> tuple[str, ...]:
        """A text in which end tokens are marked, with its last one and without it."""
        if self._eos is None or not behind.endswith(_ENDED):
            return (self._spelled(behind),)
        return self._spelled(behind), self._spelled(behind.removesuffix(_ENDED))

    def _spelled(self, behind: str) -> str:
        return behind.replace(_ENDED, self._eos or "")

    def _behind(self, words: str, messages: Sequence[Mapping[str, Any]], with_tools: bool, *, asking: bool) -> str:
        """What follows the last of these words in the rendering, with marks for end tokens."""
        tools = [TOOL] if with_tools else []
        variables = {} if self._eos is None else {"eos_token": _ENDED}
        try:
            marked = self._render(messages, asking, tools, variables)
            plain = self._render(messages, asking, tools, {})
        except TemplateRefusal:
            return ""
        if words not in marked or self._spelled(marked) != plain:
            return ""
        return marked.rpartition(words)[2]


def _question() -> dict[str, Any]:
    return {"role": "user", "content": _QUESTION}


def _call(number: int) -> dict[str, Any]:
    function = {"name": "lookup", "arguments": {"number": _NUMBER}}
    return {"id": f"{CALL_ID[:-1]}{number + 1}", "type": "function", "function": function}
