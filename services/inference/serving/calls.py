"""Runs a call from its target to tokens: engine, adapter, generation, metering. Not pure: engines, database.

It knows no message of the wire. Engine errors become the platform's typed errors here and nowhere else.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

import structlog

from chassis.clock import Clock
from chassis.errors import (
    DomainError,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    invalid,
)
from chassis.identity import Caller
from services.inference.config import InferenceSettings
from services.inference.engines.answer_chunks import Chunk
from services.inference.engines.answer_form import AnswerForm
from services.inference.engines.base import (
    AdapterInvalid,
    AdapterNotLoaded,
    ContextTooLong,
    Engine,
    EngineBusy,
    EngineError,
    EngineSettings,
    GenerateRequest,
    PromptFailed,
    PromptTooCostly,
    RequestInvalid,
    Sampling,
    completion_tokens_allowed,
)
from services.inference.metering.domain import CallUse, MeteredCall
from services.inference.metering.meter import Meter
from services.inference.models.domain import TunedModel
from services.inference.serving.engine_pool import EngineKey, EnginePool
from services.inference.serving.read_ahead import read_ahead
from services.inference.serving.target import Target, Targets
from services.inference.serving.turns import Turns
from services.inference.serving.weights_cache import WeightsCache
from services.inference.spending.lease_account import Spender
from services.inference.spending.reservations import Reservation, Reservations

BUSY_RETRY_S = 1.0
FAILED_RETRY_S = 2.0
log = structlog.get_logger(__name__)
Render = Callable[[Engine], Awaitable[tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """How a prompt becomes tokens, and how much text that is."""

    render: Render
    chars: int


@dataclass(frozen=True, kw_only=True)
class Call:
    """One generation: for whom, with what, and how its prompt becomes tokens."""

    generation_id: str
    caller: Caller
    model: str
    target: Target
    prompt: Prompt
    # The answer's limit, None for the default; a default shrinks to what the context leaves.
    output_tokens_max: int | None
    sampling: Callable[[int], Sampling]
    # The caller gets the answer only when it is complete.
    whole: bool
    # What an answer in a conversation looks like; None for a continuation.
    form: AnswerForm | None = None


# Absolute paths of two names at least, the last of which says enough: in quotation marks, or up to a blank.
_PATHS = (
    re.compile(r"""(?P<mark>['"])/[^'"\n]*/(?P<name>[^'"/\n]+)(?P=mark)"""),
    re.compile(r"""(?P<mark>)(?<![\w./])(?:[a-z]+://)?(?:/[^\s/'":;,()]+)+/(?P<name>[^\s/'":;,()]+)"""),
)


def domain_error_of(error: EngineError) -> DomainError:
    """The typed error for something that an engine raised on purpose. Where this server keeps files is nobody's
    business; the request's own words stay as they are."""
    told = str(error)
    for path in _PATHS:
        told = path.sub(r"\g<mark>\g<name>\g<mark>", told)
    match error:
        case RequestInvalid():
            return invalid(error.field_name, error.problem, message=str(error))
        case ContextTooLong():
            return InvalidArgument(
                "CONTEXT_TOO_LONG", str(error), metadata={"context_tokens_max": str(error.context_tokens_max)}
            )
        case AdapterInvalid() | PromptTooCostly() | PromptFailed():
            return FailedPrecondition("MODEL_INVALID", told)
        case EngineBusy() | AdapterNotLoaded():
            return ResourceExhausted("CAPACITY_EXHAUSTED", told, retry_after_s=BUSY_RETRY_S)
    if told != str(error):
        log.warning("engine_error_told_without_paths", error=str(error))
    return Unavailable("ENGINE_FAILED", told, retry_after_s=FAILED_RETRY_S)


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """Turns engine errors inside the block into typed ones."""
    try:
        yield
    except EngineError as error:
        raise domain_error_of(error) from error


