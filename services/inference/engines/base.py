"""The contract of an engine: one base model in memory that renders prompts, generates tokens and loads adapters.

It refuses to know gRPC, tenants, prices, where files come from, and which library computes the tokens.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from formats.rows import Message
from services.inference.engines.answer_chunks import Chunk
from services.inference.engines.answer_form import AnswerForm, AnswerParsers

ALTERNATIVES_MAX = 20
CHOICES_MAX = 16
LOGIT_BIASES_MAX = 300
STOPS_MAX = 16
STOP_CHARS_MAX = 256
GREEDY_BELOW = 1e-5  # temperatures below are 0 to vLLM
RANK_MAX = 512  # the largest that any engine has kernels for


class EngineError(Exception):
    """Root of everything an engine raises on purpose."""


class EngineFailed(EngineError):
    """The engine cannot serve any more, or it never started; it has to be stopped and started anew."""


class EngineBusy(EngineError):
    """A bounded queue of the engine is full; the same call may succeed later or on another replica."""


class RequestInvalid(EngineError):
    """The request itself cannot be served by any replica of this model."""

    def __init__(self, field_name: str, problem: str) -> None:
        super().__init__(f"{field_name}: {problem}")
        self.field_name = field_name
        self.problem = problem


class PromptTooCostly(EngineError):
    """Tokenizer or chat template of this model took more for this prompt than they may, and were stopped."""

    def __init__(self, limit: str) -> None:
        super().__init__(
            f"the chat template and tokenizer of this model took more than {limit} for this prompt and were stopped; "
            "send a shorter or another one, or have whoever imported the model mend its chat template"
        )


class PromptFailed(EngineError):
    """Tokenizer or chat template of this model broke down on this prompt; others are served."""


class ContextTooLong(EngineError):
    """Prompt and requested completion do not fit the context of the model."""

    def __init__(self, prompt_tokens: int, completion_tokens: int, context_tokens_max: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and {completion_tokens} more were requested, "
            f"the context holds {context_tokens_max}"
        )
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = completion_tokens
        self.context_tokens_max = context_tokens_max


class AdapterInvalid(EngineError):
    """The adapter's files are broken, oversized, or do not belong to this base model."""

    def __init__(self, revision: str, problem: str) -> None:
        super().__init__(f"adapter {revision}: {problem}")
        self.revision = revision
        self.problem = problem


