"""Writes continuations of texts as OpenAI's older objects. Not pure: protobuf."""

from typing import Any

from finemesh.inference.v1 import inference_service_pb2
from services.gateway.http.answer_parts import FINISH_REASONS, usage_of
from services.gateway.http.completion_request import CompletionCall
from services.gateway.http.logprobs_answer import completion_logprobs

_OBJECT = "text_completion"


def text_completion(
    answer: inference_service_pb2.CompleteResponse, call: CompletionCall, created_s: int
) -> dict[str, Any]:
    return {
        "id": answer.generation_id,
        "object": _OBJECT,
        "created": created_s,
        "model": call.model,
        "choices": [
            {
                "index": choice.index,
                "text": call.echo + choice.text,
                "logprobs": completion_logprobs(choice.logprobs, 0) if call.logprobs else None,
                "finish_reason": FINISH_REASONS.get(choice.finish_reason, "stop"),
            }
            for choice in answer.choices
        ],
        "usage": usage_of(answer.usage),
        "system_fingerprint": answer.revision or None,
    }


class CompletionChunks:
    """The chunks of one streamed continuation; they share id, model and time."""

    def __init__(self, call: CompletionCall, created_s: int) -> None:
        self._call = call
        self._base: dict[str, Any] = {
            "id": "",
            "object": _OBJECT,
            "created": created_s,
            "model": call.model,
            "system_fingerprint": None,
        }
        # Characters of each choice that were told, as the sum of its tokens' texts.
        self._told: dict[int, int] = {}

    def of(self, part: inference_service_pb2.StreamCompleteResponse) -> list[dict[str, Any]]:
        """The chunks for one message: new text with the end, and the usage where it was asked for."""
        self._base["id"] = part.generation_id or self._base["id"]
        self._base["system_fingerprint"] = part.revision or self._base["system_fingerprint"]
        chunks = []
        text = part.text_delta if part.choice in self._told else self._call.echo + part.text_delta
        told = self._told.setdefault(part.choice, 0)
        if text or part.logprobs or part.finish_reason:
            self._told[part.choice] += sum(len(token.text) for token in part.logprobs)
            reason = FINISH_REASONS.get(part.finish_reason, "stop") if part.finish_reason else None
            choice = {
                "index": part.choice,
                "text": text,
                "logprobs": completion_logprobs(part.logprobs, told) if part.logprobs else None,
                "finish_reason": reason,
            }
            chunk = {**self._base, "choices": [choice]}
            chunks.append({**chunk, "usage": None} if self._call.include_usage else chunk)
        if part.HasField("usage") and self._call.include_usage:
            chunks.append({**self._base, "choices": [], "usage": usage_of(part.usage)})
        return chunks
