"""Handlers of finemesh.inference.v1.InferenceService: check, convert, call, convert."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator

from chassis.db.pool import Pool
from chassis.errors import invalid
from chassis.identity import current_caller
from chassis.ids import Ids
from finemesh.inference.v1 import generation_pb2, inference_service_pb2, inference_service_pb2_grpc
from services.inference.api import generation_convert as convert
from services.inference.api.pages import NEWEST, every_row
from services.inference.api.whole_answer import WholeAnswer
from services.inference.config import InferenceSettings
from services.inference.endpoints.lifecycle import EndpointState
from services.inference.endpoints.router import Router
from services.inference.endpoints.store import EndpointStore
from services.inference.engines.answer_form import AnswerForm
from services.inference.engines.prompts.prompt_chars import prompt_chars
from services.inference.models.store import ModelStore
from services.inference.serving.calls import Call, Prompt, Serving
from services.inference.spending.spend_guard import SpendGuard

LISTED_PAGE_SIZE = 1000


class InferenceService(inference_service_pb2_grpc.InferenceServiceServicer):
    """Chat and completion, whole and as streams."""

    def __init__(
        self,
        pool: Pool,
        router: Router,
        serving: Serving,
        spend_guard: SpendGuard,
        *,
        settings: InferenceSettings,
        ids: Ids,
    ) -> None:
        self._router = router
        self._serving = serving
        self._spend_guard = spend_guard
        self._pool = pool
        self._settings = settings
        self._ids = ids

    async def Chat(
        self, request: inference_service_pb2.ChatRequest, context: object
    ) -> inference_service_pb2.ChatResponse:
        call = await self._chat_call(request, whole=True)
        answer = await self._whole(call)
        return inference_service_pb2.ChatResponse(
            generation_id=call.generation_id,
            model=call.model,
            choices=answer.chat_choices(),
            usage=convert.usage_to_proto(answer.usage),
            revision=call.target.revision,
        )

    async def StreamChat(
        self, request: inference_service_pb2.StreamChatRequest, context: object
    ) -> AsyncIterator[inference_service_pb2.StreamChatResponse]:
        call = await self._chat_call(request, whole=False)
        revision = call.target.revision
        async with contextlib.aclosing(self._serving.generate(call)) as chunks:
            async for chunk in chunks:
                part = convert.chat_part_to_proto(call.generation_id, chunk)
                # Only the first part says it.
                part.revision, revision = revision, ""
                yield part

    async def Complete(
        self, request: inference_service_pb2.CompleteRequest, context: object
    ) -> inference_service_pb2.CompleteResponse:
        prompt = self._prompt(request.prompt)
        call = await self._call(request.model, prompt, None, request.sampling, whole=True)
        answer = await self._whole(call)
        return inference_service_pb2.CompleteResponse(
            generation_id=call.generation_id,
            model=call.model,
            choices=answer.completion_choices(),
            usage=convert.usage_to_proto(answer.usage),
            revision=call.target.revision,
        )

    async def StreamComplete(
        self, request: inference_service_pb2.StreamCompleteRequest, context: object
    ) -> AsyncIterator[inference_service_pb2.StreamCompleteResponse]:
        prompt = self._prompt(request.prompt)
        call = await self._call(request.model, prompt, None, request.sampling, whole=False)
        revision = call.target.revision
        async with contextlib.aclosing(self._serving.generate(call)) as chunks:
            async for chunk in chunks:
                part = convert.completion_part_to_proto(
                    inference_service_pb2.StreamCompleteResponse, call.generation_id, chunk
                )
                part.revision, revision = revision, ""
                yield part

    async def ListServedModels(
        self, request: inference_service_pb2.ListServedModelsRequest, context: object
    ) -> inference_service_pb2.ListServedModelsResponse:
        caller = current_caller()
        whole = functools.partial(every_row, page_size=LISTED_PAGE_SIZE, rows_max=self._settings.served_models_max)
        newest = functools.partial(whole, begin=NEWEST, place_of=lambda row: (row.created_at, row.id))
        async with self._pool.acquire() as connection:
            models, endpoints = ModelStore(connection), EndpointStore(connection)
            bases = await whole(models.list_bases, begin="", place_of=lambda base: base.model_id)
            tuned = await newest(functools.partial(models.page, caller.tenant))
            dedicated = await newest(functools.partial(endpoints.page, caller.tenant))
        found = [(b.model_id, "base", b.created_at, "finemesh") for b in bases]
        found += [(m.model_id, "tuned", m.created_at, caller.namespace) for m in tuned]
        ready = [e for e in dedicated if e.state == EndpointState.READY]
        found += [(e.endpoint_id, "endpoint", e.created_at, caller.namespace) for e in ready]
        return inference_service_pb2.ListServedModelsResponse(
            models=[
                inference_service_pb2.ServedModel(
                    model_id=model_id, kind=kind, create_time_s=int(created.timestamp()), owner=owner
                )
                for model_id, kind, created, owner in found
            ]
        )

    async def _chat_call(self, request: convert.AskedChat, *, whole: bool) -> Call:
        chat = convert.chat_from_proto(request, self._settings)
        return await self._call(request.model, _chat_prompt(chat), chat.form, request.sampling, whole=whole)

    async def _call(
        self,
        model: str,
        prompt: Prompt,
        form: AnswerForm | None,
        wanted: generation_pb2.SamplingParameters,
        *,
        whole: bool,
    ) -> Call:
        """The call with its target; a typed error for a caller who may not spend, an unknown model, or sampling outside
        its ranges."""
        caller = current_caller()
        self._spend_guard.check(caller)
        if len(wanted.stop) > self._settings.stops_max:
            problem = f"at most {self._settings.stops_max} stop texts"
            raise invalid("sampling.stop", problem, message=problem)
        return Call(
            generation_id=self._ids.new("gen"),
            caller=caller,
            model=model,
            target=await self._router.target(caller.tenant, model),
            prompt=prompt,
            output_tokens_max=wanted.output_tokens_max if wanted.HasField("output_tokens_max") else None,
            sampling=lambda limit: convert.sampling_from_proto(wanted, limit),
            form=form,
            whole=whole,
        )

    async def _whole(self, call: Call) -> WholeAnswer:
        answer = WholeAnswer()
        async with contextlib.aclosing(self._serving.generate(call)) as chunks:
            async for chunk in chunks:
                answer.add(chunk)
        return answer

    @staticmethod
    def _prompt(text: str) -> Prompt:
        if not text:
            raise invalid("prompt", "must not be empty", message="prompt is empty")
        return Prompt(render=lambda engine: engine.render_text(text), chars=len(text))


def _chat_prompt(chat: convert.Chat) -> Prompt:
    messages, form = chat.messages, chat.form
    return Prompt(
        render=lambda engine: engine.render_chat(messages, form.tools, enable_thinking=form.enable_thinking),
        chars=prompt_chars(messages, form.tools),
    )