class AdapterNotLoaded(EngineError):
    """A request names an adapter that `load_adapter` was never called for (or that was unloaded since)."""

    def __init__(self, revision: str) -> None:
        super().__init__(f"adapter {revision} is not loaded")
        self.revision = revision


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Limits of one engine; every bound that the engine enforces is named here."""

    context_tokens_max: int | None = None  # None: what the model's config declares
    sequences_max: int = 64  # requests computed together in one step
    queue_requests_max: int = 256  # unfinished answers of requests, running ones included
    kv_cache_bytes: int | None = None  # None: 1 GiB on a CPU, what gpu_memory_fraction leaves over on a GPU
    gpu_memory_fraction: float = 0.85
    gpu_indices: tuple[int, ...] = ()  # GPUs this engine may use, unused on a CPU; several means tensor parallel
    threads: int | None = None  # CPU threads of the computing process; None: all the process may use
    eager: bool = (
        False  # on a GPU: neither compilation nor graphs, for an engine that answers a few requests; a CPU has none
    )
    prompt_chars_short_max: int = 16_384  # longer prompts are tokenized apart, so that these need not wait for them
    prompt_workers: int = 2  # processes that tokenize and render; 0: this engine is asked for tokens only
    prompt_s_max: float = 5.0  # for one of at most prompt_chars_short_max, with template and tokenizer
    long_prompt_s_max: float = 60.0  # for one of more
    prompt_memory_bytes_max: int = 1 << 30  # of each such process, beyond what the tokenizer itself takes
    parsers: AnswerParsers = field(default_factory=AnswerParsers)
    answer_part_s_max: float = 2.0  # for reading one part of an answer that a parser reads
    answer_s_max: float = 20.0  # for reading all of it
    guide_s_max: float = 10.0  # for the grammar of an answer
    dtype: str = "auto"  # "auto" is float32 on a CPU and the checkpoint's own dtype on a GPU
    adapters_in_batch_max: int = 4
    adapters_resident_max: int = 16  # 0 switches adapters off (a fully tuned model)
    adapters_known_max: int = 4096
    adapter_rank_max: int = 64
    adapter_bytes_max: int = 8 << 30
    chunk_interval_s: float = 0.02  # tokens that arrive within this time travel in one chunk
    start_timeout_s: float = 600.0
    stop_grace_s: float = 5.0

    def __post_init__(self) -> None:
        if self.adapters_known_max < self.adapters_resident_max:
            raise ValueError("adapters_known_max is less than adapters_resident_max")
        if not 1 <= self.adapter_rank_max <= RANK_MAX:
            raise ValueError(f"adapter_rank_max must be between 1 and {RANK_MAX}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and how often. A temperature of 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    completion_tokens_max: int | None = None  # None: whatever the context leaves
    stop: tuple[str, ...] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0  # 0: no limit
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # by token id
    completion_tokens_min: int = 0  # before them neither an end token nor a stop text ends an answer
    ignore_eos: bool = False
    choices: int = 1  # answers to the same prompt, each with the limits above
    logprobs: int | None = None  # None: none; N: the chosen token and the N most likely ones

    def check(self) -> None:
        """Raise RequestInvalid naming the first field that is out of its range."""
        _check_range("temperature", self.temperature, 0.0, 2.0)
        _check_range("top_p", self.top_p, 1e-6, 1.0)
        _check_range("top_k", self.top_k, 0, 1 << 20)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.completion_tokens_max is not None:
            _check_range("max_tokens", self.completion_tokens_max, 1, 1 << 30)
        _check_range("min_tokens", self.completion_tokens_min, 0, self.completion_tokens_max or 1 << 30)
        _check_range("repetition_penalty", self.repetition_penalty, 1e-2, 2.0)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("n", self.choices, 1, CHOICES_MAX)
        if self.choices > 1 and self.temperature < GREEDY_BELOW:
            raise RequestInvalid("n", "must be 1 with a temperature of 0, which makes all choices the same")
        if len(self.logit_bias) > LOGIT_BIASES_MAX:
            raise RequestInvalid("logit_bias", f"at most {LOGIT_BIASES_MAX} tokens are allowed")
        for token_id, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        if self.logprobs is not None:
            _check_range("top_logprobs", self.logprobs, 0, ALTERNATIVES_MAX)
        if self.seed is not None:
            _check_range("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        if len(self.stop) > STOPS_MAX:
            raise RequestInvalid("stop", f"at most {STOPS_MAX} stop strings are allowed")
        for text in self.stop:
            if not 1 <= len(text) <= STOP_CHARS_MAX:
                raise RequestInvalid("stop", f"a stop string has 1 to {STOP_CHARS_MAX} characters")


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """A prompt that is already tokens, so that no template can be applied a second time."""

    request_id: str  # unique among unfinished requests of the engine
    prompt_token_ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    form: AnswerForm | None = None  # None: a bare text, in which nothing is looked for
    adapter_revision: str | None = None


class Engine(Protocol):
    """One running base model. All methods may be called concurrently from one event loop."""

    @property
    def on_gpus(self) -> bool:
        """Whether it computes on GPUs, which are its own alone; a CPU is everybody's. Known before `start`."""

    @property
    def context_tokens_max(self) -> int:
        """Prompt and completion together; known after `start`."""

    @property
    def requests_unfinished(self) -> int:
        """Answers of requests admitted and not yet finished: the load figure that routing compares."""

    async def start(self) -> None:
        """Load the model and warm up. Raises EngineFailed; call `stop` also after a failed start."""

    async def stop(self) -> None:
        """End unfinished requests with EngineFailed and free every process and byte. Safe to call twice."""

    def serve_until(self, until_s: float) -> None:
        """Until when the devices are certainly its own, by the machine's monotonic clock; for ever if nobody says so.

        The engine computes and answers nothing after that moment, unless it was told a later one before. It ends by
        itself, also while this process is frozen, and is then as one that died. May be called before `start`.
        """

    async def health(self) -> None:
        """Return when the engine can serve; raises EngineFailed otherwise. Costs no computation."""

    async def wait_failed(self) -> EngineFailed:
        """Return once the engine has died on its own; never returns for an engine that is stopped in order."""

    async def load_adapter(self, revision: str, path: Path, rank: int) -> None:
        """Make the adapter in the folder `path` usable under its content-derived `revision`.

        Idempotent and cheap when loaded already; a revision is never loaded again over itself. Files are checked
        (header, rank, shapes, dtypes, finite values) before the engine sees them: AdapterInvalid. The folder must stay
        readable until `unload_adapter`, because an evicted adapter is read again on its next use. EngineBusy when every
        slot is locked by a running request.
        """

    async def unload_adapter(self, revision: str) -> bool:
        """Forget the adapter after its running requests end; False when it was not known."""

    def adapters(self) -> tuple[str, ...]:
        """Revisions resident now, least recently used first."""

    async def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        enable_thinking: bool | None = None,
    ) -> tuple[int, ...]:
        """Apply the model's chat template once, with the generation prompt; RequestInvalid where it refuses.

        Messages and the declarations of tools are told to it as the trainer tells those of a row. `enable_thinking` is
        told only if it is set.
        """

    async def render_text(self, text: str) -> tuple[int, ...]:
        """Tokens of a raw completion prompt, with the special tokens the model's tokenizer adds at the start."""

    async def count_tokens(self, text: str) -> int:
        """Tokens of a bare piece of text, no special ones added."""

    async def check_form(self, form: AnswerForm) -> None:
        """Raise RequestInvalid for an answer that this model or this engine cannot give, before anything is paid."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Yield chunks of all choices until the last one.

        Closing the generator (or cancelling its task) frees the request; use `contextlib.aclosing`, so that leaving
        early frees it at once. Before the first chunk it raises
        RequestInvalid, ContextTooLong, AdapterNotLoaded, AdapterInvalid or EngineBusy; at any time EngineFailed.
        """


def completion_tokens_allowed(request: GenerateRequest, context_tokens_max: int) -> int:
    """The completion limit of a request that fits the context; raises RequestInvalid or ContextTooLong."""
    request.sampling.check()
    prompt_tokens = len(request.prompt_token_ids)
    if prompt_tokens == 0:
        raise RequestInvalid("prompt", "is empty")
    if request.form is not None and request.form.ends_by_grammar:
        for name, asked in (
            ("min_tokens", request.sampling.completion_tokens_min),
            ("ignore_eos", request.sampling.ignore_eos),
        ):
            if asked:
                raise RequestInvalid(name, "cannot be combined with an answer whose form says where it ends")
    wanted = request.sampling.completion_tokens_max
    room = context_tokens_max - prompt_tokens
    if room < 1 or (wanted is not None and wanted > room):
        raise ContextTooLong(prompt_tokens, wanted or 1, context_tokens_max)
    return room if wanted is None else wanted


def _check_range(name: str, value: float, low: float, high: float) -> None:
    # NaN fails every comparison, so it is refused by the same expression.
    if not (math.isfinite(value) and low <= value <= high):
        raise RequestInvalid(name, f"must be between {low} and {high}, got {value}")
