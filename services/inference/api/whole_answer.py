"""Puts the parts of an answer together for callers who get it whole. Not pure: protobuf."""

from __future__ import annotations

from finemesh.inference.v1 import generation_pb2 as pb
from finemesh.inference.v1 import inference_service_pb2
from services.inference.api import generation_convert as convert
from services.inference.engines.answer_chunks import Chunk, FinishReason, TokenLogprob, ToolCallDelta, Usage


class WholeAnswer:
    """`add` every chunk of a call, then read `usage` and the choices."""

    def __init__(self) -> None:
        self._choices: dict[int, _Choice] = {}
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)

    def add(self, chunk: Chunk) -> None:
        self._choices.setdefault(chunk.choice, _Choice()).add(chunk)
        self.usage = chunk.usage

    def chat_choices(self) -> list[inference_service_pb2.ChatChoice]:
        """Text, reasoning and calls of each choice, by index."""
        return [
            inference_service_pb2.ChatChoice(
                index=index,
                message=pb.ChatMessage(
                    role="assistant",
                    content="".join(choice.texts),
                    reasoning="".join(choice.thoughts),
                    tool_calls=choice.calls(),
                ),
                finish_reason=convert.finish_reason_to_proto(choice.finish_reason),
                logprobs=convert.logprobs_to_proto(choice.logprobs),
            )
            for index, choice in sorted(self._choices.items())
        ]

    def completion_choices(self) -> list[inference_service_pb2.CompletionChoice]:
        """The text of each choice, by index."""
        return [
            inference_service_pb2.CompletionChoice(
                index=index,
                text="".join(choice.texts),
                finish_reason=convert.finish_reason_to_proto(choice.finish_reason),
                logprobs=convert.logprobs_to_proto(choice.logprobs),
            )
            for index, choice in sorted(self._choices.items())
        ]


class _Choice:
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self._calls: dict[int, list[ToolCallDelta]] = {}

    def add(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)
        self.thoughts.append(chunk.reasoning)
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason or self.finish_reason
        for call in chunk.tool_calls:
            self._calls.setdefault(call.index, []).append(call)

    def calls(self) -> list[pb.ToolCall]:
        return [
            pb.ToolCall(
                id="".join(part.id for part in parts),
                name="".join(part.name for part in parts),
                arguments="".join(part.arguments for part in parts),
            )
            for _, parts in sorted(self._calls.items())
        ]
