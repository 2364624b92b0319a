"""Reads the JSON of a completion request, the older form without messages. Not pure: protobuf."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from finemesh.inference.v1.generation_pb2 import SamplingParameters
from finemesh.inference.v1.inference_service_pb2 import CompleteRequest, StreamCompleteRequest
from services.gateway.http.openai_errors import bad_param
from services.gateway.http.request_fields import INT32_MAX, Parameters, boolean, integer, read_model, read_object
from services.gateway.http.sampling_request import IGNORED, SAMPLING, SENDING, read_include_usage, read_sampling

PARAMETERS = Parameters(
    read=SAMPLING | SENDING | {"prompt", "echo", "logprobs", "best_of"},
    ignored=IGNORED,
    fixed={"suffix": ("",), "response_format": ({"type": "text"},), "add_special_tokens": (True,)},
)
# As OpenAI's and vLLM's servers have it.
TOKENS_DEFAULT = 16
_LOGPROBS_MAX = 20


Asked = TypeVar("Asked", CompleteRequest, StreamCompleteRequest)


@dataclass(frozen=True, kw_only=True)
class CompletionCall:
    """What is asked, and how its answer is written; `echo` stands before every choice."""

    model: str
    prompt: str
    sampling: SamplingParameters
    stream: bool
    include_usage: bool
    logprobs: bool
    echo: str

    def asked(self, message_class: type[Asked]) -> Asked:
        return message_class(model=self.model, prompt=self.prompt, sampling=self.sampling)


def read_completion(body: bytes) -> CompletionCall:
    """InvalidArgument names the parameter that is wrong."""
    fields = read_object(body, PARAMETERS)
    stream = bool(boolean(fields, "stream"))
    model, prompt = read_model(fields), _prompt(fields.get("prompt"))
    top_logprobs = _logprobs(fields)
    echo = bool(boolean(fields, "echo"))
    if echo and top_logprobs is not None:
        raise bad_param("echo", "must be left out together with logprobs, which are those of the answer alone")
    if integer(fields, "best_of", 1, INT32_MAX) not in (None, fields.get("n", 1)):
        raise bad_param("best_of", "must be n, or left out: every answer that is made is given")
    tokens_max = integer(fields, "max_tokens", 1, INT32_MAX) or TOKENS_DEFAULT
    return CompletionCall(
        model=model,
        prompt=prompt,
        sampling=read_sampling(fields, tokens_max=tokens_max, top_logprobs=top_logprobs),
        stream=stream,
        include_usage=read_include_usage(fields, stream=stream),
        logprobs=top_logprobs is not None,
        echo=prompt if echo else "",
    )


def _prompt(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, list) and value:
        what = "prompts" if isinstance(value[0], str) else "token ids"
        raise bad_param("prompt", f"must be one text, not {what}; send a request for each, as text")
    if not isinstance(value, str) or not value:
        raise bad_param("prompt", "must be a text that is not empty")
    return value


def _logprobs(fields: Mapping[str, Any]) -> int | None:
    """False is what clients of the chat form send for none."""
    return None if fields.get("logprobs") is False else integer(fields, "logprobs", 0, _LOGPROBS_MAX)
