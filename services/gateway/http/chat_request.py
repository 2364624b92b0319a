"""Reads the JSON of a chat completion request; what cannot be honoured is refused by name. Not pure: protobuf."""

import json
import math
from dataclasses import dataclass
from typing import Any

from chassis.errors import InvalidArgument
from chassis.storable import UNSTORABLE_TEXT, unstorable_in_json
from finemesh.inference.v1.generation_pb2 import ChatMessage, SamplingParameters
from formats.strict_json import json_object
from services.gateway.http.openai_errors import bad_param

_INT32_MAX, _INT64_MAX = 2**31 - 1, 2**63 - 1
_STOPS_MAX = 4
_PATH_CHARS_MAX = 200
# What these ask for changes nothing in the answer.
_IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "reasoning_effort", "verbosity",
    }
)  # fmt: skip
_READ = frozenset(
    {
        "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature", "top_p",
        "top_k", "stop", "seed", "presence_penalty", "frequency_penalty",
    }
)  # fmt: skip
# Parameters that are fine as long as they ask for what happens anyway.
_FIXED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MESSAGE_KEYS = frozenset({"role", "content", "name", "refusal", "annotations", "audio", "tool_calls", "function_call"})


@dataclass(frozen=True, kw_only=True)
class ChatCall:
    model: str
    messages: list[ChatMessage]
    sampling: SamplingParameters
    stream: bool
    include_usage: bool


def read_chat(body: bytes, messages_max: int) -> ChatCall:
    """InvalidArgument names the parameter that is wrong."""
    fields = _json_object(body)
    for name, value in fields.items():
        if value is None or name in _READ or name in _IGNORED:
            continue
        if name not in _FIXED:
            raise bad_param(name[:100], "is not supported here; leave it out")
        if not any(value == fixed and type(value) is type(fixed) for fixed in _FIXED[name]):
            raise bad_param(name, f"only {json.dumps(_FIXED[name][0])} is supported here; leave it out")
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise bad_param("model", "must be the id of a model, as /v1/models lists them")
    stream = _boolean(fields, "stream")
    return ChatCall(
        model=model,
        messages=_messages(fields.get("messages"), messages_max),
        sampling=_sampling(fields),
        stream=stream,
        include_usage=_include_usage(fields.get("stream_options"), stream),
    )


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        fields = json_object(body)
    except ValueError as error:
        raise InvalidArgument("INVALID_FIELD", f"the body is no JSON object: {error}; send one in UTF-8") from error
    path = unstorable_in_json(fields)
    if path is not None:
        raise bad_param(path[:_PATH_CHARS_MAX], UNSTORABLE_TEXT)
    return fields


def _messages(value: Any, messages_max: int) -> list[ChatMessage]:
    if not isinstance(value, list) or not value:
        raise bad_param("messages", "must be a list of at least one message")
    if len(value) > messages_max:
        raise bad_param("messages", f"must be at most {messages_max} messages")
    return [_message(f"messages[{index}]", message) for index, message in enumerate(value)]


def _message(param: str, message: Any) -> ChatMessage:
    if not isinstance(message, dict):
        raise bad_param(param, "must be an object with role and content")
    for key, value in message.items():
        if key not in _MESSAGE_KEYS or (key not in ("role", "content", "name") and value):
            raise bad_param(f"{param}.{key[:100]}", "is not supported here; leave it out")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad_param(f"{param}.role", "must be one of system, developer, user, assistant")
    return ChatMessage(role=_ROLES[role], content=_content(message.get("content"), f"{param}.content"))


def _content(value: Any, param: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise bad_param(param, "must be a string or a list of text parts")
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise bad_param(f"{param}[{index}]", 'must be {"type": "text", "text": "..."}; only text is supported')
        texts.append(part["text"])
    return "".join(texts)


def _sampling(fields: dict[str, Any]) -> SamplingParameters:
    limit_name = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    return SamplingParameters(
        output_tokens_max=_integer(fields, limit_name, 1, _INT32_MAX),
        temperature=_number(fields, "temperature"),
        top_p=_number(fields, "top_p"),
        top_k=_integer(fields, "top_k", -1, _INT32_MAX),
        stop=_stops(fields.get("stop")),
        seed=_integer(fields, "seed", -_INT64_MAX - 1, _INT64_MAX),
        presence_penalty=_number(fields, "presence_penalty"),
        frequency_penalty=_number(fields, "frequency_penalty"),
    )


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else (value or [])
    if not isinstance(stops, list) or len(stops) > _STOPS_MAX:
        raise bad_param("stop", f"must be a string or a list of at most {_STOPS_MAX} strings")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise bad_param("stop", "must hold strings that are not empty")
    return stops


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise bad_param("stream_options", "is only allowed together with stream: true")
    if not isinstance(value, dict):
        raise bad_param("stream_options", "must be an object")
    return _boolean(value, "include_usage")


def _boolean(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_param(name, "must be true or false")
    return bool(value)


def _integer(fields: dict[str, Any], name: str, minimum: int, maximum: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise bad_param(name, f"must be a whole number from {minimum} to {maximum}")
    # Some clients write "all candidates" as -1.
    return max(value, 0) if name == "top_k" else value


def _number(fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e6 or not math.isfinite(value):
        raise bad_param(name, "must be a number")
    return float(value)