class Serving:
    """Runs calls on engines and meters what they used, also when the caller leaves early."""

    def __init__(
        self,
        targets: Targets,
        engines: EnginePool,
        cache: WeightsCache,
        meter: Meter,
        reservations: Reservations,
        *,
        settings: InferenceSettings,
        clock: Clock,
    ) -> None:
        self._targets = targets
        self._engines = engines
        self._cache = cache
        self._meter = meter
        self._reservations = reservations
        self._settings = settings
        self._clock = clock
        self._prompts = Turns()
        self._dedicated: dict[str, Target] = {}

    @contextlib.asynccontextmanager
    async def engine(self, target: Target) -> AsyncIterator[Engine]:
        """A started engine with the target's adapter loaded, for the length of the block."""
        folder = lambda: self._cache.use(target.engine_weights)  # noqa: E731
        with engine_errors():
            async with self._engines.use(target.engine, folder, self._limits(target)) as engine:
                if target.adapter is None:
                    yield engine
                    return
                async with self._cache.use(target.adapter) as path:
                    await engine.load_adapter(target.adapter.revision, path, target.adapter_rank)
                    yield engine

    async def warm_up(self, target: Target) -> None:
        """Starts the engine and loads the adapter before the first call asks for them."""
        async with self.engine(target):
            return

    async def warm_up_model(self, model: TunedModel) -> None:
        """Warms up what serves a tuned model."""
        await self.warm_up(await self._targets.of_tuned(model))

    async def start(self, target: Target) -> None:
        """Starts the engine of an endpoint. Only its keeper does: a call never starts one."""
        with engine_errors():
            await self._engines.start(
                target.engine, lambda: self._cache.use(target.engine_weights), self._limits(target)
            )
        await self.warm_up(target)
        self._dedicated[target.engine.owner] = target

    def serve_until(self, owner: str, until_s: float) -> None:
        """Until when the devices of an endpoint's lease are certainly its own; its engine ends by itself then."""
        self._engines.serve_until(EngineKey(owner=owner), until_s)

    async def drop(self, owner: str) -> None:
        """Ends the engine of an endpoint's lease, also one that is starting; then it is out of memory."""
        self._dedicated.pop(owner, None)
        await self._engines.remove(EngineKey(owner=owner))

    def is_running(self, owner: str) -> bool:
        """Whether the engine of an endpoint's lease has started and not failed."""
        return self._engines.is_running(EngineKey(owner=owner))

    def dedicated(self, owner: str) -> Target | None:
        """What the engine of an endpoint's lease serves; None when there is none in this process."""
        return self._dedicated.get(owner) if self.is_running(owner) else None

    def generate(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """The chunks of one call. The engine goes on at its own pace; what it computed is metered however the call
        ends, and committed before the last chunk goes out."""
        return read_ahead(self._run(call), stalled_s_max=self._settings.stalled_reader_s_max, clock=self._clock)

    async def _run(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """What the engine says to a call, as it says it."""
        last: Chunk | None = None
        async with self._reserved(call) as reservation:
            with self._metered(call, reservation) as use:
                async with (
                    self.engine(call.target) as engine,
                    contextlib.aclosing(self._ask(call, engine, reservation)) as chunks,
                ):
                    async for chunk in chunks:
                        use.count(chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
                        if chunk.is_last:
                            last = chunk
                        else:
                            yield chunk
                assert last is not None, "an engine says which chunk is its last"
                if _is_metered(call):
                    # The engine is free already: a database that is away holds none.
                    await self._meter.commit(use)
                yield last

    async def _ask(self, call: Call, engine: Engine, reservation: Reservation | None) -> AsyncGenerator[Chunk, None]:
        """Nothing is asked of the engine, and nothing it says is passed on, that was not reserved."""
        self._check_chars(call.prompt.chars, engine.context_tokens_max)
        if call.form is not None:
            await engine.check_form(call.form)
        prompt = await self._render(call, engine)
        request = GenerateRequest(
            request_id=call.generation_id,
            prompt_token_ids=prompt,
            sampling=call.sampling(self._limit(call, len(prompt), engine.context_tokens_max)),
            form=call.form,
            adapter_revision=call.target.adapter.revision if call.target.adapter else None,
        )
        if reservation is not None:
            longest = completion_tokens_allowed(request, engine.context_tokens_max)
            await reservation.begin(len(prompt), longest * request.sampling.choices, whole=call.whole)
        async with contextlib.aclosing(engine.generate(request)) as chunks:
            async for chunk in chunks:
                if reservation is not None:
                    await reservation.cover(chunk.usage.completion_tokens)
                yield chunk

    async def _render(self, call: Call, engine: Engine) -> tuple[int, ...]:
        # With one of each project in line, none waits for all of another's, however long a template takes for them.
        is_long = call.prompt.chars > self._settings.prompt_chars_short_max
        async with self._prompts.take((call.caller.tenant, call.target.engine, is_long)):
            return await call.prompt.render(engine)

    def _reserved(self, call: Call) -> contextlib.AbstractAsyncContextManager[Reservation | None]:
        if not _is_metered(call):
            return contextlib.nullcontext()
        spender = Spender(call.caller.account, call.caller.tenant, call.caller.subject)
        return self._reservations.reserve(spender, call.target.base_model)

    def _metered(self, call: Call, reservation: Reservation | None) -> contextlib.AbstractContextManager[CallUse]:
        metered = MeteredCall(
            generation_id=call.generation_id,
            project_id=call.caller.tenant,
            organization_id=call.caller.account,
            model_id=call.model,
            base_model=call.target.base_model,
            api_key_id=call.caller.subject,
            credit_lease_id=reservation.lease_id if reservation is not None else "",
        )
        return self._meter.metered(metered) if _is_metered(call) else contextlib.nullcontext(CallUse(metered))

    def _check_chars(self, chars: int, context_tokens_max: int) -> None:
        """Refuses a text that cannot fit before its tokens are counted, which takes the tokenizer from everybody."""
        chars_max = context_tokens_max * self._settings.prompt_chars_per_token_max
        if chars > chars_max:
            raise InvalidArgument(
                "CONTEXT_TOO_LONG",
                f"the prompt has {chars} characters; for a context of {context_tokens_max} tokens at most {chars_max}"
                " are taken (prompt_chars_per_token_max)",
                metadata={"context_tokens_max": str(context_tokens_max), "prompt_chars_max": str(chars_max)},
            )

    def _limits(self, target: Target) -> EngineSettings:
        return self._settings.engine_settings(
            adapters=target.takes_adapters, gpu_indices=target.gpu_indices, parsers=target.parsers
        )

    def _limit(self, call: Call, prompt_tokens: int, context_tokens_max: int) -> int:
        """The answer's limit: what was asked for, else the default within what the context leaves."""
        if call.output_tokens_max is not None:
            return call.output_tokens_max
        return max(1, min(self._settings.output_tokens_default, context_tokens_max - prompt_tokens))


def _is_metered(call: Call) -> bool:
    """A dedicated endpoint's calls are not: its minutes pay for every token."""
    return not call.target.engine.owner
