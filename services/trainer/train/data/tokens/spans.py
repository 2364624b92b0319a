"""Finds the characters of a rendered conversation that a model learns: what it would have to say, by the same template,
after the prompt that a server renders for each answer.

The conversation is rendered once as it is, and once more to see where each message stands. Of the answers in like
surroundings the first one's prompt is rendered, and the others have to look the same around their beginning. So the
work grows with the length of the conversation. What cannot be held against its prompt is refused.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from formats.rows import Conversation, Message
from services.trainer.train.data.tokens.field_marks import FieldPlaces, Span, find_fields
from services.trainer.train.data.tokens.template_coverage import check_answer
from services.trainer.train.data.tokens.template_refusals import (
    asked_otherwise,
    call_left_out,
    ended_otherwise,
    header_learned,
    no_prompt,
    not_marked,
    reasoning_left_out,
)
from services.trainer.train.data.tokens.turn_marks import TurnMarks
from services.trainer.train.data.tokens.turn_shapes import Shape, surroundings

# As many answers, the first, one in between and the last, have surroundings of their own.
_UNLIKE_MAX = 3


class Renderer(Protocol):
    """What is needed of a chat template."""

    turn_marks: TurnMarks

    def render_plain(
        self,
        messages: Sequence[Mapping[str, Any]],
        asking: bool,
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, str],
    ) -> str: ...

    def marks_generation(self, with_tools: bool) -> bool: ...

    def sought_texts(self, with_tools: bool) -> frozenset[str]: ...


class RenderedRow:
    """A conversation, its messages as the template takes them, and its rendering `text`."""

    def __init__(self, template: Renderer, row: Conversation, entries: Sequence[Mapping[str, Any]], text: str) -> None:
        self._template = template
        self._row = row
        self._messages = row.messages
        self._entries = entries
        self._text = text
        self._with_tools = bool(row.tools)

    def answer_spans(self) -> list[Span]:
        """Of all answers that carry loss, each with what ends its turn. Raises TemplateRefusal."""
        self._check_several_calls()
        learned = [index for index, each in enumerate(self._messages) if each.role == "assistant" and each.weight]
        spans: list[Span] = []
        for index, start in zip(learned, self._starts(learned), strict=True):
            if self._template.marks_generation(self._with_tools):
                found = self._marked(index, start)
            else:
                found = [(start, self._end(index, start))]
            said = "".join(self._text[begin:end] for begin, end in found)
            header = self._header if self._text.endswith(self._header, 0, start) else ""
            earlier = index < len(self._messages) - 1
            check_answer(said, index, self._messages[index], header=header, earlier=earlier)
            self._check_lead(index, self._text[start : found[-1][1]])
            spans += found
        return spans

    def message_spans(self) -> list[Span]:
        """Of all messages that carry loss, with their headers. Raises TemplateRefusal."""
        self._check_several_calls()
        spans: list[Span] = []
        start = 0
        for index, message in enumerate(self._messages):
            end = self._end(index, start)
            if message.weight:
                check_answer(self._text[start:end], index, message, earlier=index < len(self._messages) - 1)
                spans.append((start, end))
            start = end
        return spans

    def _starts(self, learned: Sequence[int]) -> list[int]:
        """Where the prompts of these answers end in the text."""
        starts: list[int] = []
        known: dict[Shape, str] = {}
        unlike = len(learned) <= _UNLIKE_MAX
        for index in learned:
            asked_from = None if unlike else self._end_before(index)
            around = None if unlike else self._surroundings[index]
            lead = known.get(around) if around is not None else None
            if lead is not None and asked_from is not None and self._text.startswith(lead, asked_from):
                start = asked_from + len(lead)
            else:
                start = self._prompt_length(index)
                if around is not None and asked_from is not None and asked_from <= start:
                    known.setdefault(around, self._text[asked_from:start])
            starts.append(start)
        return starts

    def _prompt_length(self, index: int) -> int:
        """Of the prompt that a server renders for this answer, which has to be the beginning of the text."""
        if not any(message.role == "user" for message in self._messages[:index]):
            # Some templates refuse to ask for such an answer, so the header alone says where it begins.
            return self._behind_header(index)
        prompt = self._rendered(index, asking=True)
        if not self._text.startswith(prompt):
            raise asked_otherwise(prompt, self._text, self._header, index, self._messages)
        return len(prompt)

    def _behind_header(self, index: int) -> int:
        begin = self._places.begins[index] if self._places else None
        found = self._text.rfind(self._header, 0, begin) if self._header and begin is not None else -1
        if found < 0:
            raise no_prompt(index)
        return found + len(self._header)

    def _check_lead(self, index: int, said: str) -> None:
        """What stands between a prompt and the first words of its answer is the model's to say, so it has no header."""
        message = self._messages[index]
        names = (call.name for call in message.tool_calls)
        words = next((each for each in (message.reasoning, message.content, *names) if each and each.strip()), "")
        if self._header and self._header in said.partition(words.strip() or said)[0]:
            raise header_learned(self._header, index)

    def _check_several_calls(self) -> None:
        """Some templates render the first call of a message alone."""
        if any(len(message.tool_calls) > 1 for message in self._messages) and self._places:
            for index in sorted(self._places.calls_lost):
                raise call_left_out(index)

    def _end_before(self, index: int) -> int | None:
        """Where the last words before this message end, as far as they can be seen close to it."""
        ends = self._places.ends if self._places else []
        return next((end for end in reversed(ends[max(0, index - 2) : index]) if end is not None), None)

    def _end(self, index: int, start: int) -> int:
        """Behind what ends the turn of a message that begins at `start`."""
        if index == len(self._messages) - 1:
            return len(self._text)
        end = self._end_at_once(index, start) or self._end_by_marks(index)
        if end is not None:
            return end
        alone = self._rendered(index + 1, asking=False)
        if self._text.startswith(alone):
            return len(alone)
        message = self._messages[index]
        if message.reasoning and message.reasoning.strip() not in self._text[start : self._next_begin(index)]:
            raise reasoning_left_out(index, earlier=True)
        raise ended_otherwise(index, message)

    def _end_at_once(self, index: int, start: int) -> int | None:
        """Of most answers, which are their words and what ends a turn."""
        message = self._messages[index]
        if message.role != "assistant" or message.tool_calls or message.reasoning:
            return None
        if not self._text.startswith(message.content, start):
            return None
        words_end = start + len(message.content)
        ends = (end for end in self._ends_of(message) if end.strip() and self._text.startswith(end, words_end))
        end = next(ends, None)
        return None if end is None else words_end + len(end)

    def _end_by_marks(self, index: int) -> int | None:
        message = self._messages[index]
        words_end = self._places.ends[index] if self._places else None
        if words_end is None or message.role not in ("assistant", "user"):
            return None
        ends = [end for end in self._ends_of(message) if end.strip()]
        if message.tool_calls:
            # Numbers and brackets may come between the last word of the arguments and the end.
            limit = self._next_begin(index)
            for end in ends:
                found = self._text.find(end, words_end, limit)
                if found >= 0 and self._text.find(end, found + 1, limit) < 0:
                    return found + len(end)
            return None
        white = message.content[len(message.content.rstrip()) :]
        for end in ends:
            for between in (white, ""):
                if self._text.startswith(between + end, words_end):
                    return words_end + len(between) + len(end)
        return None

    def _ends_of(self, message: Message) -> tuple[str, ...]:
        marks = self._template.turn_marks
        if message.role == "user":
            return marks.question_ends(self._with_tools)
        return marks.answer_ends(
            words=bool(message.content.strip()),
            thought=bool(message.reasoning),
            calls=min(2, len(message.tool_calls)),
            with_tools=self._with_tools,
        )

    def _next_begin(self, index: int) -> int:
        begins = self._places.begins if self._places else []
        return next((begin for begin in begins[index + 1 :] if begin is not None), len(self._text))

    def _marked(self, index: int, start: int) -> list[Span]:
        """What the template itself marks of this answer, less the header that its prompt writes."""
        found = [(max(begin, start), end) for begin, end in self._marks.get(index, ()) if end > start]
        if not found or found[-1][1] > self._next_begin(index):
            raise not_marked(index)
        return found

    @cached_property
    def _marks(self) -> dict[int, list[Span]]:
        """Marks of the template belong to the first answer with words inside, or else to the last one before them."""
        places = self._places
        if places is None:
            return {}
        answers = [
            (begin, index)
            for index, begin in enumerate(places.begins)
            if begin is not None and self._messages[index].role == "assistant"
        ]
        marks: dict[int, list[Span]] = {}
        at = 0
        for span in places.generated:
            while at < len(answers) and answers[at][0] < span[0]:
                at += 1
            inside = at < len(answers) and answers[at][0] < span[1]
            if inside or at:
                marks.setdefault(answers[at if inside else at - 1][1], []).append(span)
        return marks

    @cached_property
    def _places(self) -> FieldPlaces | None:
        def render(messages: Sequence[Mapping[str, Any]], variables: Mapping[str, str]) -> str:
            return self._template.render_plain(messages, False, self._row.tools, variables)

        return find_fields(self._text, self._entries, render, self._template.sought_texts(self._with_tools))

    @cached_property
    def _surroundings(self) -> list[Shape]:
        return surroundings(self._messages, self._template.sought_texts(self._with_tools))

    @property
    def _header(self) -> str:
        return self._template.turn_marks.header(self._with_tools)

    def _rendered(self, count: int, *, asking: bool) -> str:
        return self._template.render_plain(self._entries[:count], asking, self._row.tools, {})
