"""Reads the JSON of a chat completion request; what cannot be honoured is refused by name. Not pure: protobuf."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from finemesh.inference.v1.generation_pb2 import (
    ChatMessage,
    ResponseFormat,
    SamplingParameters,
    Tool,
    ToolCall,
    ToolChoice,
)
from finemesh.inference.v1.inference_service_pb2 import ChatRequest, StreamChatRequest
from formats.messages import read_messages
from formats.row_errors import LineFaults, RowErrors
from formats.rows import Message
from services.gateway.http.logprobs_answer import LogprobsForm
from services.gateway.http.openai_errors import bad_param, bad_params
from services.gateway.http.request_fields import (
    INT32_MAX,
    Parameters,
    boolean,
    integer,
    read_model,
    read_object,
    read_part,
)
from services.gateway.http.sampling_request import IGNORED, SAMPLING, SENDING, read_include_usage, read_sampling
from services.gateway.http.tool_request import read_declarations, read_response_format, read_tool_choice

PARAMETERS = Parameters(
    read=SAMPLING
    | SENDING
    | {
        "messages", "max_completion_tokens", "tools", "tool_choice", "parallel_tool_calls", "response_format",
        "logprobs", "top_logprobs", "chat_template_kwargs", "reasoning",
    },
    # Keys of caches, and how long models of OpenAI think and write.
    ignored=IGNORED | {"prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "verbosity"},
    fixed={
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "echo": (False,),
        "include_reasoning": (True,),
        "context_length_exceeded_behavior": ("error",),
    },
)  # fmt: skip
_LOGPROBS_MAX = 20


Asked = TypeVar("Asked", ChatRequest, StreamChatRequest)


@dataclass(frozen=True, kw_only=True)
class ChatCall:
    """What is asked, and how its answer is written."""

    model: str
    messages: list[ChatMessage]
    sampling: SamplingParameters
    tools: list[Tool]
    tool_choice: ToolChoice | None
    parallel_tool_calls: bool | None
    response_format: ResponseFormat | None
    enable_thinking: bool | None
    stream: bool
    include_usage: bool
    logprobs: LogprobsForm

    def asked(self, message_class: type[Asked]) -> Asked:
        return message_class(
            model=self.model,
            messages=self.messages,
            sampling=self.sampling,
            tools=self.tools,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.response_format,
            enable_thinking=self.enable_thinking,
        )


def read_chat(body: bytes, messages_max: int) -> ChatCall:
    """InvalidArgument names the parameter that is wrong."""
    fields = read_object(body, PARAMETERS)
    stream = bool(boolean(fields, "stream"))
    form, top_logprobs = _logprobs(fields)
    limit_name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    tools = read_declarations(fields.get("tools"))
    return ChatCall(
        model=read_model(fields),
        messages=_messages(fields.get("messages"), messages_max),
        sampling=read_sampling(fields, tokens_max=integer(fields, limit_name, 1, INT32_MAX), top_logprobs=top_logprobs),
        tools=tools,
        tool_choice=read_tool_choice(fields.get("tool_choice"), tools),
        # Without tools there is nothing that it could change.
        parallel_tool_calls=boolean(fields, "parallel_tool_calls") if tools else None,
        response_format=read_response_format(fields),
        enable_thinking=_enable_thinking(fields),
        stream=stream,
        include_usage=read_include_usage(fields, stream=stream),
        logprobs=form,
    )


def _messages(value: Any, messages_max: int) -> list[ChatMessage]:
    """By the rules of a dataset's row: what can be trained can be asked, and means the same."""
    errors = RowErrors()
    messages = read_messages(value, "messages", LineFaults(0, errors), set(), messages_max=messages_max)
    if errors.count or messages is None:
        raise bad_params(errors)
    return [message_to_proto(message) for message in messages]


def message_to_proto(message: Message) -> ChatMessage:
    """The weight of a message is for training alone."""
    return ChatMessage(
        role=message.role,
        content=message.content,
        reasoning=message.reasoning or "",
        tool_calls=[
            ToolCall(id=call.id or "", name=call.name, arguments=json.dumps(call.arguments, ensure_ascii=False))
            for call in message.tool_calls
        ],
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
    )


def _logprobs(fields: Mapping[str, Any]) -> tuple[LogprobsForm, int | None]:
    """OpenAI's clients say true and how many alternatives, Together's how many alternatives."""
    asked = fields.get("logprobs", False)
    if not isinstance(asked, bool):
        if "top_logprobs" in fields:
            raise bad_param("top_logprobs", "must be left out where logprobs is a number")
        return LogprobsForm.TOGETHER, integer(fields, "logprobs", 0, _LOGPROBS_MAX)
    count = integer(fields, "top_logprobs", 0, _LOGPROBS_MAX)
    if asked:
        return LogprobsForm.OPENAI, count or 0
    if count:
        raise bad_param("top_logprobs", "is only allowed together with logprobs: true")
    return LogprobsForm.NONE, None


def _enable_thinking(fields: Mapping[str, Any]) -> bool | None:
    """vLLM's clients tell the template, Together's the model."""
    told = boolean(
        read_part(fields, "chat_template_kwargs", frozenset({"enable_thinking"})),
        "enable_thinking",
        "chat_template_kwargs",
    )
    also = boolean(read_part(fields, "reasoning", frozenset({"enabled"})), "enabled", "reasoning")
    if told is not None and also is not None and told != also:
        raise bad_param("reasoning.enabled", "must say the same as chat_template_kwargs.enable_thinking")
    return also if told is None else told
